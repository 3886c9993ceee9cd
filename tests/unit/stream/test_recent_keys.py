"""Goal: the memory forgets by watermark alone, never too early. Method: a dict with times as the reference."""

from __future__ import annotations

from random import Random

import numpy as np
import pyarrow as pa
import pytest

from headrace.kernels.hashes import hash128_texts
from headrace.stream.join.recent_keys import SLICES, RecentKeys


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
