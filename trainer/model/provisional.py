"""What positives do to scores while they wait for the negatives of their time (`held`). NumPy, pure.

A positive that waits is felt at once, though it is not learnt yet: the linear weight of each of its ids is served
higher by

    lr sqrt(m / (m + 1)) / sqrt(s + 1)

where m positives wait that have the id, and s is the sum of squares in the id's row (Adagrad's, FTRL's n; 0 with Adam).
That is about the step that one of them makes. It is never more than `lr_table`, and next to nothing for an id that was
learnt often: without the negatives of the same time, many positives tell which ids are common, not which are good.

What that adds to the log-odds on average is taken off again (`take_off`), so that the mean of what is said stays. The
average is over the newest of those that wait, of what the others add to each.

What is learnt never sees any of it, so that it cannot add up, and it goes when the positive is learnt. It follows from
what waits and from the rows: it is no part of a model's state, and equal states give equal bits.

Axes: B samples, F slots, N = B * F, K keys, C linear weights of a row, V values of a row, T tasks.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.held import HELD_MAX
from headrace.trainer.model.moments import TARGETS
from headrace.trainer.model.objectives import HUBER, SQUARED, TWEEDIE, WEIGHTED, kinds_of
from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.row_index import HEADER_WORDS, Int32s, RowIndex
from headrace.trainer.model.tables.table import Int64s

NEWEST = 128
"""Samples that wait, over which the average is taken."""


class Rows(Protocol):
    """The tables, on the host or on a device."""

    def squares(self, keys_K: Int64s) -> Float32s:
        """Return the sum of squares of each key's linear weight; infinity where a key is to have no row yet."""


class Provisional:
    """How many positives wait that have an id, and what that adds to its linear weights.

    A `logistic` model has a linear weight a task, and a positive raises that of its own; any other has one. Tasks that
    learn a value of either sign (`squared`, `huber`) raise nothing: a value may be below the mean.
    """

    def __init__(self, recipe: Recipe, *, slots: int) -> None:
        tasks = len(recipe.heads)
        self._lr = np.float32(recipe.lr_table)
        self._column_T = np.arange(tasks) if recipe.model == "logistic" else np.zeros(tasks, np.int64)
        self._is_felt_T = ~np.isin(kinds_of(recipe), (SQUARED, HUBER))
        self._columns = int(self._column_T.max()) + 1
        # Twice what can wait: a batch is added before those that it frees are taken off.
        self._rows_max = 2 * HELD_MAX * max(slots, 1)
        self._index = RowIndex(words=self._columns, rows_max=self._rows_max)
        self._kind_T = kinds_of(recipe)
        self._newest: Batch | None = None

    def __len__(self) -> int:
        """Return how many ids are felt."""
        return len(self._index)

    def begin(self, waiting: Batch) -> None:
        """Begin anew with what waits."""
        self._index = RowIndex(words=self._columns, rows_max=self._rows_max)
        self._add(waiting)
        self._keep_newest(waiting)

    def move(self, waiting: Batch, freed: Batch, held: Batch) -> Int64s:
        """Take in what waits from now on and what waits no longer; return the keys whose values changed.

        Args:
            held: all that waits then, in the order in which it came.
        """
        self._keep_newest(held)
        changed = [self._add(waiting), self._drop(freed)]
        return np.unique(np.concatenate(changed))

    def keys(self) -> Int64s:
        """Return the ids that are felt."""
        return self._index.keys_R[self._index.live_rows()]

    def put_on(self, keys_K: Int64s, values_KV: Float32s, rows: Rows) -> None:
        """Add to the linear weights of the ids that are felt, in place."""
        if not len(self):
            return
        at_K = self._index.find(keys_K)
        here_K = np.flatnonzero(at_K >= 0)
        values_KV[here_K, : self._columns] += self._raised(keys_K[here_K], self._counts[at_K[here_K]], rows)

    def take_off(self, dense: dict[str, Float32s], rows: Rows) -> None:
        """Take off, in place of the copies in `dense`, what is added to each task's log-odds, or z, on average."""
        mean_T, targets_2T = self._mean(rows), dense[TARGETS]
        if "mix" in dense:
            mean_T = mean_T * dense["mix"][0]
        grown_T = np.isin(self._kind_T, (WEIGHTED, TWEEDIE))
        targets_2T[0] = np.where(grown_T, targets_2T[0] * np.exp(-mean_T), targets_2T[0] - mean_T * targets_2T[1])

    def sums(self, slots_BF: Int64s, rows: Rows) -> Float32s:
        """Return what is added to the log-odds of samples of a linear model of one task, the average taken off: float32
        [B]."""
        keys_N = np.ascontiguousarray(slots_BF).reshape(-1)
        out_NC = np.zeros((len(keys_N), self._columns), np.float32)
        self.put_on(keys_N, out_NC, rows)
        out_B: Float32s = out_NC[:, 0].reshape(slots_BF.shape).sum(axis=1) - self._mean(rows)[0]
        return out_B

    def _mean(self, rows: Rows) -> Float32s:
        """Return what the others add to one of the newest that wait, on average: float32 [T]."""
        newest = self._newest
        if newest is None or not len(newest):
            return np.zeros(len(self._column_T), np.float32)
        keys_N, column_N = self._ids(newest)
        count_NC = self._counts[self._index.find(keys_N)]
        count_NC[np.arange(len(keys_N)), column_N] -= 1
        mean_C = self._raised(keys_N, count_NC, rows).sum(axis=0) / np.float32(len(newest))
        mean_T: Float32s = mean_C[self._column_T]
        return mean_T

    def _raised(self, keys_K: Int64s, count_KC: Int32s, rows: Rows) -> Float32s:
        """Return what so many positives add to the linear weights of ids: float32 [K, C]."""
        step_K = self._lr / np.sqrt(rows.squares(keys_K) + np.float32(1))
        waiting_KC = count_KC.astype(np.float32)
        out_KC: Float32s = step_K[:, None] * np.sqrt(waiting_KC / (waiting_KC + np.float32(1)))
        return out_KC

    def _keep_newest(self, held: Batch) -> None:
        newest = held.rows(np.arange(max(len(held) - NEWEST, 0), len(held)))
        self._newest = newest.where(self._is_felt_T[newest.task_B])

    @property
    def _counts(self) -> Int32s:
        """Positives that wait, by row and column, a view."""
        return self._index.arrays.words_RW[:, HEADER_WORDS : HEADER_WORDS + self._columns]

    def _ids(self, batch: Batch) -> tuple[Int64s, Int64s]:
        """Return the ids of the samples that are felt, one by one, and the columns that they raise."""
        batch = batch.where(self._is_felt_T[batch.task_B])
        keys_N = np.ascontiguousarray(batch.slots_BF).reshape(-1)
        column_N = np.repeat(self._column_T[batch.task_B], batch.slots_BF.shape[1])
        return keys_N[keys_N != PAD], column_N[keys_N != PAD]

    def _add(self, batch: Batch) -> Int64s:
        keys_N, column_N = self._ids(batch)
        rows_N, fresh_K = self._index.insert(keys_N)
        self._counts[fresh_K] = 0
        np.add.at(self._counts, (rows_N, column_N), 1)
        return keys_N

    def _drop(self, batch: Batch) -> Int64s:
        keys_N, column_N = self._ids(batch)
        rows_N = self._index.find(keys_N)
        np.subtract.at(self._counts, (rows_N, column_N), 1)
        self._index.remove(keys_N[~self._counts[rows_N].any(axis=1)])
        return keys_N
