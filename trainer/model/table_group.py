"""Tables of several widths and optimizers behind one face: that of `Table`, by slot.

Slots of equal width and optimizer share one `Table`. Values and gradients are as wide as the widest; what a slot does
not have is 0 on the way out and left out on the way in. A row's number says its table too: number % G is the table.
An id is looked up in every table when its slot is not known (`lookup`), so slots that share ids must agree.

Axes: B samples, F slots, K keys, G tables, V values of the widest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.trainer.model.admission import Admission
from headrace.trainer.model.row_index import Float32s, Int64s
from headrace.trainer.model.table_optimizers import Optimizer
from headrace.trainer.model.tables import State, Table, initial_values


@dataclass(frozen=True)
class SlotTable:
    """How the rows of one slot are."""

    dim: int
    optimizer: Optimizer


class Tables:
    """The rows of all slots. Not thread-safe; see `Table` for what each method promises."""

    def __init__(
        self,
        slots: Sequence[SlotTable],
        *,
        seed: int,
        scale: float,
        admission: Admission | None = None,
        expire_after_ms: int = 0,
    ) -> None:
        """Make empty ones; `slots` has one entry a slot, in order."""
        if not slots:
            slots = [SlotTable(0, Optimizer())]
        self.kinds = tuple(dict.fromkeys(slots))
        self.seed, self.scale = seed, scale
        self.dim = max(kind.dim for kind in self.kinds)
        self.columns = [np.array([f for f, s in enumerate(slots) if s == kind], np.int64) for kind in self.kinds]
        self.tables = [
            Table(
                dim=kind.dim,
                seed=seed,
                scale=scale,
                optimizer=kind.optimizer,
                admission=admission,
                expire_after_ms=expire_after_ms,
            )
            for kind in self.kinds
        ]
        self.slots = len(slots)

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(table.nbytes for table in self.tables)

    def rows_for(self, keys_BF: Int64s, event_time_ms_B: Int64s | None = None) -> Int64s:
        """Return the row of each key, making those that are due: int64 [B, F]; see `Table.rows_for`."""
        if len(self.tables) == 1:
            return self.tables[0].rows_for(keys_BF, event_time_ms_B)
        self._check(keys_BF)
        rows_BF = np.empty(keys_BF.shape, np.int64)
        for number, (table, columns) in enumerate(zip(self.tables, self.columns, strict=True)):
            found = table.rows_for(keys_BF[:, columns], event_time_ms_B)
            rows_BF[:, columns] = np.where(found < 0, -1, found * len(self.tables) + number)
        return rows_BF

    def gather(self, rows_BF: Int64s, keys_BF: Int64s | None = None) -> Float32s:
        """Return a copy of the rows' values: float32 [B, F, V]; see `Table.gather`."""
        if len(self.tables) == 1:
            return self.tables[0].gather(rows_BF, keys_BF)
        self._check(rows_BF)
        out_BFV = np.zeros((*rows_BF.shape, 1 + self.dim), np.float32)
        for table, columns in zip(self.tables, self.columns, strict=True):
            keys = None if keys_BF is None else keys_BF[:, columns]
            # Floor division keeps -1.
            out_BFV[:, columns, : 1 + table.dim] = table.gather(rows_BF[:, columns] // len(self.tables), keys)
        return out_BFV

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of each key: float32 [K, V], the widest row's initial ones where it has none.

        Who knows a key's slot masks what that slot does not have: `masked`.
        """
        if len(self.tables) == 1:
            return self.tables[0].lookup(keys_K)
        out_KV = initial_values(keys_K, dim=self.dim, seed=self.seed, scale=self.scale)
        for table in self.tables:
            here_K = np.flatnonzero(table.index.find(keys_K) >= 0)
            out_KV[here_K] = 0
            out_KV[here_K, : 1 + table.dim] = table.lookup(keys_K[here_K])
        return out_KV

    def masked(self, values_BFV: Float32s) -> Float32s:
        """Set to 0, in place, what a slot does not have; return the same array."""
        for table, columns in zip(self.tables, self.columns, strict=True):
            if table.dim < self.dim:
                values_BFV[:, columns, 1 + table.dim :] = 0
        return values_BFV

    def update(self, rows_BF: Int64s, grad_BFV: Float32s, event_time_ms_B: Int64s) -> Int64s:
        """Apply one step and return the touched rows, table by table; see `Table.update`."""
        if len(self.tables) == 1:
            return self.tables[0].update(rows_BF, grad_BFV, event_time_ms_B)
        self._check(rows_BF)
        touched = []
        for number, (table, columns) in enumerate(zip(self.tables, self.columns, strict=True)):
            part = grad_BFV[:, columns, : 1 + table.dim]
            rows_K = table.update(rows_BF[:, columns] // len(self.tables), part, event_time_ms_B)
            touched.append(rows_K * len(self.tables) + number)
        return np.concatenate(touched)

    def expire(self, now_ms: int) -> Int64s:
        """Return the keys that were forgotten since the last call; see `Table.expire`."""
        return np.concatenate([table.expire(now_ms) for table in self.tables])

    def keys_of(self, rows_K: Int64s) -> Int64s:
        """Return the keys of rows."""
        keys_K = np.empty(len(rows_K), np.int64)
        for number, table in enumerate(self.tables):
            here_K = rows_K % len(self.tables) == number
            keys_K[here_K] = table.keys_of(rows_K[here_K] // len(self.tables))
        return keys_K

    def keys(self) -> Int64s:
        """Return all keys that have a row, table by table."""
        return np.concatenate([table.keys() for table in self.tables])

    def state(self) -> State:
        """Return `Table.state` of each table, its names behind the table's number."""
        return {f"{n}.{name}": array for n, table in enumerate(self.tables) for name, array in table.state().items()}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        for number, table in enumerate(self.tables):
            prefix = f"{number}."
            table.load({name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)})

    def _check(self, array_BF: npt.NDArray[np.generic]) -> None:
        if array_BF.shape[1:] != (self.slots,):
            raise ConfigRejected(f"an array of shape {array_BF.shape} reached tables of {self.slots} slots.")
