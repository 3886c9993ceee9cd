"""Feedback that came before its impression: waits in order of arrival, up to a time and a number. Pure, compiled.

Legend: C capacity in rows, K kinds of feedback, T tasks, N rows of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from headrace.kernels.arrays import I64s, Int, U8s, U64s
from headrace.kernels.ring_table import (
    FIRST,
    NEXT,
    ROW,
    USED,
    Ring,
    drop_first,
    find,
    grown,
    new_ring,
    push,
    reindex_rows,
    remove,
    row_of,
    seq_of,
    stretch,
)
from headrace.stream.join.pending import ORPHANS, PENDING

TIME_MS, SINCE_MS, BEFORE = 0, 1, 2
"""Columns of `facts_C3`: when it happened, the watermark when it was read, the sequence number before of its key."""
NO_TIME, NONE = -1, -1


class EarlyArrays(NamedTuple):
    """The arrays, for compiled callers. `kinds_C` is the feedback's kind, or `GONE`; `tasks_K` the tasks of a kind."""

    ring: Ring
    facts_C3: I64s
    kinds_C: U8s
    tasks_K: U8s


GONE = 255


class EarlyFeedback:
    """The table of one partition, with the texts of the ids and the values beside it."""

    def __init__(self, tasks_K: U8s, wait_ms: int) -> None:
        self.wait_ms = wait_ms
        self.tasks_K = tasks_K
        self.ids: dict[int, str] = {}
        """Sequence number to feedback id, ascending."""
        self.values: dict[int, float] = {}
        """The same to its value, where it has one."""
        self._clear(1_024, 0)

    def _clear(self, capacity: int, first: int) -> None:
        columns = np.empty((capacity, 3), np.int64), np.full(capacity, GONE, np.uint8)
        self.arrays = EarlyArrays(new_ring(capacity, first), *columns, self.tasks_K)

    def __len__(self) -> int:
        """How many wait."""
        return int(self.arrays.ring.head[USED])

    def declare(self, tasks_K: U8s) -> None:
        """Know more kinds and tasks: `tasks_K` only grows, and the tasks of what waits have been counted."""
        self.tasks_K = tasks_K
        self.arrays = self.arrays._replace(tasks_K=tasks_K)

    def waiting_of(self, kind: int) -> int:
        """Return how many of a kind wait."""
        ring, _, kinds_C, _ = self.arrays
        return int(np.count_nonzero(stretch(ring, kinds_C, int(ring.head[FIRST]), int(ring.head[NEXT])) == kind))

    def reserve(self, more: int) -> None:
        """Make room for `more`: required before compiled code lets any wait."""
        ring, facts_C3, kinds_C, tasks_K = self.arrays
        if ring.rows + more > len(kinds_C):
            ring, (facts_C3, kinds_C) = grown(ring, [facts_C3, kinds_C], more)
            self.arrays = EarlyArrays(ring, facts_C3, kinds_C, tasks_K)

    def advance(self, watermark_ms: int, counts_T9: I64s) -> None:
        """Make orphans of what waited long enough; what came before the first watermark waits from that one on."""
        _advance(self.arrays, watermark_ms, self.wait_ms, counts_T9)

    def keep(self, seq: int, feedback_id: str, value: float | None) -> None:
        """Keep what a sample of it will say."""
        self.ids[seq] = feedback_id
        if value is not None:
            self.values[seq] = value

    def forget(self) -> None:
        """Drop what was kept of rows that have left the front, once samples have been made of what was matched."""
        first = self.arrays.ring.head[FIRST]
        while self.ids and (seq := next(iter(self.ids))) < first:
            del self.ids[seq]
            self.values.pop(seq, None)

    def rows(self) -> tuple[int, U64s, I64s, U8s]:
        """Return the first sequence number and copies of all rows."""
        ring, facts_C3, kinds_C, _ = self.arrays
        span = int(ring.head[FIRST]), int(ring.head[NEXT])
        return span[0], *(stretch(ring, column, *span) for column in (ring.keys_C2, facts_C3, kinds_C))

    def load(
        self, first: int, keys_N2: U64s, facts_N3: I64s, kinds_N: U8s, ids: dict[int, str], values: dict[int, float]
    ) -> None:
        """Take over what `rows` gave, ids and values."""
        rows = len(kinds_N)
        self._clear(max(1_024, rows + rows // 4), first)
        ring, facts_C3, kinds_C, _ = self.arrays
        ring.keys_C2[:rows], facts_C3[:rows], kinds_C[:rows] = keys_N2, facts_N3, kinds_N
        ring.head[NEXT] = first + rows
        ring.head[USED] = np.count_nonzero(kinds_N != GONE)
        reindex_rows(ring, (kinds_C != GONE).astype(np.uint8))
        self.ids, self.values = ids, values


@numba.njit(cache=True)
def _count(early: EarlyArrays, kind: Int, counts_T9: I64s, pending: Int, orphans: Int) -> None:
    for task in range(counts_T9.shape[0]):
        if (early.tasks_K[kind] >> task) & 1:
            counts_T9[task, PENDING] += pending
            counts_T9[task, ORPHANS] += orphans


@numba.njit(cache=True)
def _orphan_first(early: EarlyArrays, counts_T9: I64s) -> None:
    head = early.ring.head
    kind = np.int64(early.kinds_C[head[ROW]])
    if kind != GONE:
        _count(early, kind, counts_T9, -1, 1)
        head[USED] -= 1
        early.kinds_C[head[ROW]] = GONE
    drop_first(early.ring)


@numba.njit(cache=True)
def _advance(early: EarlyArrays, watermark_ms: Int, wait_ms: Int, counts_T9: I64s) -> None:
    head = early.ring.head
    if head[FIRST] < head[NEXT] and early.facts_C3[head[ROW], SINCE_MS] == NO_TIME:
        for seq in range(head[FIRST], head[NEXT]):
            early.facts_C3[row_of(early.ring, seq), SINCE_MS] = watermark_ms
    while head[FIRST] < head[NEXT]:
        kind = np.int64(early.kinds_C[head[ROW]])
        if kind != GONE and early.facts_C3[head[ROW], SINCE_MS] + wait_ms > watermark_ms:
            break
        _orphan_first(early, counts_T9)


@numba.njit(cache=True)
def wait(
    early: EarlyArrays, low: np.uint64, high: np.uint64, kind: Int, time_ms: Int, since_ms: Int, most: Int,
    counts_T9: I64s,
) -> Int:  # fmt: skip
    """Let feedback wait and return its sequence number; beyond `most` the oldest becomes an orphan."""
    while early.ring.head[USED] >= most:
        _orphan_first(early, counts_T9)
    before = find(early.ring, low, high)
    seq = early.ring.head[NEXT]
    row = push(early.ring, low, high)
    early.facts_C3[row, TIME_MS] = time_ms
    early.facts_C3[row, SINCE_MS] = since_ms
    early.facts_C3[row, BEFORE] = NONE
    if before >= 0:
        early.facts_C3[row, BEFORE] = seq_of(early.ring, before)
    early.kinds_C[row] = kind
    early.ring.head[USED] += 1
    _count(early, kind, counts_T9, 1, 0)
    return seq


@numba.njit(cache=True)
def take_all_of(early: EarlyArrays, low: np.uint64, high: np.uint64, counts_T9: I64s) -> I64s:
    """Return (sequence number, kind) of what waits for a key, by (kind, arrival): int64 [N, 2]; it waits no longer."""
    newest = find(early.ring, low, high)
    if newest < 0:
        return np.empty((0, 2), np.int64)
    head = early.ring.head
    seq = seq_of(early.ring, newest)
    found = np.empty(4, np.int64)
    count = 0
    while seq >= head[FIRST]:
        row = row_of(early.ring, seq)
        if count == found.shape[0]:
            found = np.append(found, found)
        found[count] = seq
        count += 1
        seq = early.facts_C3[row, BEFORE]
    remove(early.ring, newest)
    out = np.empty((count, 2), np.int64)
    at = 0
    for kind in range(early.tasks_K.shape[0]):
        for i in range(count - 1, -1, -1):
            row = row_of(early.ring, found[i])
            if early.kinds_C[row] == kind:
                out[at, 0], out[at, 1] = found[i], kind
                at += 1
    for i in range(at):
        _count(early, out[i, 1], counts_T9, -1, 0)
        head[USED] -= 1
        early.kinds_C[row_of(early.ring, out[i, 0])] = GONE
    return out[:at]
