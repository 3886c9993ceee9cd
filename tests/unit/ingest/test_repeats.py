"""Goal: an event id is known for its horizon and no longer than memory allows. Method: a plain dictionary beside it."""

from __future__ import annotations

from random import Random

import numpy as np

from headrace.ingest.gateway.repeats import EventIds


def _take(ids: EventIds, numbers: list[int], chunk: int, now_ms: int = 0) -> list[int]:
    # The halves of a hash. Many second ones share their upper bits, which say where the table begins to look.
    first = np.array(numbers, np.uint64)
    chosen, chunks = np.ones(len(first), np.bool_), np.full(len(first), chunk, np.int64)
    return ids.take(first, first * np.uint64(7) + np.uint64(1), chosen, chunks, now_ms).tolist()


def test_ids_are_found_while_the_table_grows() -> None:
    random, ids = Random(1), EventIds(1_000, 100_000)
    known: dict[int, int] = {}
    for chunk in range(1, 200):
        numbers = [random.randrange(1, 400) << random.choice([0, 20, 40]) for _ in range(random.randrange(1, 300))]
        for number, found in zip(numbers, _take(ids, numbers, chunk), strict=True):
            assert found == known.get(number, 0)
            known.setdefault(number, chunk)


def test_an_id_outlives_half_the_horizon_and_half_the_memory() -> None:
    ids = EventIds(1_000, 10_000)
    assert _take(ids, [7], 1, 0) == [0]
    assert _take(ids, [7], 2, 999) == [1], "remembered by the older generation"
    assert _take(ids, [7], 3, 2_500) == [0], "forgotten"
    _take(ids, list(range(100, 5_099)), 4, 2_500)
    assert _take(ids, [7], 5, 2_500) == [3]
    _take(ids, list(range(10_000, 14_000)), 6, 2_500)
    _take(ids, list(range(20_000, 25_000)), 7, 2_500)
    assert _take(ids, [7], 8, 2_500) == [0], "no more than two generations are held"


def test_a_refused_id_is_forgotten_and_its_neighbours_are_not() -> None:
    ids = EventIds(1_000, 10_000)
    same_place = [5, 5 + (1 << 30), 5 + (1 << 31)]
    assert _take(ids, same_place, 1) == [0, 0, 0]
    ids.forget(np.uint64(5), np.uint64(5 * 7 + 1))
    assert _take(ids, [5 + (1 << 30), 5 + (1 << 31)], 2) == [1, 1]
    assert _take(ids, [5], 3) == [0]
