"""Goal: a table finds what was put, and not what was deleted, however keys crowd. Method: a dictionary beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.kernels.open_addressing import (
    BY_PLACE,
    BY_ROW,
    EMPTY,
    delete_at,
    delete_row,
    find,
    insert_row,
    move_places,
    place_of,
)

KEYS = 24
"""Few enough that steps meet, and more than one begins its search at the last place."""
HIGH_N = np.array([0, 2**63, 2**64 - 1, 2**64 - 2, 2**62, 1], np.uint64)[np.arange(KEYS) % 6]
STEPS = st.lists(st.tuples(st.integers(0, KEYS - 1), st.booleans()), max_size=120)


def key_of(number: int) -> tuple[np.uint64, np.uint64]:
    """Return a key that shares its first place with others."""
    return np.uint64(number), HIGH_N[number]


@given(STEPS, st.sampled_from([KEYS + 1, 36, 64]))
def test_keys_by_place_are_found_until_they_are_deleted(steps: list[tuple[int, bool]], places: int) -> None:
    index_M, keys_M2 = np.full(places, EMPTY, np.int64), np.empty((places, 2), np.uint64)
    known: dict[int, int] = {}
    for at, (number, goes) in enumerate(steps):
        place = place_of(index_M, keys_M2, BY_PLACE, *key_of(number))
        assert index_M[place] == known.get(number, EMPTY)
        if not goes:
            keys_M2[place], index_M[place] = key_of(number), at
            known[number] = at
        elif number in known:
            delete_at(index_M, keys_M2, BY_PLACE, place)
            del known[number]
        assert [find(index_M, keys_M2, BY_PLACE, *key_of(n)) for n in range(KEYS)] == [
            known.get(n, EMPTY) for n in range(KEYS)
        ]
    larger_M, larger_M2 = np.full(2 * places, EMPTY, np.int64), np.empty((2 * places, 2), np.uint64)
    move_places(index_M, keys_M2, larger_M, larger_M2)
    assert {n: find(larger_M, larger_M2, BY_PLACE, *key_of(n)) for n in known} == known
    assert np.count_nonzero(larger_M >= 0) == len(known)


@given(STEPS)
def test_keys_by_row_are_those_of_the_newest_row(steps: list[tuple[int, bool]]) -> None:
    index_M, keys_R2 = np.full(37, EMPTY, np.int32), np.array([key_of(n % KEYS) for n in range(2 * KEYS)], np.uint64)
    known: dict[int, int] = {}
    for at, (number, goes) in enumerate(steps):
        row = number + KEYS * (at % 2)
        if not goes:
            insert_row(index_M, keys_R2, row)
            known[number] = row
        else:
            delete_row(index_M, keys_R2, row)
            if known.get(number) == row:
                del known[number]
        assert [find(index_M, keys_R2, BY_ROW, *key_of(n)) for n in range(KEYS)] == [
            known.get(n, EMPTY) for n in range(KEYS)
        ]


@pytest.mark.parametrize("places", [1_024, 1_536, 999_983])
def test_keys_spread_over_all_places(places: int) -> None:
    index_M = np.full(places, EMPTY, np.int32)
    keys_R2 = np.random.default_rng(1).integers(0, 2**64 - 1, (places // 2, 2), np.uint64)
    for row in range(0, len(keys_R2), max(1, len(keys_R2) // 500)):
        insert_row(index_M, keys_R2, row)
    taken = np.flatnonzero(index_M >= 0)
    assert taken.min() < places // 50 and taken.max() > places - places // 50
