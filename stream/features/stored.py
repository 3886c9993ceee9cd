"""Features of stored samples: as they lie there, or made again where another specification made them. Pure.

Legend: N rows, F slots a row, D dense numbers a row.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import matrix
from headrace.contract.spec import EVENT_TIME, FeatureSpec
from headrace.stream.features.featurize import featurize

Rows: TypeAlias = pa.RecordBatch | pa.Table


def stored_features(rows: Rows, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return slots int64 [N, F] and numbers float32 [N, D] of samples; they may lie in the rows' own memory.

    Args:
        rows: with `slots`, `numeric` and `spec`. Where one is of another specification, also with every field that a
            feature reads; of the others these may be null.
    """
    own = pc.fill_null(pc.equal(_whole(rows, "spec"), spec.digest()), False)
    own_N = own.to_numpy(zero_copy_only=False)
    if own_N.all() and len(own_N):
        return _as_stored(rows, spec)
    slots_NF = np.empty((rows.num_rows, spec.slots), np.int64)
    numeric_ND = np.empty((rows.num_rows, spec.numerics), np.float32)
    if own_N.any():
        slots_NF[own_N], numeric_ND[own_N] = _as_stored(rows.select(["slots", "numeric"]).filter(own), spec)
    names = sorted({name for feature in spec.features for name in feature.inputs()} | {EVENT_TIME})
    others = rows.select(names).filter(pc.invert(own))
    slots_NF[~own_N], numeric_ND[~own_N] = featurize({name: _whole(others, name) for name in names}, spec)
    return slots_NF, numeric_ND


def _as_stored(rows: Rows, spec: FeatureSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    slots_NF: npt.NDArray[np.int64] = matrix(_whole(rows, "slots"), spec.slots)  # type: ignore[assignment]
    numeric_ND: npt.NDArray[np.float32] = matrix(_whole(rows, "numeric"), spec.numerics)  # type: ignore[assignment]
    return slots_NF, numeric_ND


def _whole(rows: Rows, name: str) -> pa.Array:
    column = rows[name]
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
