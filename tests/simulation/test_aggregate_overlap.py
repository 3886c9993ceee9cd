"""Goal: aggregators that overlap, as in a rolling deploy, cost nothing: values flow on, each is right, none is missed.

Method: a group in memory that gives all partitions to one member (`OneOwner`). From a seed members come, say
goodbye, are killed, or are declared dead and write on; the hosts' clocks differ by hours.
Checkers stand outside: every value is counted again from the events (replay/ledger/settled.py), and what a reader
takes, who ignores lower epochs, ends with the newest value of each key. Then a bug is planted, and must be caught.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from fault_stages import ARRIVALS, CONFIG, PARTITIONS, TOPICS, LaggingProducer
from join_world import PROJECT
from stream_world import Blobs

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import AGGREGATE_SCHEMA, decode_batch
from headrace.contract.interfaces.log import Record
from headrace.process import waits
from headrace.replay.ledger.settled import check_settled
from headrace.stream.aggregate.epochs import epoch_of
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.shell.dependencies import StageDependencies

HOUR_MS = 3_600_000
Value = tuple[int, list[float]]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads answer a turn of the loop later, and a sleep is a turn: a seed says all that happens."""
    turn = asyncio.sleep

    async def sleep(_: float) -> None:
        await turn(0)

    async def in_thread(_what: str, work: Any) -> Any:
        await turn(0)
        return work()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(waits, "in_thread", in_thread)


class Member:
    """One process of the aggregator, on a host whose clock may be wrong."""

    def __init__(self, world: World) -> None:
        self.producer, self.world = LaggingProducer(world.log), world
        self.next: dict[int, int] = {}
        deps = StageDependencies(
            project=PROJECT,
            config=CONFIG,
            topics=TOPICS,
            producer=self.producer,
            blobs=world.blobs,
            metrics=MemoryMetrics(),
            clock=VirtualClock(HOUR_MS * world.random.randrange(1, 4)),
            open_reader=world.log.reader,
        )
        self.stage, self.clock = world.stage(deps), deps.clock

    async def step(self, owned: bool) -> None:
        """Read on where it owns the partitions, and do what is due."""
        for partition in range(PARTITIONS) if owned else ():
            if partition not in self.next:
                self.next[partition] = await self.stage.begin(partition) or 0
            some = self.world.events(partition)[self.next[partition] :][: self.world.random.randrange(1, 6)]
            if some:
                await self.stage.take_all(some)
                self.next[partition] = some[-1].offset + 1
        self.clock.sleep(self.world.random.random() * 0.05)
        await self.stage.tick()
        for _ in range(4):
            await asyncio.sleep(0)

    def lose(self) -> None:
        """Be told that the partitions are somebody else's."""
        if self.next:
            self.stage.drop(set(self.next))
            self.next = {}

    def kill(self) -> None:
        """Take everything that was not delivered along."""
        self.stage.durable.cancel()
        self.producer.held.clear()

    @property
    def is_done(self) -> bool:
        read = all(self.next.get(p, -1) >= len(self.world.events(p)) for p in range(PARTITIONS))
        return read and not self.producer.held


class World:
    """The log, the store, the group, and who is declared dead and works on."""

    def __init__(self, seed: int, stage: type[AggregateStage] = AggregateStage) -> None:
        self.stage = stage
        self.random, self.log, self.blobs = Random(seed), MemoryLog(lambda: 0), Blobs()
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
        self.coming = [list(records) for records in ARRIVALS]
        self.members: list[Member] = [Member(self)]
        """The first is the owner."""
        self.zombies: list[Member] = []
        self.most = 1
        self.replaced = 0

    def events(self, partition: int) -> list[Record]:
        return self.log.partitions(TOPICS.events)[partition]

    def arrive(self, most: int) -> None:
        for partition, coming in enumerate(self.coming):
            for record in coming[:most]:
                self.log.append(TOPICS.events, partition, record.value, record.key, record.headers)
            del coming[:most]

    def rebalance(self) -> None:
        for member in self.members:
            member.lose()

    async def turn(self) -> None:
        for member in [*self.members, *self.zombies]:
            try:
                await member.step(owned=member is self.members[0] or member in self.zombies)
            except Unavailable as error:
                assert "another aggregator took over" in str(error)
                self.replaced += 1
                member.kill()
                if member in self.zombies:
                    self.zombies.remove(member)
                else:
                    self.members.remove(member)
                    self.members.append(Member(self))
                    self.rebalance()

    async def fault(self) -> None:
        drawn = self.random.random()
        if drawn < 0.10 and len(self.members) < 3:
            self.members.append(Member(self))
            self.rebalance()
        elif drawn < 0.16 and len(self.members) > 1:
            old = self.members.pop(self.random.randrange(len(self.members)))
            if self.random.random() < 0.5:
                finishing = asyncio.ensure_future(old.stage.finish())
                while not finishing.done():
                    await asyncio.sleep(0)
            old.kill()
            self.rebalance()
        elif drawn < 0.22:
            # Declared dead: it is told nothing. Somebody waits already, or a new one comes.
            self.zombies.append(self.members.pop(0))
            self.members = self.members or [Member(self)]
            self.rebalance()
        elif drawn < 0.27 and self.zombies:
            self.zombies.pop(0).kill()
        self.most = max(self.most, len(self.members) + len(self.zombies))

    async def run(self) -> None:
        while any(self.coming):
            self.arrive(self.random.randrange(3))
            await self.turn()
            await self.fault()
        while not self.members[0].is_done:
            await self.turn()
            if self.random.random() < 0.1 and self.zombies:
                self.zombies.pop(0).kill()
        for member in [*self.members, *self.zombies]:
            member.kill()
        await asyncio.sleep(0)


def rows(events: list[Record]) -> Iterator[tuple[str, int, Value]]:
    """Yield key, epoch and value of each aggregate, in the log's order."""
    for record in events:
        if epoch_of(record):
            for row in decode_batch(record.value or b"", AGGREGATE_SCHEMA).to_pylist():
                yield f"{row['counter']}/{row['key']}", row["epoch"], (row["as_of_ms"], row["counts"])


def taken(events: list[Record]) -> dict[str, Value]:
    """Return what a reader has in the end who ignores epochs below the highest seen."""
    found, highest = dict[str, Value](), 0
    for key, epoch, value in rows(events):
        if epoch >= highest:
            found[key], highest = value, epoch
    return found


def trouble(world: World) -> str:
    """Run and return what the checkers find, "" when all is as it should be."""
    asyncio.run(world.run())
    counts = check_settled(PROJECT, CONFIG, [r for p in range(PARTITIONS) for r in world.events(p)])
    if not counts.closes() or counts.values < 20:
        return str(counts)
    for partition in range(PARTITIONS):
        newest: dict[str, Value] = {}
        for key, _, value in rows(world.events(partition)):
            newest[key] = max(newest.get(key, (-1, [])), value)
        if taken(world.events(partition)) != newest:
            return f"a reader of partition {partition} misses values"
    return ""


@pytest.mark.parametrize("block", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))])
def test_values_flow_on_and_none_is_missed_whoever_overlaps(block: int):
    most = replaced = 0
    for seed in range(8 * block, 8 * block + 8):
        world = World(seed)
        assert trouble(world) == "", seed
        most, replaced = max(most, world.most), replaced + world.replaced
    assert most >= 3 and replaced >= 2, "three overlapped, and some found that they were replaced"


class EpochOfItsClock(AggregateStage):
    """Takes its host's clock for the epoch, as release 0.1 did."""

    async def _restore(self):
        state = await super()._restore()
        self._epochs, self.epoch = None, max(self.deps.clock.now_ms(), state.epoch_seen)
        state.epoch_seen = self.epoch
        return state


def test_epochs_of_the_hosts_clocks_are_caught():
    assert any(trouble(World(seed, EpochOfItsClock)) for seed in range(20))
