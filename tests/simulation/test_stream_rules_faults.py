"""Goal: whatever dies around a change of rules, every sample comes out once, by the rules it was read under.

Method: the two workers and the faults of `test_stream_faults`, over a log in which the rules change; each worker has
another project on its disk, before the change is applied and after. Planted bugs: rules taken from the disk at a
restart, what waits labelled by the new rules, a change written twice counted twice.
"""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from join_world import PROJECT, records
from rules_world import PROJECTS, SCHEMAS, changing
from stream_world import JOIN, Stage, World

from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.topics import Topics
from headrace.contract.rules import rules_of
from headrace.stream.join import state as states
from headrace.stream.join.join import JoinState

Row = dict[str, object]


class AnyDisk(Stage):
    """The stage, on a machine whose project file is any of those that there were, or will be."""

    disk = Random(0)

    def __init__(self, deps) -> None:
        super().__init__(deps, declared=rules_of(self.disk.choice(PROJECTS)))


class Changing(World):
    """A world whose log changes the rules."""

    def __init__(self, seed: int, stage_type: type[Stage]) -> None:
        super().__init__(seed, stage_type)
        AnyDisk.disk = Random(seed)
        self.events = records(changing(seed, 250, 2), Random(seed), SCHEMAS)

    def taken(self) -> list[Row]:
        """Return what a reader takes of `samples`, by position."""
        position, rows = START, list[Row]()
        for record in self.log.partitions(Topics().samples)[0]:
            after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
            if after > position or last <= position:
                continue
            found = present(decode_batch(record.value or b""))
            rows += [row for row in found if Position(row["offset"], row["rank"]) > position]
            assert {row["spec"] for row in found} == set(record.headers["spec"].split(","))
            position = last
        return rows

    def joined(self) -> list[Row]:
        """Return what one undisturbed pass gives."""
        join = JoinState(PROJECT, JOIN, silent_ms=300, partition=0)
        emitted = [e.batch for record in self.events if (e := join.take(record)) is not None]
        return [row for batch in emitted for row in present(batch)]


def present(batch) -> list[Row]:
    """Return rows without what is null: a record has the columns of all rules that its rows were read by."""
    return [{name: value for name, value in row.items() if value is not None} for row in batch.to_pylist()]


def survives(seed: int, stage_type: type[Stage] = AnyDisk) -> bool:
    """Say whether a world with these faults gives exactly what it should."""
    world = Changing(seed, stage_type)
    try:
        asyncio.run(world.run())
    except Exception:
        if stage_type is AnyDisk:
            raise
        return False
    return world.taken() == world.joined()


@pytest.mark.parametrize("block", range(4))
def test_each_sample_comes_out_once_across_changes_whatever_dies(block, monkeypatch):
    monkeypatch.setattr(states, "INLINE_ROWS", 8)
    monkeypatch.setattr("headrace.stream.join.payload.PIECE_ROWS", 16)
    for seed in range(2 * block, 2 * block + 2):
        assert survives(seed), f"seed {seed}"


@pytest.mark.long
@pytest.mark.parametrize("block", range(10))
def test_hundreds_of_seeds(block, monkeypatch):
    monkeypatch.setattr(states, "INLINE_ROWS", 8)
    monkeypatch.setattr("headrace.stream.join.payload.PIECE_ROWS", 16)
    for seed in range(1_000 + 20 * block, 1_000 + 20 * block + 20):
        assert survives(seed), f"seed {seed}"


class RulesFromDisk(AnyDisk):
    """Reads by the project file after a restart, not by what the state says."""

    async def begin(self, partition):
        following = await super().begin(partition)
        state = self.partitions[partition].state
        if following is not None:
            state.begin_rules(state.rules.number, self.declared, first=state.rules.pending.following)
        return following


class WaitingUnderNewRules(AnyDisk):
    """Labels what waits by the rules that came after it."""

    async def take_all(self, records):
        join = self.partitions[records[0].partition].state
        await super().take_all(records)
        for rules in join.rules_in_force[:-1]:
            width = len(rules.windows_T)
            rules.pending.windows_ms[:] = join.rules.windows_T[:width].tolist()


class ForgetsOldRules(AnyDisk):
    """Stores only the rules in force: what waits under older ones is gone after a restart."""

    async def begin(self, partition):
        following = await super().begin(partition)
        state = self.partitions[partition].state
        del state.rules_in_force[:-1]
        return following


@pytest.mark.parametrize("bug", [RulesFromDisk, WaitingUnderNewRules, ForgetsOldRules])
def test_a_planted_bug_is_caught(bug):
    assert not all(survives(seed, bug) for seed in range(8))
