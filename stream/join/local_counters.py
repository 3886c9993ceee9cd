"""Counters of the partition's own keys, as `headrace.stream.features.counters` defines them, compiled. Pure.

Each key has a list of its buckets, newest first. `counters` says what a value is, and what is dropped when;
`CounterState` there does the same row by row, and gives the same bits.

Legend: M places of the index, 2 the halves of a key, R buckets of all keys, E entries, N rows of a call, F feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.spec import Counter
from headrace.kernels.arrays import Bools, F64s, I32s, I64s, Int, U8s, U64s
from headrace.kernels.open_addressing import BY_PLACE, EMPTY, delete_at, find, move_places, place_of
from headrace.stream.features.counters import UNIT, Feed, bucket_ms, weights

_FREE, _USED, _KEYS, _FLOOR = range(4)
_END = -1
_COUNT, _SUM, _LAST = range(3)
_KINDS = {"count": _COUNT, "sum": _SUM, "last": _LAST}


class CounterArrays(NamedTuple):
    """The arrays of a counter, for compiled callers.

    `first_M` is the row of a key's newest bucket, `next_R` that of the next older one, or of a free row the next free
    one. `head`: first free row, rows ever used, keys, floor.
    """

    first_M: I32s
    keys_M2: U64s
    number_R: I64s
    next_R: I32s
    counts_RE: I64s
    changed_R: U8s
    head: I64s


class Rows(NamedTuple):
    """Buckets as they are stored: one row a (key, bucket)."""

    keys_R2: U64s
    number_R: I64s
    counts_RE: I64s


class LocalCounter:
    """All keys of one counter, bounded by time."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.width_ms = bucket_ms(counter)
        self._kinds_E = np.array([_KINDS[entry.kind] for entry in counter.entries()], np.int64)
        known = weights(counter)
        self._weights_A = np.array(() if known is None else known, np.float64)
        self._clear(-(2**62))

    def _clear(self, floor: int) -> None:
        entries = len(self.counter.counts)
        self.arrays = CounterArrays(
            np.full(1_024, EMPTY, np.int32),
            np.empty((1_024, 2), np.uint64),
            np.empty(1_024, np.int64),
            np.empty(1_024, np.int32),
            np.zeros((1_024, entries), np.int64),
            np.zeros(1_024, np.uint8),
            np.array([_END, 0, 0, floor], np.int64),
        )

    def __len__(self) -> int:
        """How many keys have counts."""
        return int(self.arrays.head[_KEYS])

    @property
    def floor(self) -> int:
        """The lowest bucket that is kept."""
        return int(self.arrays.head[_FLOOR])

    def take(
        self, keys_N2: U64s, present_N: Bools, times_N: I64s, feeds: Sequence[Feed], amounts_FN: I64s, *, read: bool
    ) -> F64s:
        """Count rows in order and return the values before each row, as of its time: float64 [N, E].

        Args:
            present_N: False for a row without a key: it is not counted, and its values are zeros.
            feeds: the entries that these rows change.
            amounts_FN: what each row adds to them.
            read: False where values are not needed; none are returned then.
        """
        rows = len(times_N)
        out_NE = np.zeros((rows if read else 0, len(self._kinds_E)))
        entries_F = np.array([feed.entry for feed in feeds], np.int64)
        if len(feeds):
            self._reserve(rows)
        _take(
            self.arrays, self._kinds_E, self._weights_A, self.width_ms, self.counter.buckets,
            keys_N2, present_N, times_N, entries_F, amounts_FN, out_NE,
        )  # fmt: skip
        return out_NE

    def advance(self, watermark_ms: int) -> None:
        """Drop what lies a whole window further back than the window that ends at the watermark."""
        floor = watermark_ms // self.width_ms - 2 * self.counter.buckets + 1
        if floor > self.floor:
            self.arrays.head[_FLOOR] = floor
            _drop_below(self.arrays, floor)

    def rows(self, *, changed: bool) -> Rows:
        """Return all buckets, or those that were counted into since the last call; in no order."""
        number = int(np.count_nonzero(self.arrays.changed_R)) if changed else int(self.arrays.head[_USED])
        out = Rows(
            np.empty((number, 2), np.uint64),
            np.empty(number, np.int64),
            np.empty((number, len(self._kinds_E)), np.int64),
        )
        count = _export(self.arrays, changed, *out)
        return Rows(out.keys_R2[:count], out.number_R[:count], out.counts_RE[:count])

    def load(self, floor: int, several: Sequence[Rows]) -> None:
        """Take over rows that `rows` gave, later ones replacing earlier ones of the same (key, bucket)."""
        self._clear(floor)
        for rows in several:
            self._reserve(len(rows.number_R))
            _replace(self.arrays, *rows)
        self.arrays.changed_R[:] = 0

    def _reserve(self, more: int) -> None:
        a = self.arrays
        keys, used = int(a.head[_KEYS]), int(a.head[_USED])
        if 5 * (keys + more) > 3 * len(a.first_M):
            places = max(2 * len(a.first_M), 2 * (keys + more))
            first_M, keys_M2 = np.full(places, EMPTY, np.int32), np.empty((places, 2), np.uint64)
            move_places(a.first_M, a.keys_M2, first_M, keys_M2)
            a = a._replace(first_M=first_M, keys_M2=keys_M2)
        if used + more > len(a.number_R):
            room = max(2 * len(a.number_R), used + more)
            a = a._replace(
                number_R=_longer(a.number_R, room),
                next_R=_longer(a.next_R, room),
                counts_RE=_longer(a.counts_RE, room),
                changed_R=_longer(a.changed_R, room),
            )
        self.arrays = a


def _longer(column: npt.NDArray[Any], rows: int) -> Any:
    out = np.zeros((rows, *column.shape[1:]), column.dtype)
    out[: len(column)] = column
    return out


@numba.njit(cache=True)
def _row_for(a: CounterArrays, low: np.uint64, high: np.uint64, number: Int) -> Int:
    """Return the row of a key's bucket, making it where it is missing."""
    place = place_of(a.first_M, a.keys_M2, BY_PLACE, low, high)
    before, row = np.int64(-1), np.int64(a.first_M[place])
    while row >= 0 and a.number_R[row] > number:
        before, row = row, np.int64(a.next_R[row])
    if row >= 0 and a.number_R[row] == number:
        return row
    fresh = a.head[_FREE]
    if fresh >= 0:
        a.head[_FREE] = np.int64(a.next_R[fresh])
    else:
        fresh = a.head[_USED]
        a.head[_USED] += 1
    a.number_R[fresh] = number
    a.next_R[fresh] = row
    a.counts_RE[fresh, :] = 0
    if before >= 0:
        a.next_R[before] = fresh
    else:
        if a.first_M[place] == EMPTY:
            a.keys_M2[place, 0], a.keys_M2[place, 1] = low, high
            a.head[_KEYS] += 1
        a.first_M[place] = fresh
    return fresh


@numba.njit(cache=True)
def _read(
    a: CounterArrays, kinds_E: I64s, weights_A: F64s, width_ms: Int, buckets: Int,
    low: np.uint64, high: np.uint64, as_of_ms: Int, total_E: F64s, whole_E: I64s,
) -> None:  # fmt: skip
    row = find(a.first_M, a.keys_M2, BY_PLACE, low, high)
    if row < 0:
        return
    whole_E[:] = 0
    top = as_of_ms // width_ms
    while row >= 0 and a.number_R[row] > top - buckets:
        number = a.number_R[row]
        if number <= top:
            for i in range(kinds_E.shape[0]):
                count = a.counts_RE[row, i]
                if kinds_E[i] != _LAST:
                    if weights_A.shape[0]:
                        total_E[i] += np.float64(count) * weights_A[top - number]
                    else:
                        whole_E[i] += count
                elif count and total_E[i] == 0.0:
                    last_ms = number * width_ms + count - 1
                    if last_ms <= as_of_ms:
                        total_E[i] = np.float64(1 + as_of_ms - last_ms)
        row = np.int64(a.next_R[row])
    for i in range(kinds_E.shape[0]):
        if kinds_E[i] != _LAST and not weights_A.shape[0]:
            total_E[i] = np.float64(whole_E[i])
        if kinds_E[i] == _SUM:
            total_E[i] /= UNIT


@numba.njit(cache=True)
def _take(
    a: CounterArrays, kinds_E: I64s, weights_A: F64s, width_ms: Int, buckets: Int,
    keys_N2: U64s, present_N: Bools, times_N: I64s, entries_F: I64s, amounts_FN: I64s, out_NE: F64s,
) -> None:  # fmt: skip
    whole_E = np.zeros(kinds_E.shape[0], np.int64)
    for n in range(times_N.shape[0]):
        if not present_N[n]:
            continue
        low, high, time_ms = keys_N2[n, 0], keys_N2[n, 1], times_N[n]
        if out_NE.shape[0]:
            _read(a, kinds_E, weights_A, width_ms, buckets, low, high, time_ms, out_NE[n], whole_E)
        number = time_ms // width_ms
        if number < a.head[_FLOOR] or entries_F.shape[0] == 0:
            continue
        row = _row_for(a, low, high, number)
        a.changed_R[row] = 1
        for f in range(entries_F.shape[0]):
            entry = entries_F[f]
            if kinds_E[entry] == _LAST:
                a.counts_RE[row, entry] = max(a.counts_RE[row, entry], time_ms - number * width_ms + 1)
            else:
                a.counts_RE[row, entry] += amounts_FN[f, n]


@numba.njit(cache=True)
def _replace(a: CounterArrays, keys_R2: U64s, number_R: I64s, counts_RE: I64s) -> None:
    for r in range(number_R.shape[0]):
        if number_R[r] >= a.head[_FLOOR]:
            a.counts_RE[_row_for(a, keys_R2[r, 0], keys_R2[r, 1], number_R[r])] = counts_RE[r]


@numba.njit(cache=True)
def _drop_below(a: CounterArrays, floor: Int) -> None:
    at = 0
    while at < a.first_M.shape[0]:
        before, row = np.int64(-1), np.int64(a.first_M[at])
        while row >= 0 and a.number_R[row] >= floor:
            before, row = row, np.int64(a.next_R[row])
        if row >= 0:
            if before >= 0:
                a.next_R[before] = _END
            while row >= 0:
                following = np.int64(a.next_R[row])
                a.changed_R[row] = 0
                a.next_R[row] = a.head[_FREE]
                a.head[_FREE] = row
                row = following
            if before < 0:
                delete_at(a.first_M, a.keys_M2, BY_PLACE, at)
                a.head[_KEYS] -= 1
                # Another key may have moved here.
                continue
        at += 1


@numba.njit(cache=True)
def _export(a: CounterArrays, changed: bool, keys_R2: U64s, number_R: I64s, counts_RE: I64s) -> Int:
    count = 0
    for at in range(a.first_M.shape[0]):
        row = np.int64(a.first_M[at])
        while row >= 0:
            if not changed or a.changed_R[row]:
                keys_R2[count, 0], keys_R2[count, 1] = a.keys_M2[at, 0], a.keys_M2[at, 1]
                number_R[count] = a.number_R[row]
                counts_RE[count] = a.counts_RE[row]
                a.changed_R[row] = 0
                count += 1
            row = np.int64(a.next_R[row])
    return count
