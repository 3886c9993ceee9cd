"""Counters over other keys than the partition's, as the aggregator wrote them, looked up by event time. Pure, compiled.

Legend: M places of the index, 2 the halves of a key, R keys, K values kept of a key, E entries, N rows of a call.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.spec import Counter
from headrace.kernels.arrays import Bools, F64s, I32s, I64s, Int, U64s
from headrace.kernels.hashes import hash128_texts, with_numbers
from headrace.kernels.open_addressing import BY_ROW, EMPTY, delete_row, find, insert_row, place_of
from headrace.stream.features.counters import bucket_ms, weights

KEEP = 4
"""Values kept of a key: an impression may be some grid ticks older than the newest value."""
_FREE, _USED, _EPOCH = range(3)
_END = -1


class LookupArrays(NamedTuple):
    """The arrays, for compiled code.

    `filled_R` says how many values a row has, oldest first, and `number_R` of which counter they are. `head`: first
    free row, rows ever used, highest epoch seen.
    """

    index_M: I32s
    keys_R2: U64s
    filled_R: I64s
    as_of_RK: I64s
    values_RKE: F64s
    number_R: I64s
    head: I64s


class AggregateLookup:
    """The newest values of each (counter, key). A key is forgotten once its value is zero and the watermark has passed
    the time of that zero."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.counters: dict[str, Counter] = {}
        self._numbers: dict[str, int] = {}
        """Of each counter, one that no other of them gets; it is part of a row's key."""
        self._numbered = 0
        self._width = 0
        self._zeros: list[tuple[int, int]] = []
        """(as_of_ms, row) of values that are zero: when the watermark passes them, the row may leave."""
        self._clear(1_024, -1)
        self.change(counters)

    def change(self, counters: Sequence[Counter]) -> None:
        """Know these counters from now on. One that was known goes on, a new one begins with nothing."""
        kept = {self._numbers[c.name] for c in counters if self.counters.get(c.name) == c}
        before, self.counters = self._numbers, {counter.name: counter for counter in counters}
        self._numbers = {}
        for name in self.counters:
            if name in before and before[name] in kept:
                self._numbers[name] = before[name]
            else:
                self._numbers[name] = self._numbered
                self._numbered += 1
        self._names = pa.array(list(self.counters), pa.string())
        self._width = max((len(counter.counts) for counter in counters), default=0)
        self._keep(kept)

    def _keep(self, numbers: set[int]) -> None:
        """Keep the rows of these counters, as wide as the counters are now."""
        old, used = self.arrays, int(self.arrays.head[_USED])
        stays_R = (old.filled_R[:used] > 0) & np.isin(old.number_R[:used], sorted(numbers))
        row_R = np.cumsum(stays_R) - 1
        stay = int(stays_R.sum())
        self._clear(max(1_024, stay + stay // 4), int(old.head[_EPOCH]))
        for column, before in zip(self.arrays[1:6], old[1:6], strict=True):
            moved = before[:used][stays_R]
            if column.ndim == 3:
                width = min(column.shape[2], moved.shape[2])
                column[:stay] = 0.0
                column[:stay, :, :width] = moved[:, :, :width]
            else:
                column[:stay] = moved
        self.arrays.head[_USED] = stay
        _settle(self.arrays)
        self._zeros = sorted((as_of_ms, int(row_R[row])) for as_of_ms, row in self._zeros if stays_R[row])

    def _clear(self, rows: int, epoch: int) -> None:
        self.arrays = LookupArrays(
            np.full(2 * rows, EMPTY, np.int32),
            np.empty((rows, 2), np.uint64),
            np.zeros(rows, np.int64),
            np.zeros((rows, KEEP), np.int64),
            np.zeros((rows, KEEP, self._width)),
            np.zeros(rows, np.int64),
            np.array([_END, 0, epoch], np.int64),
        )

    def take(self, batch: pa.RecordBatch) -> None:
        """Apply rows in order. Rows of an epoch below the highest seen are of a fenced-off aggregator, and ignored."""
        rows = batch.num_rows
        if not rows or not self.counters:
            return
        place_N = pc.fill_null(pc.index_in(batch.column(0), value_set=self._names), len(self._numbers)).to_numpy()
        number_N = np.array([*self._numbers.values(), -1], np.int64)[place_N]
        keys_N2 = with_numbers(hash128_texts(batch.column(1), 0), number_N)
        counts = batch.column(4)
        starts_S = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(counts), 0).to_numpy())])
        self._reserve(rows)
        zeros_N = np.empty(rows, np.int64)
        as_of_N = batch.column(2).to_numpy()
        _take_values(
            self.arrays, number_N, keys_N2, as_of_N, batch.column(3).to_numpy(), starts_S.astype(np.int64),
            counts.flatten().to_numpy(zero_copy_only=False).astype(np.float64), zeros_N,
        )  # fmt: skip
        for n in np.flatnonzero(zeros_N >= 0):
            heapq.heappush(self._zeros, (int(as_of_N[n]), int(zeros_N[n])))

    def values(self, counter: Counter, texts: pa.Array, as_of_N: I64s) -> F64s:
        """Return the newest counts of each key (as `key_texts`) not after its row's time: float64 [N, E].

        Zeros where there are none or the key is null; what fades by itself is aged to the row's time.
        """
        number_N = np.full(len(texts), self._numbers[counter.name], np.int64)
        present_N = np.ones(len(texts), np.bool_)
        if texts.null_count:
            present_N = texts.is_valid().to_numpy(zero_copy_only=False)
        kinds = [entry.kind for entry in counter.entries()]
        known = weights(counter)
        out_NE = np.zeros((len(texts), len(kinds)))
        _read_values(
            self.arrays, with_numbers(hash128_texts(texts, 0), number_N), present_N, as_of_N,
            np.array([kind == "last" for kind in kinds]), np.array(() if known is None else known, np.float64),
            bucket_ms(counter), counter.buckets, out_NE,
        )  # fmt: skip
        return out_NE

    def advance(self, watermark_ms: int) -> None:
        """Forget keys whose newest value is zero, as of a time that the watermark has passed."""
        while self._zeros and self._zeros[0][0] <= watermark_ms:
            as_of_ms, row = heapq.heappop(self._zeros)
            # The row may hold another key by now: then the same holds for that key.
            _forget_zero(self.arrays, row, as_of_ms)

    def to_plain(self) -> list[Any]:
        """Return the state as numbers and bytes; rows keep their places."""
        a, used = self.arrays, int(self.arrays.head[_USED])
        columns = [c[:used].tobytes() for c in a[1:6]]
        return [a.head.tolist(), columns, [list(zero) for zero in sorted(self._zeros)], self._numbered, self._numbers]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        head, columns, zeros, self._numbered, self._numbers = plain
        self._numbers = {name: self._numbers[name] for name in self.counters}
        used = head[_USED]
        self._clear(max(1_024, used + used // 4), head[_EPOCH])
        for column, raw in zip(self.arrays[1:6], columns, strict=True):
            column[:used] = np.frombuffer(raw, column.dtype).reshape(used, *column.shape[1:])
        self.arrays.head[_USED] = used
        _settle(self.arrays)
        self._zeros = [(as_of_ms, row) for as_of_ms, row in zeros]

    def _reserve(self, more: int) -> None:
        used = int(self.arrays.head[_USED])
        if used + more <= len(self.arrays.filled_R):
            return
        old = self.arrays
        self._clear(max(2 * len(old.filled_R), used + more), int(old.head[_EPOCH]))
        for column, before in zip(self.arrays[1:6], old[1:6], strict=True):
            column[: len(before)] = before
        self.arrays.head[_USED] = used
        _settle(self.arrays)


@numba.njit(cache=True)
def _settle(a: LookupArrays) -> None:
    """Index the rows that have values, and chain the others as free ones."""
    a.head[_FREE] = _END
    for row in range(a.head[_USED] - 1, -1, -1):
        if a.filled_R[row]:
            insert_row(a.index_M, a.keys_R2, row)
        else:
            a.as_of_RK[row, 0] = a.head[_FREE]
            a.head[_FREE] = row


@numba.njit(cache=True)
def _row_for(a: LookupArrays, low: np.uint64, high: np.uint64) -> Int:
    place = place_of(a.index_M, a.keys_R2, BY_ROW, low, high)
    row = np.int64(a.index_M[place])
    if row >= 0:
        return row
    row = a.head[_FREE]
    if row >= 0:
        # A free row's first time is the next free row.
        a.head[_FREE] = a.as_of_RK[row, 0]
    else:
        row = a.head[_USED]
        a.head[_USED] += 1
    a.keys_R2[row, 0], a.keys_R2[row, 1] = low, high
    a.filled_R[row] = 0
    a.index_M[place] = row
    return row


@numba.njit(cache=True)
def _take_values(
    a: LookupArrays, number_N: I64s, keys_N2: U64s, as_of_N: I64s, epoch_N: I64s, starts_S: I64s, flat: F64s,
    zeros_N: I64s,
) -> None:  # fmt: skip
    width = a.values_RKE.shape[2]
    for n in range(number_N.shape[0]):
        zeros_N[n] = -1
        if number_N[n] < 0 or epoch_N[n] < a.head[_EPOCH]:
            continue
        a.head[_EPOCH] = epoch_N[n]
        row = _row_for(a, keys_N2[n, 0], keys_N2[n, 1])
        a.number_R[row] = number_N[n]
        filled = a.filled_R[row]
        # A restarted aggregator says what it said again, under its new epoch.
        while filled and a.as_of_RK[row, filled - 1] >= as_of_N[n]:
            filled -= 1
        if filled == KEEP:
            for k in range(1, KEEP):
                a.as_of_RK[row, k - 1] = a.as_of_RK[row, k]
                a.values_RKE[row, k - 1] = a.values_RKE[row, k]
            filled -= 1
        a.as_of_RK[row, filled] = as_of_N[n]
        given = starts_S[n + 1] - starts_S[n]
        nonzero = False
        for i in range(width):
            value = flat[starts_S[n] + i] if i < given else 0.0
            a.values_RKE[row, filled, i] = value
            nonzero = nonzero or value != 0.0
        a.filled_R[row] = filled + 1
        if not nonzero:
            zeros_N[n] = row


@numba.njit(cache=True)
def _read_values(
    a: LookupArrays, keys_N2: U64s, present_N: Bools, as_of_N: I64s, lasts_E: Bools,
    weights_A: F64s, width_ms: Int, buckets: Int, out_NE: F64s,
) -> None:  # fmt: skip
    fading = weights_A.shape[0] > 0
    for n in range(keys_N2.shape[0]):
        row = find(a.index_M, a.keys_R2, BY_ROW, keys_N2[n, 0], keys_N2[n, 1]) if present_N[n] else -1
        if row < 0:
            continue
        at = a.filled_R[row] - 1
        while at >= 0 and a.as_of_RK[row, at] > as_of_N[n]:
            at -= 1
        if at < 0:
            continue
        known_ms, as_of_ms = a.as_of_RK[row, at], as_of_N[n]
        top = as_of_ms // width_ms
        age = top - known_ms // width_ms
        for i in range(lasts_E.shape[0]):
            value = a.values_RKE[row, at, i]
            if as_of_ms > known_ms:
                if lasts_E[i]:
                    young = value != 0.0 and np.int64(known_ms + 1 - value) // width_ms > top - buckets
                    value = value + (as_of_ms - known_ms) if young else 0.0
                elif fading:
                    value *= weights_A[age] if age < buckets else 0.0
            out_NE[n, i] = value


@numba.njit(cache=True)
def _forget_zero(a: LookupArrays, row: Int, as_of_ms: Int) -> None:
    filled = a.filled_R[row]
    if not filled or a.as_of_RK[row, filled - 1] != as_of_ms or a.values_RKE[row, filled - 1].any():
        return
    delete_row(a.index_M, a.keys_R2, row)
    a.filled_R[row] = 0
    a.as_of_RK[row, 0] = a.head[_FREE]
    a.head[_FREE] = row
