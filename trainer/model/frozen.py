"""A learner as it was between two of its steps, read by another thread while it goes on learning.

A checkpoint and a snapshot are made from one. `Watch.freeze` copies what is small; rows are read where they lie, and
mended (`tables.changes`).

Axes: K keys, V = 1 + dim values of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.snapshot import Weights
from headrace.trainer.model.learner import TableLearner
from headrace.trainer.model.parts import State
from headrace.trainer.model.tables.changes import Changes, FrozenRows
from headrace.trainer.model.tables.columns import KEYS, Columns, live
from headrace.trainer.model.tables.row_index import Int64s

TABLE = "table."


class FrozenTable:
    """The rows of one index as they were, as columns."""

    def __init__(self, rows: FrozenRows, columns: Columns) -> None:
        self.rows, self._columns = rows, columns

    def page(self, page: int) -> State:
        """Return the columns of a page, rows that are free among them; see `Columns.of`."""
        return self._columns.of(self.rows.page(page))

    def take(self, rows_K: Int64s) -> State:
        """Return the columns of rows that ascend, likewise."""
        return self._columns.of(self.rows.take(rows_K))

    def live_pages(self) -> Iterator[State]:
        """Yield the columns of each page without the rows that are free."""
        for page in range(self.rows.pages):
            yield live(self.page(page))


class Frozen:
    """A learner as it was. For one thread, until `close`."""

    def __init__(
        self, learner: TableLearner, rest: State, tables: dict[str, FrozenTable], changes: list[Changes]
    ) -> None:
        self.rest = rest
        """What `TableLearner.state` has besides rows."""
        self.tables = tables
        """By what the names of their columns begin with."""
        self.step = learner.step
        self.dense: dict[str, npt.NDArray[np.float32]] = learner.dense()
        self.dim = learner.recipe.row_dim
        self._felt = learner.felt()
        self._changes = changes

    def state(self) -> State:
        """Return what `TableLearner.state` gave then."""
        out = dict(self.rest)
        for prefix, table in self.tables.items():
            pages = list(table.live_pages()) or [table.take(np.empty(0, np.int64))]
            out |= {prefix + name: np.concatenate([page[name] for page in pages]) for name in pages[0]}
        return out

    def weights(self) -> Weights:
        """Return what `TableLearner.weights` gave then."""
        keys: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        values = [np.empty((0, 1 + self.dim), np.float32)]
        own = [table for prefix, table in self.tables.items() if prefix.count(".") == TABLE.count(".") + 1]
        for table in own:
            for page in table.live_pages():
                values_KV = page["values"].astype(np.float32, copy=False)
                missing = 1 + self.dim - values_KV.shape[1]
                keys.append(page[KEYS].astype(np.int64, copy=False))
                values.append(np.pad(values_KV, ((0, 0), (0, missing))) if missing else values_KV)
        keys_K, values_KV = np.concatenate(keys), np.concatenate(values)
        if len(own) > 1:
            # An id that several tables have is looked up in the last of them.
            _, last_K, which_K = np.unique(keys_K[::-1], return_index=True, return_inverse=True)
            values_KV = values_KV[(len(keys_K) - 1 - last_K)[which_K][::-1]]
        return self._with_felt(keys_K, values_KV)

    def _with_felt(self, keys_K: Int64s, values_KV: npt.NDArray[np.float32]) -> Weights:
        felt_K, felt_KV = self._felt
        if not len(felt_K):
            return Weights(keys_K, values_KV, self.dense)
        order_K = np.argsort(felt_K)
        at_K = np.minimum(np.searchsorted(felt_K, keys_K, sorter=order_K), len(felt_K) - 1)
        is_felt_K = felt_K[order_K[at_K]] == keys_K
        values_KV[is_felt_K] = felt_KV[order_K[at_K[is_felt_K]]]
        more_K = np.flatnonzero(~np.isin(felt_K, keys_K))
        more_K = more_K[np.argsort(felt_K[more_K])]
        return Weights(
            np.concatenate([keys_K, felt_K[more_K]]), np.concatenate([values_KV, felt_KV[more_K]]), self.dense
        )

    def close(self) -> None:
        """Let the learner go on without saving rows; nothing is read after it. From any thread."""
        for changes in self._changes:
            changes.close()


class Watch:
    """Hears of the changes of one learner, and freezes it. For the thread that learns."""

    def __init__(self, learner: TableLearner, *, between: bool) -> None:
        """`between` also notes which rows change between two freezes; without it, hearing costs nothing meanwhile."""
        self._learner, self._between = learner, between
        self._indexes = learner.table.indexes()
        self._changes = {name: Changes(index) for name, (index, _) in self._indexes.items()}
        if between:
            for name, (index, _) in self._indexes.items():
                index.listeners.append(self._changes[name])

    @property
    def saved_bytes(self) -> int:
        """Bytes of rows that are saved for the view that is open."""
        return sum(changes.saved_bytes for changes in self._changes.values())

    def freeze(self) -> Frozen:
        """Return the learner as it is now, between two steps. One view at a time: the one before is closed.

        Raises `InvariantBroken` where the learner was loaded anew since.
        """
        learner = self._learner
        learner.table.settle()
        for name, (index, _) in learner.table.indexes().items():
            if index is not self._indexes[name][0]:
                raise InvariantBroken("the learner was loaded anew after its changes were watched; watch it anew.")
            if not self._between and self._changes[name] not in index.listeners:
                index.listeners.append(self._changes[name])
        tables = {
            TABLE + name: FrozenTable(self._changes[name].freeze(), columns)
            for name, (_, columns) in self._indexes.items()
        }
        return Frozen(learner, learner.rest(), tables, list(self._changes.values()))

    def end(self) -> None:
        """Hear no more, until the next `freeze`; the view is closed."""
        for name, (index, _) in self._indexes.items():
            self._changes[name].close()
            if self._changes[name] in index.listeners:
                index.listeners.remove(self._changes[name])
