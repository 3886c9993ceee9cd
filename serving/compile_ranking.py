"""Compiles what answers requests, before anyone waits for it: on a machine's first start that takes seconds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.contract.formats.served_token import token_head, token_key, token_layout
from headrace.contract.spec import Categorical, Counter, FeatureSpec
from headrace.kernels.hashes import hash128_integers, hash128_texts
from headrace.kernels.served_tokens import seal_tokens
from headrace.serving.counter_table import CounterTable
from headrace.stream.features.featurize import featurize
from headrace.stream.features.few_rows import Texts
from headrace.trainer.model.scoring import sigmoid


def compile_ranking() -> None:
    """Run each compiled function once with the types that a request has."""
    counter, table, key = Counter(name="c", key="k"), CounterTable(), token_key("")
    table.put("c/0", {0: [1, 1]})
    for keys_N2 in (hash128_integers(np.zeros(1, np.int64), 0), hash128_texts(pa.array(["0"]), 0)):
        table.values(counter, keys_N2, np.ones(1, np.bool_), 0)
    featurize({"k": Texts(["0"])}, FeatureSpec(features=(Categorical(field="k"),)))
    sigmoid(np.zeros((1, 1), np.float32))
    zeros = np.zeros((1, 2), np.float32)
    layout = token_layout(["t"], [counter], [])
    seal_tokens(layout, key, token_head(key, "v"), zeros[:, :1].copy(), zeros, [])
