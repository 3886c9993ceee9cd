"""What a learner of tables is made of: where rows live, and the dense part on top of them.

Axes: B samples, F slots, U distinct ids of a batch, D numbers, K keys, V = 1 + dim values of a row, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.trainer.model.layers.norms import Norms
from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, Columns
from headrace.trainer.model.tables.distinct_ids import DistinctIds
from headrace.trainer.model.tables.row_index import RowIndex
from headrace.trainer.model.tables.table import Int64s

State = dict[str, npt.NDArray[np.generic]]


class Store(Protocol):
    """Where rows live: `Tables` on the host, or `HotRows`, whose values and gradients are tensors on a device.

    See `Tables` for what each method promises.
    """

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def distinct_ids(self, keys_BF: Int64s, event_time_ms_B: Int64s | None = None) -> DistinctIds: ...

    def gather(self, ids: DistinctIds) -> Any: ...

    def update(self, ids: DistinctIds, grad_UV: Any, event_time_ms_B: Int64s) -> Int64s: ...

    def expire(self, now_ms: int) -> Int64s: ...

    def lookup(self, keys_K: Int64s) -> Float32s: ...

    def squares(self, keys_K: Int64s) -> Float32s: ...

    def keys(self) -> Int64s: ...

    def state(self) -> State: ...

    def rest(self) -> State: ...

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]: ...

    def settle(self) -> None: ...

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None: ...


class DensePart(Protocol):
    """The dense part of a model, on top of the tables. Call `forward`, then `backward`, then perhaps `update`.

    Values and gradients of rows are arrays, or tensors where the rows are on a device: as `Store` gives and takes them.
    """

    def forward(self, values_UV: Any, ids: DistinctIds, numeric_BD: Float32s) -> Float32s:
        """Return the log-odds of each task, float32 [B, T], from the values of the batch's distinct ids."""

    def backward(self, grad_BT: Float32s) -> tuple[Any, Norms]:
        """Return the gradients of the distinct ids, float32 [U, V], and the norms."""

    def update(self, samples: int) -> None:
        """Apply the gradients that `backward` kept, as a mean over so many samples."""

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the weights by name."""

    def state(self) -> State:
        """Return copies of weights, moments and step."""

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
