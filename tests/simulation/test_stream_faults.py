"""Goal: whatever dies, every sample of the log comes out once. Method: two workers, one partition, faults from a seed.

Workers crash, are declared dead and write on, store states late; deliveries lag and die with their worker; gateways
fall silent. The checker stands outside: it reads `samples` as every reader does, by position, and knows what should be
there from one pass of the join over the log. Then bugs are planted, and each must be caught.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from stream_world import Stage, World

from headrace.stream.join import state as states
from headrace.stream.shell.durable_state import DurableState


def survives(seed: int, stage_type: type[Stage] = Stage, *, loses_end: bool = False) -> bool:
    """Say whether a world with these faults gives exactly what it should."""
    world = World(seed, stage_type, loses_end=loses_end)
    try:
        asyncio.run(world.run())
    except Exception:
        if stage_type is Stage:
            raise
        return False
    return world.read().equals(world.expected)


BLOCKS = [*range(3), *(pytest.param(block, marks=pytest.mark.long) for block in range(3, 10))]


@pytest.mark.parametrize("block", BLOCKS)
def test_each_sample_comes_out_once_whatever_dies(block, monkeypatch):
    # States small enough that every kind of part is written, merged and deleted.
    monkeypatch.setattr(states, "INLINE_ROWS", 8)
    monkeypatch.setattr("headrace.stream.join.payload.PIECE_ROWS", 16)
    for seed in range(20 * block, 20 * block + 20):
        assert survives(seed), f"seed {seed}"


LOSSES = [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 20))]


@pytest.mark.parametrize("block", LOSSES)
def test_samples_that_the_broker_lost_are_sent_again(block):
    for seed in range(8 * block, 8 * block + 8):
        assert survives(seed, loses_end=True), f"seed {seed}"


class TrustsItsState(Stage):
    """Goes on from its newest state, whatever `samples` holds."""

    async def begin(self, partition):
        self.deps = replace(self.deps, open_reader=None)
        return await super().begin(partition)


def test_a_state_that_is_ahead_of_its_samples_is_caught():
    assert not all(survives(seed, TrustsItsState, loses_end=True) for seed in range(8))


class StoresFirst(DurableState):
    """Stores before it delivers: step 3 comes before step 2."""

    async def _await_receipts(self, sent):
        return


class CommitsBeforeTheEffect(TrustsItsState):
    """Stores a state before its samples were delivered."""

    durable_state = StoresFirst


class OffByOne(Stage):
    """Goes on one record too late."""

    async def begin(self, partition):
        following = await super().begin(partition)
        return following if following is None else following + 1


class WallClock(Stage):
    """Lets the time of processing into the data: windows close by it."""

    async def take_all(self, records):
        join = self.partitions[records[0].partition].state
        join.watermark.time_ms = max(join.watermark.time_ms, 10_000 + self.deps.clock.now_ms())
        await super().take_all(records)


@pytest.mark.parametrize("bug", [CommitsBeforeTheEffect, OffByOne, WallClock])
def test_a_planted_bug_is_caught(bug):
    assert not all(survives(seed, bug) for seed in range(12))
