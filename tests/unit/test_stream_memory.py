"""Goal: the memory forgets by watermark alone, never too early. Method: a dict with times as the reference."""

from __future__ import annotations

from random import Random

import pytest

from headrace.stream.memory import SLICES, Memory, key_of


@pytest.mark.parametrize("seed", range(5))
def test_remembers_the_horizon_and_survives_restores(seed):
    random, horizon_ms = Random(seed), 1_600
    memory, put_at, now = Memory(horizon_ms), {}, 0
    for n in range(3_000):
        now += random.randrange(0, 5)
        memory.advance(now)
        key = key_of(str(random.randrange(n + 1)))
        if key in put_at and now - put_at[key][0] < horizon_ms:
            assert memory.get(key) == put_at[key][1]
        if key in put_at and now - put_at[key][0] > horizon_ms + 2 * horizon_ms // SLICES:
            assert memory.get(key) is None
        if random.random() < 0.5:
            value = random.randrange(256)
            memory.put(key, value)
            put_at[key] = (now, value)
        if random.random() < 0.01:
            plain, memory = memory.to_plain(), Memory(horizon_ms)
            memory.load_plain(plain)
    assert len(memory) < 3_000
