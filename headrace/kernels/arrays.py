"""Names of the types that compiled code takes and gives."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

U64s = npt.NDArray[np.uint64]
I64s = npt.NDArray[np.int64]
I32s = npt.NDArray[np.int32]
U8s = npt.NDArray[np.uint8]
F64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Int: TypeAlias = Any
"""An integer of compiled code: it takes Python's integers and NumPy's, and gives either."""
