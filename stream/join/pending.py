"""Impressions that wait for feedback, found by key, closed by time: 55 bytes each at most, 44 when full. Compiled.

Rows lie in order of arrival; a row's sequence number is also where its payload is found. Lists of 128 ms hold the rows
by the time that their windows begin; each task has a heap of the lists that it has not yet passed. A row is dropped
when the longest window has passed its list, so what is answered early stays, without its key, until then.

Legend: C capacity in rows, T tasks, B lists, H places of a heap, L labels of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from headrace.kernels.arrays import I32s, I64s, Int, U8s, U64s
from headrace.kernels.open_addressing import BY_PLACE, EMPTY, delete_at, move_places, place_of
from headrace.kernels.ring_table import (
    FIRST,
    NEXT,
    ROW,
    USED,
    Ring,
    drop_first,
    grown,
    insert,
    new_ring,
    push,
    remove,
    row_of,
    seq_of,
    stretch,
)
from headrace.stream.join.recent_keys import RecentArrays, remember

LIST_BITS = 7
OPEN, POSITIVE, LINKED = 0, 1, 2
"""Columns of `bits_C3`: tasks (bits) that wait, tasks that became positive, whether the row is in a list."""
EVENT_MS, BASE_MS = 0, 1
"""Columns of `times_C2`: the impression's time, and when its windows begin."""
IMPRESSIONS, POSITIVES, NEGATIVES, WAITING, MATCHED, DUPLICATE, LATE, ORPHANS, PENDING = range(9)
"""Columns of `counts_T9`."""


class PendingArrays(NamedTuple):
    """The arrays, for compiled callers."""

    ring: Ring
    times_C2: I64s
    bits_C3: U8s
    next_C: I32s
    lists_B2: U64s
    first_B: I32s
    heaps_TH: I64s
    sizes_T: I64s
    counts_T9: I64s
    opens: int
    lates: int


class Pending:
    """The table of what one partition read under the same rules.

    Args:
        windows_ms: after how long each task closes.
        opens: the tasks (bits) that an impression waits for; all by default.
        lates: those of them that wait for late feedback behind another task's window, and count nothing.
        counts_T9: the partition's counts, which all its tables share.
        first: sequence number of the first impression.
    """

    def __init__(
        self, windows_ms: list[int], *, opens: int, lates: int = 0, counts_T9: I64s | None = None, first: int = 0
    ) -> None:
        self.windows_ms, self.opens, self.lates = windows_ms, opens, lates
        tasks = len(windows_ms)
        # The longest window passes a list last.
        self.order = sorted(range(tasks), key=lambda task: windows_ms[task])
        self._clear(first, np.zeros((tasks, 9), np.int64) if counts_T9 is None else counts_T9)

    def _clear(self, first: int, counts_T9: I64s, rows: int = 1_024) -> None:
        tasks = len(self.windows_ms)
        self.arrays = PendingArrays(
            new_ring(rows, first),
            np.zeros((rows, 2), np.int64),
            np.zeros((rows, 3), np.uint8),
            np.empty(rows, np.int32),
            np.empty((256, 2), np.uint64),
            np.full(256, EMPTY, np.int32),
            np.empty((tasks, 128), np.int64),
            np.zeros(tasks + 1, np.int64),
            counts_T9,
            self.opens,
            self.lates,
        )

    def share(self, counts_T9: I64s) -> None:
        """Count in this array from now on."""
        self.arrays = self.arrays._replace(counts_T9=counts_T9)

    def __len__(self) -> int:
        """How many impressions wait for at least one task."""
        return int(self.arrays.ring.head[USED])

    @property
    def following(self) -> int:
        """The sequence number of the next impression."""
        return int(self.arrays.ring.head[NEXT])

    def reserve(self, more: int) -> None:
        """Make room for `more` impressions: required before compiled code admits any."""
        w = self.arrays
        columns = [w.times_C2, w.bits_C3, w.next_C]
        if w.ring.rows + more > len(w.ring.keys_C2):
            start, capacity = int(w.ring.head[ROW]), len(w.ring.keys_C2)
            # Nothing but `columns` holds the old ones meanwhile, so that of one column alone both live at once.
            none = (np.empty((0, 2), np.int64), np.empty((0, 3), np.uint8), np.empty(0, np.int32))
            w = self.arrays = w._replace(times_C2=none[0], bits_C3=none[1], next_C=none[2])
            ring, (times_C2, bits_C3, next_C) = grown(w.ring, columns, more)
            _renumber(next_C, w.first_B, start, capacity)
            self.arrays = w._replace(ring=ring, times_C2=times_C2, bits_C3=bits_C3, next_C=next_C)
        self._reserve_lists(more)

    def _reserve_lists(self, more: int) -> None:
        w = self.arrays
        known = int(w.sizes_T[-1])
        if known + more > len(w.first_B) // 2:
            places = 1 << int(2 * (known + more) - 1).bit_length()
            if places > len(w.first_B):
                lists_B2, first_B = np.empty((places, 2), np.uint64), np.full(places, EMPTY, np.int32)
                move_places(w.first_B, w.lists_B2, first_B, lists_B2)
                heaps_TH = np.empty((len(self.windows_ms), places), np.int64)
                heaps_TH[:, : w.heaps_TH.shape[1]] = w.heaps_TH
                self.arrays = w._replace(lists_B2=lists_B2, first_B=first_B, heaps_TH=heaps_TH)

    def expired(self, watermark_ms: int) -> tuple[I64s, I64s]:
        """Return sequence numbers and tasks of what the watermark closes, by (expiry, arrival, task). Resolves none."""
        found = [
            (task, _expired(self.arrays, task, watermark_ms - self.windows_ms[task], task == self.order[-1]))
            for task in self.order
        ]
        seq_L = np.concatenate([seqs for _, (seqs, _) in found])
        if not len(seq_L):
            return seq_L, seq_L
        task_L = np.concatenate([np.full(len(seqs), task, np.int64) for task, (seqs, _) in found])
        expiry_L = np.concatenate([bases + self.windows_ms[task] for task, (_, bases) in found])
        order_L = np.lexsort((task_L, seq_L, expiry_L))
        return seq_L[order_L], task_L[order_L]

    def close(self, seq_L: I64s, task_L: I64s, resolved: RecentArrays) -> None:
        """Make these negative, in order; `resolved` has room for them."""
        _close_all(self.arrays, seq_L, task_L, resolved)

    def bits(self, first: int, following: int) -> U8s:
        """Return a copy of which tasks are open and which positive: uint8 [N, 2]."""
        return np.ascontiguousarray(stretch(self.arrays.ring, self.arrays.bits_C3, first, following)[:, :LINKED])

    def rows(self, first: int, following: int) -> tuple[U64s, I64s]:
        """Return copies of keys and times with sequence numbers `first` <= s < `following`."""
        ring = self.arrays.ring
        return stretch(ring, ring.keys_C2, first, following), stretch(ring, self.arrays.times_C2, first, following)

    def begin(self, first: int, following: int) -> None:
        """Become a table of rows that wait for nothing, with these sequence numbers, to be filled by `restore`."""
        rows = following - first
        self._clear(first, self.arrays.counts_T9, max(1_024, rows + rows // 8))
        self.arrays.ring.head[NEXT] = following

    def restore(self, first: int, keys_N2: U64s, event_N: I64s, base_N: I64s, bits_N2: U8s) -> int:
        """Fill rows from sequence number `first` on; return how many (impression, task) pairs of them wait."""
        self._reserve_lists(len(event_N))
        return int(_restore(self.arrays, first, keys_N2, event_N, base_N, bits_N2))

    def let_go(self) -> None:
        """Drop rows from the front whose lists were passed."""
        _let_go(self.arrays)


@numba.njit(cache=True)
def _spread(number: Int) -> np.uint64:
    """Return bits of a list's number whose upper half differs between neighbours: 2**64 over the golden ratio."""
    return np.uint64(number) * np.uint64(0x9E3779B97F4A7C15)


@numba.njit(cache=True)
def _list_place(w: PendingArrays, number: Int) -> Int:
    return place_of(w.first_B, w.lists_B2, BY_PLACE, np.uint64(number), _spread(number))


@numba.njit(cache=True)
def _renumber(next_C: I32s, first_B: I32s, start: Int, capacity: Int) -> None:
    """Follow rows that moved to the front of a larger ring."""
    for links in (next_C, first_B):
        for at in range(links.shape[0]):
            if links[at] >= 0:
                ahead = links[at] - start
                links[at] = ahead + capacity if ahead < 0 else ahead


@numba.njit(cache=True)
def _push_heap(heap_H: I64s, size: Int, number: Int) -> None:
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if heap_H[parent] <= number:
            break
        heap_H[at] = heap_H[parent]
        at = parent
    heap_H[at] = number


@numba.njit(cache=True)
def _pop_heap(heap_H: I64s, size: Int) -> None:
    last = heap_H[size - 1]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size - 1:
            break
        if child + 1 < size - 1 and heap_H[child + 1] < heap_H[child]:
            child += 1
        if heap_H[child] >= last:
            break
        heap_H[at] = heap_H[child]
        at = child
    heap_H[at] = last


@numba.njit(cache=True)
def link(w: PendingArrays, row: Int) -> None:
    """Put a row into the list of its base time."""
    number = w.times_C2[row, BASE_MS] >> LIST_BITS
    place = _list_place(w, number)
    if w.first_B[place] == EMPTY:
        w.lists_B2[place, 0], w.lists_B2[place, 1] = np.uint64(number), _spread(number)
        w.sizes_T[-1] += 1
        for task in range(w.heaps_TH.shape[0]):
            _push_heap(w.heaps_TH[task], w.sizes_T[task], number)
            w.sizes_T[task] += 1
    w.next_C[row] = w.first_B[place]
    w.first_B[place] = row
    w.bits_C3[row, LINKED] = 1


@numba.njit(cache=True)
def admit(w: PendingArrays, low: np.uint64, high: np.uint64, event_time_ms: Int, base_ms: Int) -> Int:
    """Let an impression wait for its tasks and return its row; there must be room."""
    row = push(w.ring, low, high)
    w.times_C2[row, EVENT_MS] = event_time_ms
    w.times_C2[row, BASE_MS] = base_ms
    w.bits_C3[row, OPEN] = w.opens
    w.bits_C3[row, POSITIVE] = 0
    w.ring.head[USED] += 1
    link(w, row)
    for task in range(w.counts_T9.shape[0]):
        if ((w.opens & ~w.lates) >> task) & 1:
            w.counts_T9[task, IMPRESSIONS] += 1
            w.counts_T9[task, WAITING] += 1
    return row


@numba.njit(cache=True)
def resolve(w: PendingArrays, row: Int, task: Int, positive: bool, resolved: RecentArrays) -> None:
    """Close one task of a row; when it was the last, the row's key moves to `resolved`, which has room."""
    if not (w.lates >> task) & 1:
        w.counts_T9[task, WAITING] -= 1
        w.counts_T9[task, POSITIVES if positive else NEGATIVES] += 1
    if positive:
        w.bits_C3[row, POSITIVE] |= np.uint8(1 << task)
    w.bits_C3[row, OPEN] &= np.uint8(255 ^ (1 << task))
    if w.bits_C3[row, OPEN] == 0:
        w.ring.head[USED] -= 1
        remove(w.ring, row)
        remember(resolved, w.ring.keys_C2[row, 0], w.ring.keys_C2[row, 1], np.int64(w.bits_C3[row, POSITIVE]))


@numba.njit(cache=True)
def _expired(w: PendingArrays, task: Int, upto_ms: Int, longest: bool) -> tuple[I64s, I64s]:
    seqs_L, bases_L = np.empty(64, np.int64), np.empty(64, np.int64)
    count = 0
    heap_H = w.heaps_TH[task]
    while w.sizes_T[task] > 0 and heap_H[0] << LIST_BITS <= upto_ms:
        number = heap_H[0]
        passed = ((number + 1) << LIST_BITS) - 1 <= upto_ms
        row = np.int64(w.first_B[_list_place(w, number)])
        while row >= 0:
            if w.times_C2[row, BASE_MS] <= upto_ms and (w.bits_C3[row, OPEN] >> task) & 1:
                if count == seqs_L.shape[0]:
                    seqs_L, bases_L = np.append(seqs_L, seqs_L), np.append(bases_L, bases_L)
                seqs_L[count], bases_L[count] = seq_of(w.ring, row), w.times_C2[row, BASE_MS]
                count += 1
            if passed and longest:
                w.bits_C3[row, LINKED] = 0
            row = np.int64(w.next_C[row])
        if not passed:
            break
        _pop_heap(heap_H, w.sizes_T[task])
        w.sizes_T[task] -= 1
        if longest:
            delete_at(w.first_B, w.lists_B2, BY_PLACE, _list_place(w, number))
            w.sizes_T[-1] -= 1
    return seqs_L[:count], bases_L[:count]


@numba.njit(cache=True)
def _close_all(w: PendingArrays, seq_L: I64s, task_L: I64s, resolved: RecentArrays) -> None:
    for i in range(seq_L.shape[0]):
        resolve(w, row_of(w.ring, seq_L[i]), task_L[i], False, resolved)


@numba.njit(cache=True)
def _restore(w: PendingArrays, first: Int, keys_N2: U64s, event_N: I64s, base_N: I64s, bits_N2: U8s) -> Int:
    live = 0
    for i in range(event_N.shape[0]):
        open_ = bits_N2[i, OPEN]
        if open_ == 0:
            continue
        row = row_of(w.ring, first + i)
        w.ring.keys_C2[row, 0], w.ring.keys_C2[row, 1] = keys_N2[i, 0], keys_N2[i, 1]
        w.times_C2[row, EVENT_MS], w.times_C2[row, BASE_MS] = event_N[i], base_N[i]
        w.bits_C3[row, OPEN], w.bits_C3[row, POSITIVE] = open_, bits_N2[i, POSITIVE]
        w.ring.head[USED] += 1
        insert(w.ring, row)
        link(w, row)
        for task in range(w.counts_T9.shape[0]):
            live += (open_ >> task) & 1
    return live


@numba.njit(cache=True)
def _let_go(w: PendingArrays) -> None:
    while w.ring.head[FIRST] < w.ring.head[NEXT] and w.bits_C3[w.ring.head[ROW], LINKED] == 0:
        drop_first(w.ring)
