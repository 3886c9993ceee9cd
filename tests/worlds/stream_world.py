"""Workers of the stream stage over a log in memory: they crash, are declared dead and write on, from a seed."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import cached_property
from random import Random
from typing import Any

import pyarrow as pa
from join_world import PROJECT, records, traffic

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, IngestConfig, JoinConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Pieces, whole
from headrace.contract.interfaces.log import Record
from headrace.stream.join.join import JoinState
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import StateStore
from headrace.stream.shell.join_stage import StreamStage

JOIN = JoinConfig(early_feedback_ms=400, resolved_ms=1_600, repeat_horizon_ms=3_200, snapshot_ms=100)
CONFIG = Config(join=JOIN, ingest=IngestConfig(silent_ms=300))


class Blobs:
    """A store in memory that outlives every worker."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {}

    def put(self, name: str, data: bytes | Pieces) -> None:
        self.items[name] = whole(data)

    def get(self, name: str) -> bytes | None:
        return self.items.get(name)

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self.items if name.rsplit("/", 1)[0] == prefix)

    def delete(self, name: str) -> None:
        self.items.pop(name, None)


class LaggingProducer:
    """Appends some time after `send`, in order; what it holds dies with its worker."""

    def __init__(self, log: MemoryLog, random: Random) -> None:
        self.log, self.random = log, random
        self.held: deque[Any] = deque()

    def send(self, topic, partition, value, *, key=None, headers=None, delivered=None) -> None:
        self.held.append((topic, partition, value, key, headers or {}, delivered))

    def poll(self, timeout_s: float) -> None:
        while self.held and self.random.random() < 0.3:
            *record, delivered = self.held.popleft()
            delivered(None, self.log.append(*record))


class QuickStore(StateStore):
    """A store that answers a turn of the loop later, without a thread: a seed says all that happens."""

    async def run(self, what, work, max_s=0.0):
        await asyncio.sleep(0)
        return work()


class Stage(StreamStage):
    """The stage, whose store answers a turn of the loop later."""

    def __init__(self, deps: StageDependencies, **kwargs: Any) -> None:
        super().__init__(deps, **kwargs)
        self._store = QuickStore(deps.blobs, self._waits)


class Worker:
    """One process: a stage, its producer, and where it reads."""

    def __init__(self, world: World, stage_type: type[Stage]) -> None:
        self.world = world
        self.producer = LaggingProducer(world.log, world.random)
        self.stage = stage_type(
            StageDependencies(
                project=PROJECT,
                config=CONFIG,
                topics=Topics(),
                producer=self.producer,
                blobs=world.blobs,
                metrics=MemoryMetrics(),
                clock=world.clock,
                open_reader=world.log.reader,
            )
        )
        self.next: int | None = None

    async def step(self) -> None:
        """Begin, or join what a fetch brought, and let the stage do what is due."""
        if self.next is None:
            self.next = await self.stage.begin(0) or 0
        taken = self.world.events[self.next : self.next + self.world.random.randrange(1, 6)]
        if taken:
            await self.stage.take_all(taken)
            self.next = taken[-1].offset + 1
        await self.stage.tick()
        for _ in range(self.world.random.randrange(8)):
            await asyncio.sleep(0)
            self.producer.poll(0.0)
        if self.world.random.random() < 0.1:
            # Longer than a store waits between two looks at its receipts.
            await asyncio.sleep(0.006)

    def kill(self) -> None:
        """Take everything that was not delivered along."""
        for partition in self.stage.partitions.values():
            partition.durable.cancel()


class World:
    """The log, the store, time, and whoever works or should not."""

    def __init__(self, seed: int, stage_type: type[Stage] = Stage, *, loses_end: bool = False) -> None:
        """`loses_end`: the broker loses the end of `samples` now and then."""
        self.random = Random(seed)
        self.events: list[Record] = records(traffic(seed, 250), Random(seed))
        self.log, self.blobs, self.clock = MemoryLog(lambda: 0), Blobs(), VirtualClock()
        self.log.admin().ensure_topics(Topics().specs(1))
        self.stage_type, self.loses_end, self.went_back = stage_type, loses_end, 0

    def lose_end(self) -> None:
        """Let the broker lose the last samples, few or many, which it had confirmed."""
        topic = Topics().samples
        end = len(self.log.partitions(topic)[0])
        self.log.cut(topic, 0, end - min(end, int(self.random.paretovariate(0.7))))

    async def run(self) -> None:
        """Work through the log, with faults; at last one worker goes on to the end."""
        self.log.topics[Topics().events][0] = list(self.events)
        worker, ghosts = Worker(self, self.stage_type), list[Worker]()
        for _ in range(400):
            self.clock.advance(self.random.random() * 0.05)
            if self.loses_end and self.random.random() < 0.03:
                self.lose_end()
            try:
                await worker.step()
            except Unavailable:
                # As its supervisor does.
                worker.kill()
                worker = Worker(self, self.stage_type)
                self.went_back += 1
            fault = self.random.random()
            if fault < 0.04:
                worker.kill()
                worker = Worker(self, self.stage_type)
            elif fault < 0.07:
                ghosts.append(worker)
                worker = Worker(self, self.stage_type)
            for ghost in list(ghosts):
                try:
                    await ghost.step()
                    gone = self.random.random() < 0.3
                except Unavailable:
                    gone = True
                if gone:
                    ghost.kill()
                    ghosts.remove(ghost)
        for ghost in ghosts:
            ghost.kill()
        worker.kill()
        last = Worker(self, self.stage_type)
        while last.next is None or last.next < len(self.events) or last.producer.held:
            self.clock.advance(0.01)
            await last.step()
        last.kill()
        await asyncio.sleep(0)

    def read(self) -> pa.Table:
        """Return what a reader takes of `samples`."""
        return read_samples(self.log, 0, self.expected.schema)

    @cached_property
    def expected(self) -> pa.Table:
        """Return what one undisturbed pass gives."""
        join = JoinState(PROJECT, JOIN, silent_ms=300, partition=0)
        emitted = [e.batch for record in self.events if (e := join.take(record)) is not None]
        return pa.Table.from_batches(emitted, schema=join.schema)


def read_samples(log: MemoryLog, partition: int, schema: pa.Schema) -> pa.Table:
    """Return what a reader takes of `samples`, by the rule that all readers follow."""
    position, taken = START, list[pa.RecordBatch]()
    for record in log.partitions(Topics().samples)[partition]:
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
        if after > position or last <= position:
            continue
        batch = decode_batch(record.value or b"")
        at = zip(batch["offset"].to_pylist(), batch["rank"].to_pylist(), strict=True)
        taken.append(batch.filter(pa.array([Position(*place) > position for place in at])))
        position = last
    return pa.Table.from_batches(taken, schema=schema)
