"""Which stored samples no learner takes: a number, a label or a weight is not finite or out of range. Pure.

A sample whose own gradient overflows is refused by the learner too, and that only a replay can tell: it counts as
learnt here, and `samples_refused_total` counts it.
"""

from __future__ import annotations

import pyarrow as pa

from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.replay.ledger.keys import JOINED, sample_ids
from headrace.trainer.source.judged import refused_rows

JUDGED = pa.schema(
    [
        *JOINED,
        pa.field("value", pa.float64()),
        pa.field("weight", pa.float32()),
        pa.field("numeric", pa.list_(pa.float32())),
        pa.field("spec", pa.string()),
    ]
)
"""JOINED and what a learner looks at before it takes a sample."""


def refused_ids(rows: pa.Table, spec: FeatureSpec, recipe: Recipe) -> pa.Array:
    """Return the ids of those JUDGED rows that a learner of `spec` and `recipe` refuses."""
    refused, digest = [pa.array([], pa.string())], spec.digest()
    for batch in rows.to_batches():
        refused.append(sample_ids(batch.filter(pa.array(refused_rows(batch, spec, digest, recipe)))))
    return pa.concat_arrays(refused)
