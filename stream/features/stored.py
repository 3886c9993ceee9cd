"""Features of stored samples: as they lie there, or made again where another specification made them. Pure.

Legend: N rows, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import matrix
from headrace.contract.spec import EVENT_TIME, FeatureSpec
from headrace.stream.features.featurize import featurize


def stored_features(rows: pa.RecordBatch, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return slots int64 [N, F] and numbers float32 [N, D] of samples; they may lie in the rows' own memory.

    Args:
        rows: with `slots`, `numeric` and `spec`. Where one is of another specification, also with every field that a
            feature reads; of the others these may be null.
    """
    own = pc.fill_null(pc.equal(rows["spec"], spec.digest()), False)
    own_N = own.to_numpy(zero_copy_only=False)
    if own_N.all() and len(own_N):
        return matrix(rows["slots"], spec.slots), matrix(rows["numeric"], spec.numerics)  # type: ignore[return-value]
    slots_NF = np.empty((rows.num_rows, spec.slots), np.int64)
    numeric_ND = np.empty((rows.num_rows, spec.numerics), np.float32)
    if own_N.any():
        stored = rows.select(["slots", "numeric"]).filter(own)
        slots_NF[own_N] = matrix(stored["slots"], spec.slots)
        numeric_ND[own_N] = matrix(stored["numeric"], spec.numerics)
    inputs = sorted({name for feature in spec.features for name in feature.inputs()} | {EVENT_TIME})
    slots_NF[~own_N], numeric_ND[~own_N] = featurize(rows.select(inputs).filter(pc.invert(own)), spec)
    return slots_NF, numeric_ND
