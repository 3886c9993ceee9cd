"""Goal: how partitions take turns changes nothing, whoever owns them. Method: three partitions, faults from a seed.

Records arrive partition by partition in any interleaving; one partition is held back for a while; one is idle, where
nothing but punctuation comes. Two workers share the partitions, which move between them; whoever loses one may go on
writing. An aggregator reads all of it and writes into all of it, is killed, or declared dead and writes on. Checkers
stand outside: samples, by position, are those of one undisturbed pass over each partition; every aggregate is counted
again from the events (replay/ledger/settled.py). Then bugs are planted, and each must be caught.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from join_world import PROJECT, records, traffic
from stream_world import Blobs, LaggingProducer, read_samples

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import AggregateConfig, Config, IngestConfig, JoinConfig, LogConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import AGGREGATE, AGGREGATE_SCHEMA, Punctuation, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.process import waits
from headrace.replay.ledger.settled import check_settled
from headrace.stream.aggregate.core import AggregatorState
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.join.join import JoinState
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import DurableState
from headrace.stream.shell.join_stage import StreamStage

PARTITIONS, IDLE, ROWS, GRID_MS = 3, 2, 90, 100
JOIN = JoinConfig(early_feedback_ms=400, resolved_ms=1_600, repeat_horizon_ms=3_600_000, snapshot_ms=100)
CONFIG = Config(
    log=LogConfig(partitions=PARTITIONS),
    join=JOIN,
    ingest=IngestConfig(silent_ms=300),
    aggregate=AggregateConfig(grid_ms=GRID_MS, snapshot_ms=100),
)
TOPICS = Topics()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Threads answer a turn of the loop later, and a sleep is a turn: a seed says all that happens."""
    turn = asyncio.sleep

    async def sleep(_: float) -> None:
        await turn(0)

    async def in_thread(_what: str, work: Any) -> Any:
        await turn(0)
        return work()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(waits, "in_thread", in_thread)


def arrivals(seed: int) -> list[list[Record]]:
    """Return what services and gateways will append to each partition, in its order."""
    made = []
    for partition in range(PARTITIONS):
        items = [item for item in traffic(seed * PARTITIONS + partition, ROWS) if item[0] != "aggregate"]
        if partition == IDLE:
            items = [item for item in items if item[0] == "time"]
        # At the end time goes on for two windows, so that everything expires and every counter empties.
        items += [("time", Punctuation(g, 1, 12_000 + 400 * step)) for step in range(16) for g in "ab"]
        made.append(records(items, Random(seed + partition)))
    return made


class Worker:
    """One process: a stage, its producer, and where it reads each partition that it believes to own."""

    def __init__(self, world: World, stage: StreamStage | AggregateStage, producer: LaggingProducer) -> None:
        self.world, self.stage, self.producer = world, stage, producer
        self.next: dict[int, int] = {}
        self.owned: set[int] = set()

    async def step(self, partition: int) -> None:
        """Begin with the partition, or take what a fetch of it brought; then do what is due."""
        if partition not in self.next:
            self.next[partition] = await self.stage.begin(partition) or 0
        at = self.next[partition]
        taken = self.world.events(partition)[at : at + self.world.random.randrange(1, 9)]
        if taken:
            await self.stage.take_all(taken)
            self.next[partition] = taken[-1].offset + 1
        await self.turn()

    async def turn(self) -> None:
        """Let the stage do what is due, and the broker answer now and then."""
        await self.stage.tick()
        for _ in range(self.world.random.randrange(6)):
            await asyncio.sleep(0)
            self.producer.poll(0.0)

    def lose(self, partition: int) -> None:
        """Be told that the partition is somebody else's."""
        self.owned.discard(partition)
        if self.next.pop(partition, None) is not None:
            self.stage.drop({partition})

    def kill(self) -> None:
        """Take everything that was not delivered along."""
        for durable in durable_states(self.stage):
            durable.cancel()


def durable_states(stage: StreamStage | AggregateStage) -> list[DurableState]:
    """Return the states that the stage stores."""
    if isinstance(stage, AggregateStage):
        return [stage.durable]
    return [partition.durable for partition in stage.partitions.values()]


class World:
    """The log, the store, time, and whoever works or should not."""

    def __init__(self, seed: int, stream: type[StreamStage], aggregate: type[AggregateStage]) -> None:
        self.random = Random(seed)
        self.log, self.blobs, self.clock = MemoryLog(lambda: 0), Blobs(), VirtualClock()
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
        self.coming = arrivals(seed)
        self.stream, self.aggregate = stream, aggregate
        self.workers = [self.worker(), self.worker()]
        self.workers[0].owned = {0, IDLE}
        self.workers[1].owned = {1}
        self.aggregator = self.counting()
        self.ghosts: list[Worker] = []

    def worker(self) -> Worker:
        """Start a stream worker."""
        deps, producer = self.dependencies()
        return Worker(self, self.stream(deps), producer)

    def counting(self) -> Worker:
        """Start an aggregator, which owns all partitions."""
        deps, producer = self.dependencies()
        worker = Worker(self, self.aggregate(deps), producer)
        worker.owned = set(range(PARTITIONS))
        return worker

    def dependencies(self) -> tuple[StageDependencies, LaggingProducer]:
        """Return what a new process depends on, and its producer."""
        producer = LaggingProducer(self.log, self.random)
        deps = StageDependencies(
            project=PROJECT,
            config=CONFIG,
            topics=TOPICS,
            producer=producer,
            blobs=self.blobs,
            metrics=MemoryMetrics(),
            clock=self.clock,
            open_reader=self.log.reader,
        )
        return deps, producer

    def events(self, partition: int) -> list[Record]:
        """Return the partition's log so far."""
        return self.log.partitions(TOPICS.events)[partition]

    async def run(self) -> None:
        """Let everything arrive, with faults; then work on until nothing is left to do."""
        held, until = 0, 0
        for turn in range(160):
            self.clock.advance(self.random.random() * 0.05)
            if turn >= until and self.random.random() < 0.1:
                held, until = self.random.randrange(PARTITIONS), turn + self.random.randrange(10, 40)
            self.arrive([p for p in range(PARTITIONS) if p != held or turn >= until])
            for worker in (*self.workers, self.aggregator, *self.ghosts):
                if worker.owned:
                    await self.step(worker, self.random.choice(sorted(worker.owned)))
            self.fault()
        self.arrive(list(range(PARTITIONS)), everything=True)
        for ghost in self.ghosts:
            ghost.kill()
        # What a worker sent and what an aggregator settled arrives in the end.
        while self.busy():
            self.clock.advance(0.05)
            for worker in (self.aggregator, *self.workers):
                for partition in sorted(worker.owned):
                    await self.step(worker, partition)
        for worker in (self.aggregator, *self.workers):
            worker.kill()
        await asyncio.sleep(0)

    async def step(self, worker: Worker, partition: int) -> None:
        """Let somebody work; an aggregator that was replaced stops, and starts anew where it is the one to go on."""
        try:
            await worker.step(partition)
        except Unavailable as error:
            assert "another aggregator took over" in str(error)
            worker.kill()
            if worker is self.aggregator:
                self.aggregator = self.counting()
            else:
                self.ghosts.remove(worker)

    def arrive(self, partitions: list[int], *, everything: bool = False) -> None:
        """Append some records of these partitions, which take turns at random."""
        for _ in range(10**9 if everything else self.random.randrange(6)):
            waiting = [p for p in partitions if self.coming[p]]
            if not waiting:
                return
            partition = self.random.choice(waiting)
            record = self.coming[partition].pop(0)
            self.log.append(TOPICS.events, partition, record.value, record.key, record.headers)

    def fault(self) -> None:
        """Kill somebody, or move a partition, or declare somebody dead who is not."""
        drawn = self.random.random()
        if drawn < 0.04:
            number = self.random.randrange(2)
            dead, heir = self.workers[number], self.worker()
            dead.kill()
            heir.owned, self.workers[number] = dead.owned, heir
        elif drawn < 0.10:
            self.move(self.random.randrange(PARTITIONS), told=self.random.random() < 0.6)
        elif drawn < 0.13:
            self.aggregator.kill()
            self.aggregator = self.counting()
        elif drawn < 0.15:
            self.ghosts.append(self.aggregator)
            self.aggregator = self.counting()
        elif drawn < 0.25 and self.ghosts:
            self.ghosts.pop(0).kill()

    def move(self, partition: int, *, told: bool) -> None:
        """Give a partition to the other worker; who is not told goes on as a ghost, and its process starts anew."""
        number = next(n for n, worker in enumerate(self.workers) if partition in worker.owned)
        loser, winner = self.workers[number], self.workers[1 - number]
        if told:
            loser.lose(partition)
        else:
            self.ghosts.append(loser)
            self.workers[number] = self.worker()
            self.workers[number].owned = loser.owned - {partition}
            loser.owned = {partition} & set(loser.next)
        winner.owned.add(partition)

    def busy(self) -> bool:
        """Say whether anybody has something to read or to deliver."""
        workers = (*self.workers, self.aggregator)
        unread = any(w.next.get(p, 0) < len(self.events(p)) for w in workers for p in w.owned)
        return unread or any(worker.producer.held for worker in workers)


def trouble(world: World) -> str:
    """Return what the checkers find, "" when all is as it should be."""
    for partition in range(PARTITIONS):
        join = JoinState(PROJECT, JOIN, silent_ms=300, partition=partition)
        emitted = [e.batch for record in world.events(partition) if (e := join.take(record)) is not None]
        expected = pa.Table.from_batches(emitted, schema=join.schema)
        if (expected.num_rows == 0) != (partition == IDLE):
            return f"partition {partition} has {expected.num_rows} samples to find"
        if join.totals.tasks[0].waiting:
            return f"partition {partition}: {join.totals.tasks[0].waiting} impressions wait in the end"
        if not read_samples(world.log, partition, join.schema).equals(expected):
            return f"samples of partition {partition} differ"
    counts = check_settled(PROJECT, CONFIG, [r for p in range(PARTITIONS) for r in world.events(p)])
    if not counts.closes() or counts.values < 100:
        return str(counts)
    left = newest_values(world.events(0))
    return "" if not any(any(counts) for counts in left.values()) else f"not decayed: {left}"


def newest_values(events: list[Record]) -> dict[str, list[float]]:
    """Return the newest value of each key."""
    newest: dict[str, tuple[int, list[float]]] = {}
    for record in events:
        if record.headers["kind"] == AGGREGATE:
            for row in decode_batch(record.value or b"", AGGREGATE_SCHEMA).to_pylist():
                newest[row["key"]] = max(newest.get(row["key"], (-1, [])), (row["as_of_ms"], row["counts"]))
    return {key: counts for key, (_, counts) in newest.items()}


def disturbed(
    seed: int, stream: type[StreamStage] = StreamStage, aggregate: type[AggregateStage] = AggregateStage
) -> str:
    """Run a world and return what the checkers find; an exception is caught where a bug was planted."""
    world = World(seed, stream, aggregate)
    try:
        asyncio.run(world.run())
    except Exception as error:
        if (stream, aggregate) == (StreamStage, AggregateStage):
            raise
        return repr(error)
    return trouble(world)


BLOCKS = [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 30))]


@pytest.mark.parametrize("block", BLOCKS)
def test_turns_moves_and_ghosts_change_nothing(block):
    for seed in range(10 * block, 10 * block + 10):
        assert disturbed(seed) == "", f"seed {seed}"


def test_a_partition_that_says_nothing_holds_up_the_aggregates_and_no_other_join():
    """Its gateway's punctuation is missing, too: the others' samples come, values as of later times wait for it."""
    world = World(1, StreamStage, AggregateStage)
    silent = len(world.coming[IDLE]) // 3
    late, world.coming[IDLE] = world.coming[IDLE][silent:], world.coming[IDLE][:silent]
    asyncio.run(world.run())
    assert check_settled(PROJECT, CONFIG, [r for p in range(PARTITIONS) for r in world.events(p)]).closes()
    for partition in (0, 1):
        join = JoinState(PROJECT, JOIN, silent_ms=300, partition=partition)
        emitted = [e.batch for record in world.events(partition) if (e := join.take(record)) is not None]
        assert not join.totals.tasks[0].waiting
        wanted = pa.Table.from_batches(emitted, schema=join.schema)
        assert read_samples(world.log, partition, join.schema).equals(wanted)
        assert join.watermark.time_ms == 18_000
    assert any(any(counts) for counts in newest_values(world.events(0)).values())
    world.coming[IDLE] = late
    asyncio.run(world.run())
    assert trouble(world) == ""


class OneClockForAll(StreamStage):
    """Takes the time of the partition that is furthest for everyone's: it depends on how partitions take turns."""

    async def take_all(self, records):
        newest = max(partition.state.watermark.time_ms for partition in self.partitions.values())
        self.partitions[records[0].partition].state.watermark.time_ms = newest
        await super().take_all(records)


class OffByOne(StreamStage):
    """The new owner of a partition goes on one record too late."""

    async def begin(self, partition):
        following = await super().begin(partition)
        return following if following is None else following + 1


class StoresFirst(DurableState):
    """Stores before it delivers: step 3 comes before step 2."""

    async def _await_receipts(self, sent):
        return


class CommitsBeforeTheEffect(AggregateStage):
    """Stores its state before its values were delivered."""

    durable_state = StoresFirst


class EagerState(AggregatorState):
    """Settles what the partition that is furthest has passed."""

    def _settle(self):
        times = [watermark.time_ms for watermark in self.watermarks]
        for watermark in self.watermarks:
            watermark.time_ms = max(times)
        try:
            return super()._settle()
        finally:
            for watermark, time_ms in zip(self.watermarks, times, strict=True):
                watermark.time_ms = time_ms


class SettlesTooEarly(AggregateStage):
    """Waits for no partition."""

    async def _restore(self):
        state = await super()._restore()
        state.__class__ = EagerState
        return state


class ForgetsARecord(AggregateStage):
    """Goes on one record too late."""

    async def begin(self, partition):
        following = await super().begin(partition)
        return following if following is None else following + 1


@pytest.mark.parametrize(
    ("stream", "aggregate"),
    [
        (OneClockForAll, AggregateStage),
        (OffByOne, AggregateStage),
        (StreamStage, CommitsBeforeTheEffect),
        (StreamStage, SettlesTooEarly),
        (StreamStage, ForgetsARecord),
    ],
)
def test_a_planted_bug_is_caught(stream, aggregate):
    assert any(disturbed(seed, stream, aggregate) for seed in range(12))
