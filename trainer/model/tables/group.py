"""Tables of several widths and optimizers, with the methods of one `Table`, by slot.

Slots of equal width and optimizer share one `Table`. Values and gradients are as wide as the widest; what a slot does
not have is 0 on the way out and left out on the way in. An id is looked up in every table when its slot is not known
(`lookup`), so slots that share ids must agree.

Axes: B samples, F slots, U distinct ids of a batch (see `DistinctIds`), K keys, V values of the widest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.trainer.model.tables.admission import Admission
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, Columns, below
from headrace.trainer.model.tables.distinct_ids import DistinctIds, distinct
from headrace.trainer.model.tables.optimizers import Optimizer
from headrace.trainer.model.tables.row_index import Float32s, Int64s, RowIndex
from headrace.trainer.model.tables.table import State, Table, initial_values


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
        self._counts_sightings = admission is not None and admission.after > 1

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(table.nbytes for table in self.tables)

    def distinct_ids(self, keys_BF: Int64s, event_time_ms_B: Int64s | None = None) -> DistinctIds:
        """Return the distinct ids of a batch with their rows, making rows that are due; see `Table.rows_for`."""
        self._check(keys_BF)
        if self._counts_sightings:
            rows_BF = np.empty(keys_BF.shape, np.int64)
            for table, columns in zip(self.tables, self.columns, strict=True):
                rows_BF[:, columns] = table.rows_for(keys_BF[:, columns], event_time_ms_B)
            keys_U, index_FB, begin_F = distinct(keys_BF, rows_BF >= 0)
            rows_U = np.empty(len(keys_U), np.int64)
            rows_U[index_FB] = rows_BF.T
            return DistinctIds(keys_U, rows_U, index_FB, begin_F)
        keys_U, index_FB, begin_F = distinct(keys_BF)
        ids = DistinctIds(keys_U, np.empty(len(keys_U), np.int64), index_FB, begin_F)
        for table, own_K in self._parts(ids):
            ids.rows_U[own_K] = table.rows_for(keys_U[own_K], event_time_ms_B)
        return ids

    def gather(self, ids: DistinctIds) -> Float32s:
        """Return a copy of the values of each distinct id: float32 [U, V]; see `Table.gather`."""
        if len(self.tables) == 1:
            return self.tables[0].gather(ids.rows_U, ids.keys_U)
        out_UV = np.zeros((len(ids.keys_U), 1 + self.dim), np.float32)
        for table, own_K in self._parts(ids):
            out_UV[own_K, : 1 + table.dim] = table.gather(ids.rows_U[own_K], ids.keys_U[own_K])
        return out_UV

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of each key: float32 [K, V], the widest row's initial ones where it has none.

        A caller that knows a key's slot masks what that slot does not have: `masked`.
        """
        if len(self.tables) == 1:
            return self.tables[0].lookup(keys_K)
        out_KV = initial_values(keys_K, dim=self.dim, seed=self.seed, scale=self.scale)
        for table in self.tables:
            here_K = np.flatnonzero(table.index.find(keys_K) >= 0)
            out_KV[here_K] = 0
            out_KV[here_K, : 1 + table.dim] = table.lookup(keys_K[here_K])
        return out_KV

    def squares(self, keys_K: Int64s) -> Float32s:
        """Return the sum of squares of each key's linear weight: float32 [K]; see `Table.squares`."""
        out_K = self.tables[0].squares(keys_K)
        for table in self.tables[1:]:
            here_K = np.flatnonzero(table.index.find(keys_K) >= 0)
            out_K[here_K] = table.squares(keys_K[here_K])
        return out_K

    def masked(self, values_BFV: Float32s) -> Float32s:
        """Set to 0, in place, what a slot does not have; return the same array."""
        for table, columns in zip(self.tables, self.columns, strict=True):
            if table.dim < self.dim:
                values_BFV[:, columns, 1 + table.dim :] = 0
        return values_BFV

    def update(self, ids: DistinctIds, grad_UV: Float32s, event_time_ms_B: Int64s) -> Int64s:
        """Apply one step and return the keys that learnt, each once a table; see `Table.update`."""
        touched = []
        for table, own_K in self._parts(ids):
            rows_K = table.update(ids.rows_U[own_K], grad_UV[own_K, : 1 + table.dim], event_time_ms_B)
            touched.append(table.keys_of(rows_K))
        return np.concatenate(touched)

    def expire(self, now_ms: int) -> Int64s:
        """Return the keys that were forgotten since the last call; see `Table.expire`."""
        return np.concatenate([table.expire(now_ms) for table in self.tables])

    def keys(self) -> Int64s:
        """Return all keys that have a row, table by table."""
        return np.concatenate([table.keys() for table in self.tables])

    def state(self) -> State:
        """Return `Table.state` of each table, its names behind the table's number."""
        return {f"{n}.{name}": array for n, table in enumerate(self.tables) for name, array in table.state().items()}

    def rest(self) -> State:
        """Return `Table.rest` of each table, its names behind the table's number."""
        return {f"{n}.{name}": array for n, table in enumerate(self.tables) for name, array in table.rest().items()}

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """Return `Table.indexes` of each table, likewise."""
        return {f"{n}.{name}": each for n, table in enumerate(self.tables) for name, each in table.indexes().items()}

    def settle(self) -> None:
        """Bring all rows to where `indexes` has them: they are there."""

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """Replace everything by what `state` returned; `rows` as `Table.load`, by the names of `indexes`."""
        for number, table in enumerate(self.tables):
            prefix = f"{number}."
            table.load(below(prefix, state), below(prefix, rows))

    def _parts(self, ids: DistinctIds) -> Iterator[tuple[Table, Int64s | slice]]:
        """Yield each table and where in U its ids are."""
        if len(self.tables) == 1:
            yield self.tables[0], slice(None)
            return
        for table, columns in zip(self.tables, self.columns, strict=True):
            yield table, ids.of(columns)

    def _check(self, keys_BF: Int64s) -> None:
        if keys_BF.size and keys_BF.shape[1:] != (self.slots,):
            raise ConfigRejected(f"an array of shape {keys_BF.shape} reached tables of {self.slots} slots.")
