"""Open addressing: finds the number that a table holds for a 128-bit key. Compiled, pure.

A table is an array of places, the *index*; a place is empty (-1) or holds a number of the owner's. The keys lie in an
array beside it, in one of two ways:

| keys lie | number | good for |
|---|---|---|
| `BY_ROW` | the row of the key, in a column of the owner's | rows that have an order of their own: 4 bytes a place |
| `BY_PLACE` | any, at least 0 | look-ups at random: one miss of the cache less |

A search begins at the place that the upper bits of the key choose, and looks at one place after the other (linear
probing). A deletion moves later entries back into the hole, so that it leaves no tombstone. Owners keep at least a
third of the places empty: then a search looks at 2 places where the key is there and at 5 where it is not.

What a search answers depends on the keys alone. Which place a key has depends on the number of places and on the order
of insertions and deletions. The join's local counters are stored in the order of their places: whoever changes how a
place is chosen changes the bytes of a stored state, though not its content.

Legend: M places, X places or rows, R rows, 2 the halves of a key.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np

from headrace.kernels.arrays import I32s, I64s, Int, U64s

EMPTY = -1
BY_ROW, BY_PLACE = False, True

Index: TypeAlias = I32s | I64s


@numba.njit(cache=True)
def home_of(high: np.uint64, places: Int) -> Int:
    """Return where the search for a key begins: the upper half of `high`, scaled to the number of places."""
    return np.int64(((high >> np.uint64(32)) * np.uint64(places)) >> np.uint64(32))


@numba.njit(cache=True)
def place_of(index_M: Index, keys_X2: U64s, by_place: bool, low: np.uint64, high: np.uint64) -> Int:
    """Return the place of a key, or else the empty one where it would be put."""
    places = np.uint64(index_M.shape[0])
    # Unsigned, because an array's signed subscript may count from the end, which costs a test each time.
    at = np.uint64(home_of(high, places))
    while True:
        number = index_M[at]
        if number < 0:
            return np.int64(at)
        key = at if by_place else np.uint64(number)
        if keys_X2[key, 0] == low and keys_X2[key, 1] == high:
            return np.int64(at)
        at += np.uint64(1)
        if at == places:
            at = np.uint64(0)


@numba.njit(cache=True)
def find(index_M: Index, keys_X2: U64s, by_place: bool, low: np.uint64, high: np.uint64) -> Int:
    """Return the number of a key, or -1."""
    return np.int64(index_M[place_of(index_M, keys_X2, by_place, low, high)])


@numba.njit(cache=True)
def insert_row(index_M: Index, keys_R2: U64s, row: Int) -> None:
    """Let the index have `row` for the key of that row, in place of the row that it had; a place must be empty."""
    index_M[place_of(index_M, keys_R2, BY_ROW, keys_R2[row, 0], keys_R2[row, 1])] = row


@numba.njit(cache=True)
def delete_at(index_M: Index, keys_X2: U64s, by_place: bool, place: Int) -> None:
    """Empty a place. Entries behind it move back, so that a search still finds each."""
    places = index_M.shape[0]
    hole = place
    at = hole
    while True:
        at += 1
        if at == places:
            at = 0
        number = index_M[at]
        if number < 0:
            index_M[hole] = EMPTY
            return
        key = at if by_place else np.int64(number)
        # An entry may move back into the hole unless its search begins behind the hole.
        from_home = at - home_of(keys_X2[key, 1], places)
        from_hole = at - hole
        if (from_home + places if from_home < 0 else from_home) >= (from_hole + places if from_hole < 0 else from_hole):
            index_M[hole] = number
            if by_place:
                keys_X2[hole, 0], keys_X2[hole, 1] = keys_X2[at, 0], keys_X2[at, 1]
            hole = at


@numba.njit(cache=True)
def delete_row(index_M: Index, keys_R2: U64s, row: Int) -> None:
    """Take a row out; nothing happens where the index has another row for its key, or none."""
    places = index_M.shape[0]
    at = home_of(keys_R2[row, 1], places)
    # Rows are compared and not keys: that reads no key of another row.
    while index_M[at] != row:
        if index_M[at] < 0:
            return
        at += 1
        if at == places:
            at = 0
    delete_at(index_M, keys_R2, BY_ROW, at)


@numba.njit(cache=True)
def move_places(old_M: Index, old_keys_M2: U64s, index_M: Index, keys_M2: U64s) -> None:
    """Move entries whose keys lie by place, in the order of their places, to a larger table that is empty."""
    for at in range(old_M.shape[0]):
        if old_M[at] >= 0:
            place = place_of(index_M, keys_M2, BY_PLACE, old_keys_M2[at, 0], old_keys_M2[at, 1])
            keys_M2[place, 0], keys_M2[place, 1] = old_keys_M2[at, 0], old_keys_M2[at, 1]
            index_M[place] = old_M[at]
