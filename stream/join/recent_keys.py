"""Keys of the recent past: a map from a 128-bit key to a small number, which forgets by watermark time. Compiled.

The join remembers by it which events it has seen and which impressions are resolved. Keys lie in order of arrival, in
slices of time. A slice that is older than the horizon is forgotten at once; its rows leave the ring bit by bit, two
with each new one, so that forgetting never holds up the stream.

Legend: C capacity in rows, 2 the halves of a key, N rows of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from headrace.kernels.arrays import I64s, Int, U8s, U64s
from headrace.kernels.ring_table import (
    FIRST,
    LIVE,
    NEXT,
    Ring,
    drop_first,
    find,
    grown,
    new_ring,
    push,
    seq_of,
    stretch,
)

SLICES = 16
"""A horizon is cut into so many; forgetting is that coarse."""
_NO_TIME = -1


class RecentArrays(NamedTuple):
    """The arrays, for compiled callers: `values_C` lies beside the ring's keys."""

    ring: Ring
    values_C: U8s


class RecentKeys:
    """Remembers each key for at least `horizon_ms` of watermark time and at most 1/16 longer; values are 0..255.

    What comes before the first watermark counts as put at that watermark. 28 bytes a key at most, 23 when full.
    """

    def __init__(self, horizon_ms: int) -> None:
        self.slice_ms = max(1, horizon_ms // SLICES)
        self.arrays = RecentArrays(new_ring(), np.empty(0, np.uint8))
        self.arrays = RecentArrays(self.arrays.ring, np.empty(len(self.arrays.ring.keys_C2), np.uint8))
        self.slices: list[tuple[int, int]] = [(_NO_TIME, 0)]
        """Begin of each slice that is remembered, oldest first: its time and its first sequence number."""

    def __len__(self) -> int:
        """How many rows are remembered; a key that was put again counts twice."""
        head = self.arrays.ring.head
        return int(head[NEXT] - head[LIVE])

    @property
    def live(self) -> tuple[int, int]:
        """The first sequence number that is remembered, and the next one to come."""
        head = self.arrays.ring.head
        return int(head[LIVE]), int(head[NEXT])

    def reserve(self, more: int) -> None:
        """Make room for `more` keys: required before `put` and before compiled code remembers any."""
        ring, values_C = self.arrays
        if ring.rows + more > len(ring.keys_C2):
            _drop_dead(ring)
            ring, columns = grown(ring, [values_C], more)
            self.arrays = RecentArrays(ring, columns[0] if columns else values_C)

    def put(self, keys_N2: U64s, values_N: U8s) -> None:
        """Remember keys from now on, in order; a later value of a key counts."""
        self.reserve(len(keys_N2))
        _put_all(self.arrays, keys_N2, values_N)

    def get(self, keys_N2: U64s) -> list[int | None]:
        """Return the newest value put under each key, or None where it is unknown or forgotten."""
        values_N = np.empty(len(keys_N2), np.int64)
        _get_all(self.arrays, keys_N2, values_N)
        return [None if value < 0 else value for value in values_N.tolist()]

    def advance(self, watermark_ms: int) -> None:
        """Begin a slice when its time has come, and forget slices that are older than the horizon."""
        start_ms = watermark_ms - watermark_ms % self.slice_ms
        newest_ms, first = self.slices[-1]
        head = self.arrays.ring.head
        if newest_ms == _NO_TIME:
            self.slices = [(start_ms, first)]
        elif start_ms > newest_ms:
            self.slices.append((start_ms, int(head[NEXT])))
            oldest_ms = start_ms - (SLICES + 1) * self.slice_ms
            while self.slices[0][0] <= oldest_ms:
                del self.slices[0]
            head[LIVE] = self.slices[0][1]

    def rows(self, first: int, following: int) -> tuple[U64s, U8s]:
        """Return copies of the keys and values with sequence numbers `first` <= s < `following`."""
        ring, values_C = self.arrays
        return stretch(ring, ring.keys_C2, first, following), stretch(ring, values_C, first, following)

    def load(self, slices: list[tuple[int, int]], first: int, keys_N2: U64s, values_N: U8s) -> None:
        """Take over slices and the rows from sequence number `first` on, none of them forgotten."""
        self.slices = [(start_ms, seq) for start_ms, seq in slices]
        capacity = max(1_024, len(keys_N2) + len(keys_N2) // 8)
        self.arrays = RecentArrays(new_ring(capacity, first), np.empty(capacity, np.uint8))
        self.put(keys_N2, values_N)


@numba.njit(cache=True)
def recall(memory: RecentArrays, low: np.uint64, high: np.uint64) -> Int:
    """Return the value of a key, or -1 where it is unknown or forgotten."""
    row = find(memory.ring, low, high)
    if row < 0 or seq_of(memory.ring, row) < memory.ring.head[LIVE]:
        return -1
    return np.int64(memory.values_C[row])


@numba.njit(cache=True)
def remember(memory: RecentArrays, low: np.uint64, high: np.uint64, value: Int) -> None:
    """Put a key; there must be room."""
    head = memory.ring.head
    for _ in range(2):
        if head[FIRST] < head[LIVE]:
            drop_first(memory.ring)
    memory.values_C[push(memory.ring, low, high)] = value


@numba.njit(cache=True)
def _drop_dead(ring: Ring) -> None:
    while ring.head[FIRST] < ring.head[LIVE]:
        drop_first(ring)


@numba.njit(cache=True)
def _put_all(memory: RecentArrays, keys_N2: U64s, values_N: U8s) -> None:
    for i in range(keys_N2.shape[0]):
        remember(memory, keys_N2[i, 0], keys_N2[i, 1], values_N[i])


@numba.njit(cache=True)
def _get_all(memory: RecentArrays, keys_N2: U64s, values_N: I64s) -> None:
    for i in range(keys_N2.shape[0]):
        values_N[i] = recall(memory, keys_N2[i, 0], keys_N2[i, 1])
