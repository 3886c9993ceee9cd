"""First in, first out, found by key: the compiled tables under the join. Pure.

Rows lie in a ring in order of arrival, so that what is old goes from the front, and a stretch of rows that is stored
once never changes. An open-addressing index (linear probing, deletion by shifting back) finds the newest row of a
128-bit key. Nothing here depends on how calls are cut.

Legend: C capacity in rows, M places of the index, 2 the halves of a key, N rows of a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

U64s = npt.NDArray[np.uint64]
I64s = npt.NDArray[np.int64]
I32s = npt.NDArray[np.int32]
U8s = npt.NDArray[np.uint8]
Int: TypeAlias = Any
"""An integer of compiled code: Python's or NumPy's, it takes and gives both."""

FIRST, NEXT, ROW, LIVE, USED = 0, 1, 2, 3, 4
"""Places in `Ring.head`: sequence number of the oldest row and of the next one, where the oldest row lies, the oldest
that still counts, and how many count (for those who keep that number)."""
_ROWS_MIN = 1_024
_EMPTY = -1


class Ring(NamedTuple):
    """The arrays of one table; owners keep columns of their own beside `keys_C2`, row by row."""

    keys_C2: U64s
    index_M: I32s
    head: I64s

    @property
    def rows(self) -> int:
        """How many rows lie in the ring."""
        return int(self.head[NEXT] - self.head[FIRST])


def new_ring(capacity: int = _ROWS_MIN, first: int = 0) -> Ring:
    """Return an empty ring whose next row gets the sequence number `first`."""
    head = np.array([first, first, 0, first, 0], np.int64)
    return Ring(np.empty((capacity, 2), np.uint64), np.full(_places(capacity), _EMPTY, np.int32), head)


def grown(ring: Ring, columns: list[Any], more: int) -> tuple[Ring, list[Any]]:
    """Return the ring and its owner's columns with room for `more` rows: the same ones where there is room.

    Capacity grows by a quarter, so that at most a fifth of it is idle; the cost of moving is that of four rows a row.
    """
    capacity = len(ring.keys_C2)
    if ring.rows + more <= capacity:
        return ring, columns
    wanted = max(ring.rows + more, capacity + capacity // 4, _ROWS_MIN)
    start = int(ring.head[ROW])
    keys_C2 = _moved(ring.keys_C2, start, ring.rows, wanted)
    moved = []
    while columns:
        moved.append(_moved(columns.pop(0), start, ring.rows, wanted))
    index_M = np.full(_places(wanted), _EMPTY, np.int32)
    ring.head[ROW] = 0
    _reindex(ring.index_M, start, capacity, keys_C2, index_M)
    return Ring(keys_C2, index_M, ring.head), moved


def _places(capacity: int) -> int:
    # Load is at most 2/3: a search looks at 2 places where the key is there and at 5 where it is not.
    return capacity + capacity // 2


def _moved(column: npt.NDArray[Any], start: int, rows: int, capacity: int) -> Any:
    out = np.empty((capacity, *column.shape[1:]), column.dtype)
    ahead = min(rows, len(column) - start)
    out[:ahead] = column[start : start + ahead]
    out[ahead:rows] = column[: rows - ahead]
    return out


def stretch(ring: Ring, column: npt.NDArray[Any], first: int, following: int) -> Any:
    """Return a copy of a column's rows with sequence numbers `first` <= s < `following`."""
    start = (int(ring.head[ROW]) + first - int(ring.head[FIRST])) % len(column)
    return _moved(column, start, following - first, following - first)


@numba.njit(cache=True)
def place_of(high: np.uint64, places: Int) -> Int:
    """Return where a key's search begins: the upper bits scaled to the index's length."""
    return np.int64(((high >> np.uint64(32)) * np.uint64(places)) >> np.uint64(32))


@numba.njit(cache=True)
def row_of(ring: Ring, seq: Int) -> Int:
    """Return where the row with a sequence number lies."""
    row = ring.head[ROW] + seq - ring.head[FIRST]
    return row - ring.keys_C2.shape[0] if row >= ring.keys_C2.shape[0] else row


@numba.njit(cache=True)
def seq_of(ring: Ring, row: Int) -> Int:
    """Return the sequence number of a row."""
    ahead = row - ring.head[ROW]
    return ring.head[FIRST] + (ahead + ring.keys_C2.shape[0] if ahead < 0 else ahead)


@numba.njit(cache=True)
def find(ring: Ring, low: np.uint64, high: np.uint64) -> Int:
    """Return the row that the index has for a key, or -1."""
    places = ring.index_M.shape[0]
    at = place_of(high, places)
    while True:
        row = ring.index_M[at]
        if row < 0:
            return -1
        if ring.keys_C2[row, 0] == low and ring.keys_C2[row, 1] == high:
            return np.int64(row)
        at += 1
        if at == places:
            at = 0


@numba.njit(cache=True)
def _insert(keys_C2: U64s, index_M: I32s, row: Int) -> None:
    places = index_M.shape[0]
    low, high = keys_C2[row, 0], keys_C2[row, 1]
    at = place_of(high, places)
    while True:
        other = index_M[at]
        if other < 0 or (keys_C2[other, 0] == low and keys_C2[other, 1] == high):
            index_M[at] = row
            return
        at += 1
        if at == places:
            at = 0


@numba.njit(cache=True)
def _reindex(old_M: I32s, start: Int, capacity: Int, keys_C2: U64s, index_M: I32s) -> None:
    for at in range(old_M.shape[0]):
        row = old_M[at]
        if row >= 0:
            ahead = row - start
            _insert(keys_C2, index_M, ahead + capacity if ahead < 0 else ahead)


@numba.njit(cache=True)
def remove(ring: Ring, row: Int) -> None:
    """Take a row's key out of the index; nothing happens where the index has another row for it, or none."""
    keys_C2, index_M = ring.keys_C2, ring.index_M
    places = index_M.shape[0]
    hole = place_of(keys_C2[row, 1], places)
    while index_M[hole] != row:
        if index_M[hole] < 0:
            return
        hole += 1
        if hole == places:
            hole = 0
    at = hole
    while True:
        at += 1
        if at == places:
            at = 0
        other = index_M[at]
        if other < 0:
            index_M[hole] = _EMPTY
            return
        # A row may move back into the hole unless its search begins behind the hole.
        from_home = at - place_of(keys_C2[other, 1], places)
        from_hole = at - hole
        if (from_home + places if from_home < 0 else from_home) >= (from_hole + places if from_hole < 0 else from_hole):
            index_M[hole] = other
            hole = at


@numba.njit(cache=True)
def push(ring: Ring, low: np.uint64, high: np.uint64) -> Int:
    """Append a row, which the index now has for its key, and return where it lies; there must be room."""
    row = row_of(ring, ring.head[NEXT])
    ring.keys_C2[row, 0] = low
    ring.keys_C2[row, 1] = high
    _insert(ring.keys_C2, ring.index_M, row)
    ring.head[NEXT] += 1
    return row


@numba.njit(cache=True)
def drop_first(ring: Ring) -> None:
    """Let the oldest row go."""
    row = ring.head[ROW]
    remove(ring, row)
    ring.head[FIRST] += 1
    ring.head[ROW] = 0 if row + 1 == ring.keys_C2.shape[0] else row + 1


@numba.njit(cache=True)
def insert(ring: Ring, row: Int) -> None:
    """Let the index have `row` for its key."""
    _insert(ring.keys_C2, ring.index_M, row)


@numba.njit(cache=True)
def reindex_rows(ring: Ring, wanted_C: U8s) -> None:
    """Index the rows with a mark in `wanted_C`, oldest first: after a restore."""
    for seq in range(ring.head[FIRST], ring.head[NEXT]):
        row = row_of(ring, seq)
        if wanted_C[row]:
            _insert(ring.keys_C2, ring.index_M, row)


# Keys

_C1 = np.uint64(0x87C37B91114253D5)
_C2 = np.uint64(0x4CF5AD432745937F)
_M1 = np.uint64(0xFF51AFD7ED558CCD)
_M2 = np.uint64(0xC4CEB9FE1A85EC53)


def hash_texts(column: pa.Array, salt: int) -> U64s:
    """Return 128 bits of each text: uint64 [N, 2], MurmurHash3 x64-128 of its bytes under `salt`.

    Two of 2**32 keys collide with a chance of 3e-20. Nulls count as empty texts.

    >>> [f"{half:016x}" for half in hash_texts(pa.array(["hello"]), 0)[0]]
    ['cbd8a7b341bd9b02', '5b1e906a48ae1d19']
    """
    rows = len(column)
    keys_N2 = np.empty((rows, 2), np.uint64)
    if rows:
        _, starts, data = column.buffers()
        starts_S = np.frombuffer(starts, np.int32)[column.offset : column.offset + rows + 1]
        _murmur(np.frombuffer(data, np.uint8) if data else np.zeros(1, np.uint8), starts_S, np.uint64(salt), keys_N2)
    return keys_N2


def with_numbers(keys_N2: U64s, numbers_N: npt.NDArray[np.signedinteger]) -> U64s:
    """Return the keys of (text, number) pairs."""
    out_N2 = np.empty_like(keys_N2)
    _with_numbers(keys_N2, numbers_N.astype(np.int64).view(np.uint64), out_N2)
    return out_N2


@numba.njit(cache=True)
def _with_numbers(keys_N2: U64s, numbers_N: U64s, out_N2: U64s) -> None:
    for i in range(keys_N2.shape[0]):
        number = numbers_N[i] + np.uint64(1)
        out_N2[i, 0] = _mixed(keys_N2[i, 0] + number * _C1)
        out_N2[i, 1] = _mixed(keys_N2[i, 1] + number * _C2)


@numba.njit(cache=True)
def _rotl(value: np.uint64, bits: Int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True)
def _mixed(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> np.uint64(33))) * _M1
    value = (value ^ (value >> np.uint64(33))) * _M2
    return value ^ (value >> np.uint64(33))


@numba.njit(cache=True)
def _little(data: U8s, at: np.uint64, size: Int) -> np.uint64:
    value = np.uint64(0)
    for i in range(size):
        value |= np.uint64(data[at + np.uint64(i)]) << np.uint64(8 * i)
    return value


@numba.njit(cache=True)
def _murmur(data: U8s, starts_S: I32s, salt: np.uint64, out_N2: U64s) -> None:
    for n in range(out_N2.shape[0]):
        at, end = np.uint64(starts_S[n]), np.uint64(starts_S[n + 1])
        size = end - at
        a, b = salt, salt
        while at + np.uint64(16) <= end:
            a ^= _rotl(_little(data, at, 8) * _C1, 31) * _C2
            a = (_rotl(a, 27) + b) * np.uint64(5) + np.uint64(0x52DCE729)
            b ^= _rotl(_little(data, at + np.uint64(8), 8) * _C2, 33) * _C1
            b = (_rotl(b, 31) + a) * np.uint64(5) + np.uint64(0x38495AB5)
            at += np.uint64(16)
        left = np.int64(end - at)
        if left > 8:
            b ^= _rotl(_little(data, at + np.uint64(8), left - 8) * _C2, 33) * _C1
        if left > 0:
            a ^= _rotl(_little(data, at, 8 if left > 8 else left) * _C1, 31) * _C2
        a ^= size
        b ^= size
        a += b
        b += a
        a, b = _mixed(a), _mixed(b)
        a += b
        b += a
        out_N2[n, 0], out_N2[n, 1] = a, b
