"""First in, first out, found by key: rows in a ring beside an index of their keys. Compiled, pure.

Rows lie in a ring in order of arrival, so that what is old goes from the front, and a stretch of rows that is stored
once never changes. The index finds the newest row of a 128-bit key (`open_addressing`). Nothing here depends on how
calls are cut.

Legend: C capacity in rows, M places of the index, 2 the halves of a key, N rows of a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from headrace.kernels import open_addressing
from headrace.kernels.arrays import I32s, I64s, Int, U8s, U64s
from headrace.kernels.open_addressing import BY_ROW, EMPTY, delete_row, insert_row

FIRST, NEXT, ROW, LIVE, USED = 0, 1, 2, 3, 4
"""What `Ring.head` holds: the sequence numbers of the oldest row and of the next one, where the oldest row lies, the
oldest sequence number that still counts, and how many rows count. Owners keep the last two, where they need them."""
_ROWS_MIN = 1_024


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
    return Ring(np.zeros((capacity, 2), np.uint64), np.full(_places(capacity), EMPTY, np.int32), head)


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
    index_M = np.full(_places(wanted), EMPTY, np.int32)
    ring.head[ROW] = 0
    _reindex(ring.index_M, start, capacity, keys_C2, index_M)
    return Ring(keys_C2, index_M, ring.head), moved


def _places(capacity: int) -> int:
    # A third stays empty.
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
    return open_addressing.find(ring.index_M, ring.keys_C2, BY_ROW, low, high)


@numba.njit(cache=True)
def _reindex(old_M: I32s, start: Int, capacity: Int, keys_C2: U64s, index_M: I32s) -> None:
    for at in range(old_M.shape[0]):
        row = old_M[at]
        if row >= 0:
            ahead = row - start
            insert_row(index_M, keys_C2, ahead + capacity if ahead < 0 else ahead)


@numba.njit(cache=True)
def remove(ring: Ring, row: Int) -> None:
    """Take a row's key out of the index; nothing happens where the index has another row for it, or none."""
    delete_row(ring.index_M, ring.keys_C2, row)


@numba.njit(cache=True)
def push(ring: Ring, low: np.uint64, high: np.uint64) -> Int:
    """Append a row, which the index now has for its key, and return where it lies; there must be room."""
    row = row_of(ring, ring.head[NEXT])
    ring.keys_C2[row, 0] = low
    ring.keys_C2[row, 1] = high
    insert_row(ring.index_M, ring.keys_C2, row)
    ring.head[NEXT] += 1
    return row


@numba.njit(cache=True)
def drop_first(ring: Ring) -> None:
    """Drop the oldest row."""
    row = ring.head[ROW]
    remove(ring, row)
    ring.head[FIRST] += 1
    ring.head[ROW] = 0 if row + 1 == ring.keys_C2.shape[0] else row + 1


@numba.njit(cache=True)
def insert(ring: Ring, row: Int) -> None:
    """Let the index have `row` for its key."""
    insert_row(ring.index_M, ring.keys_C2, row)


@numba.njit(cache=True)
def reindex_rows(ring: Ring, wanted_C: U8s) -> None:
    """Index the rows with a mark in `wanted_C`, oldest first: after a restore."""
    for seq in range(ring.head[FIRST], ring.head[NEXT]):
        row = row_of(ring, seq)
        if wanted_C[row]:
            insert_row(ring.index_M, ring.keys_C2, row)
