"""Which stored samples no learner takes: a number, a label or a weight is not finite or out of range. Pure.

A sample whose own gradient overflows is refused by the learner too, and that only a replay can tell: it counts as
learnt here, and `samples_refused_total` counts it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import matrix
from headrace.contract.spec import FeatureSpec
from headrace.replay.ledger.keys import JOINED, sample_ids
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import acceptable

JUDGED = pa.schema(
    [
        *JOINED,
        pa.field("weight", pa.float32()),
        pa.field("numeric", pa.list_(pa.float32())),
        pa.field("spec", pa.string()),
    ]
)
"""JOINED and what a learner looks at before it takes a sample."""


def refused_ids(rows: pa.Table, spec: FeatureSpec) -> pa.Array:
    """Return the ids of those JUDGED rows that a learner of `spec` refuses.

    Numbers that another spec made are not looked at: the trainer featurizes those rows again.
    """
    refused, digest = [pa.array([], pa.string())], spec.digest()
    for batch in rows.to_batches():
        ours_B = pc.fill_null(pc.equal(batch["spec"], digest), False).to_numpy(zero_copy_only=False)
        for is_ours, here_B in ((True, ours_B), (False, ~ours_B)):
            if here_B.any():
                part = batch.filter(pa.array(here_B))
                keep_B = _acceptable(part, spec.numerics if is_ours else 0)
                refused.append(sample_ids(part.filter(pa.array(~keep_B))))
    return pa.concat_arrays(refused)


def _acceptable(rows: pa.RecordBatch, numerics: int) -> npt.NDArray[np.bool_]:
    count = rows.num_rows
    numeric_BD = matrix(rows["numeric"], numerics) if numerics else np.zeros((count, 0))
    batch = Batch(
        np.zeros((count, 0), np.int64),
        np.array(numeric_BD, np.float32),
        np.array(rows["label"], np.float32),
        np.array(rows["weight"], np.float32),
        np.zeros(count, np.int64),
        np.zeros(count, np.int8),
        np.zeros(count, np.int64),
    )
    return acceptable(batch, tasks=1)
