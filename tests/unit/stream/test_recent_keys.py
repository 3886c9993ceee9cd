"""Goal: the memory forgets by watermark alone, never too early, and what it may have forgotten is not counted again.

Method: a dict with times as the reference; the plain join beside the compiled one.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pyarrow as pa
import pytest
from join_oracle import PlainJoin
from join_world import CONFIG, PROJECT, records
from msgspec import structs

from headrace.contract.formats.events import Punctuation
from headrace.kernels.hashes import hash128_texts
from headrace.stream.aggregate.core import AggregatorState
from headrace.stream.join.join import JoinState
from headrace.stream.join.outcome import Totals
from headrace.stream.join.recent_keys import SLICES, RecentKeys
from headrace.stream.join.state import encode_state, load_state


def key_of(text: str) -> np.ndarray:
    return hash128_texts(pa.array([text]), 0)


@pytest.mark.parametrize("seed", range(5))
def test_remembers_the_horizon_and_survives_restores(seed):
    random, horizon_ms = Random(seed), 1_600
    memory, put_at, now = RecentKeys(horizon_ms), {}, 0
    for n in range(3_000):
        now += random.randrange(0, 5)
        memory.advance(now)
        text = str(random.randrange(n + 1))
        key = key_of(text)
        (found,) = memory.get(key)
        if text in put_at and now - put_at[text][0] < horizon_ms:
            assert found == put_at[text][1]
        if text in put_at and now - put_at[text][0] > horizon_ms + 2 * horizon_ms // SLICES:
            assert found is None
        if random.random() < 0.5:
            value = random.randrange(256)
            memory.put(key, np.array([value], np.uint8))
            put_at[text] = (now, value)
        if random.random() < 0.01:
            kept, memory = memory, RecentKeys(horizon_ms)
            memory.load(kept.slices, kept.live[0], *kept.rows(*kept.live))
    assert 0 < len(memory) < 3_000


def test_what_came_before_time_counts_from_the_first_watermark():
    memory = RecentKeys(1_600)
    memory.put(key_of("a"), np.array([7], np.uint8))
    memory.advance(1_700_000_000_000)
    assert memory.get(key_of("a")) == [7]
    memory.advance(1_700_000_000_000 + 2_000)
    assert memory.get(key_of("a")) == [None]


def test_a_long_life_stays_within_its_bound():
    memory, keys = RecentKeys(1_600), hash128_texts(pa.array([str(n) for n in range(50_000)]), 3)
    for step in range(100):
        memory.put(keys[500 * step : 500 * step + 500], np.zeros(500, np.uint8))
        memory.advance(100 * (step + 1))
    # 17 slices of 500 keys are remembered and as many may be on their way out.
    assert len(memory.arrays.values_C) < 20_000
    assert memory.get(keys[-1:]) == [0]
    assert memory.get(keys[:1]) == [None]


def joined(headers: dict[str, str]) -> Totals:
    """Return the totals of a join that reads an impression and a click again long after it has forgotten them."""
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    plain = PlainJoin(PROJECT, CONFIG, silent_ms=300, partition=0)
    impression = {"event_id": "e", "request_id": "r", "place": 0, "key": "1", "event_time_ms": 10_000, "user": 1}
    click = {**impression, "event_id": "k", "event_time_ms": 10_100}
    items = [("impression", {**impression, "item": 1, "price": 1.0, "version": "v"}), ("click", {**click, "item": 1})]
    times = [("time", Punctuation("g", 1, time_ms)) for time_ms in range(10_000, 20_000, 100)]
    log = records([times[0], *items, *times[1:], *items, *items], None)
    for record in log:
        kind = record.headers["kind"]
        marked = record if kind == "punctuation" else structs.replace(record, headers={**record.headers, **headers})
        join.take(marked)
        plain.take(marked)
    assert join.totals == plain.totals
    again = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    load_state(again, encode_state(join))
    assert again.totals == join.totals
    return join.totals


def test_what_is_older_than_memory_counts_only_where_it_was_looked_up() -> None:
    for headers in ({}, {"gateway": "g", "late": "set-aside"}):
        totals = joined(headers)
        assert (totals.impressions, totals.feedback, totals.repeated_in_log, totals.too_late) == (1, 1, 4, 4)
    totals = joined({"gateway": "g", "late": "looked-up"})
    assert (totals.impressions, totals.feedback, totals.repeated_in_log, totals.too_late) == (2, 2, 2, 0)
    # A log of a release that looked nothing up gives what it gave.
    assert joined({"gateway": "g"}).impressions == 2


def test_a_state_that_counted_nothing_too_late_is_read() -> None:
    join = JoinState(PROJECT, CONFIG, silent_ms=300, partition=0)
    join.load_totals([1, 2, 3, 4])
    assert join.totals.bad_records == 4 and join.row_totals() == [1, 2, 3, 4, 0]


def test_the_aggregator_counts_what_the_join_counts() -> None:
    impression = {"event_id": "e", "request_id": "r", "place": 0, "key": "1", "event_time_ms": 10_000, "user": 1}
    items = [("impression", {**impression, "item": 1, "price": 1.0, "version": "v"})]
    log = records([("time", Punctuation("g", 1, 20_000)), *items], None)
    for late, counted in (("set-aside", False), ("looked-up", True)):
        state = AggregatorState(PROJECT, 1, grid_ms=100, silent_ms=300, horizon_ms=CONFIG.repeat_horizon_ms)
        for record in log:
            state.take(structs.replace(record, headers={**record.headers, "gateway": "g", "late": late}))
        assert any(state.staged) is counted
