"""The stages of the fault matrix: what each leaves its process for, how a process of it starts, and who checks it."""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Protocol

import pyarrow as pa
import pytest
import trainer_world
from fault_matrix import Process, StageRow, in_thread
from join_world import PROJECT, records, traffic
from stream_world import Blobs as MemoryBlobs
from stream_world import read_samples

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.stage_topics import StageTopics, open_topics
from headrace.contract.config import AggregateConfig, Config, IngestConfig, JoinConfig, LogConfig, SinkConfig
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.lake import LakeWriter
from headrace.contract.interfaces.log import Admin, Producer, Reader, Record
from headrace.process import waits
from headrace.replay.ledger.settled import check_settled
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.join import payload
from headrace.stream.join.join import JoinState
from headrace.stream.join.payload import Spill
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.join_stage import StreamStage
from headrace.stream.sink.stage import SinkStage

PARTITIONS = 2
EVENTS, SAMPLES, SAMPLES_A_RECORD = 50, 80, 2
TAKEN = 4
"""Records that a process reads of a partition at once."""
JOIN = JoinConfig(
    early_feedback_ms=400, resolved_ms=1_600, repeat_horizon_ms=3_600_000, snapshot_ms=100, payload_bytes=1
)
CONFIG = Config(
    log=LogConfig(partitions=PARTITIONS),
    join=JOIN,
    ingest=IngestConfig(silent_ms=300),
    aggregate=AggregateConfig(grid_ms=100, snapshot_ms=100),
    sink=SinkConfig(commit_ms=150),
)
TOPICS = Topics()


class GroupPositions(Protocol):
    """What a stage asks of its consumer group, which Faust keeps."""

    def acknowledge(self, partition: int, upto: int) -> None:
        """Let the group commit the partition's records up to `upto`."""

    def lag(self) -> float:
        """Return how many records lie beyond what was taken, NaN while not known."""

    def end(self, partition: int) -> int | None:
        """Return the partition's end as of the last look."""

    def oldest_unread_ms(self) -> int | None:
        """Return when the oldest record was written that nobody takes."""


class MemoryGroup:
    """The group's positions, which outlive a process."""

    def __init__(self) -> None:
        self.acknowledged: dict[int, int] = {}

    def acknowledge(self, partition: int, upto: int) -> None:
        """Remember how far the group has committed."""
        self.acknowledged[partition] = max(upto, self.acknowledged.get(partition, -1))

    def lag(self) -> float:
        """Nothing hangs on it here."""
        return 0

    def end(self, partition: int) -> int | None:
        """Nobody has looked."""
        return None

    def oldest_unread_ms(self) -> int | None:
        """Everything is taken here."""
        return None


class MemorySpill:
    """Batches that stay in memory."""

    def put(self, name: str, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch."""
        return batch

    def drop(self, name: str) -> None:
        """Nothing was kept."""


class LaggingProducer:
    """Appends at some poll after `send`, in order; what it holds dies with its process."""

    def __init__(self, log: MemoryLog) -> None:
        self.log, self.held = log, deque[Any]()

    def send(self, topic, partition, value, *, key=None, headers=None, delivered=None) -> None:
        self.held.append((topic, partition, value, key, headers or {}, delivered))

    def poll(self, timeout_s: float) -> None:
        # Half of what is held: receipts of one send come in several turns.
        for _ in range((len(self.held) + 1) // 2):
            *record, delivered = self.held.popleft()
            delivered(None, self.log.append(*record))


class Driven:
    """A stage as the engine drives it: partitions begin, their records are handed on in order."""

    def __init__(self, world: _World, process: Process, stage: Any, producer: LaggingProducer | None = None) -> None:
        self.world, self.process, self.stage, self.producer = world, process, stage, producer
        stage.engine = process.wrap(GroupPositions, world.group)
        self.next: dict[int, int] = {}

    async def work(self) -> None:
        for partition in range(PARTITIONS):
            if partition not in self.next:
                wanted = await self.stage.begin(partition)
                acknowledged = self.world.group.acknowledged.get(partition, -1)
                if (wanted or 0) <= acknowledged:
                    raise AssertionError(f"the group is at {acknowledged}, what is stored goes on from {wanted}")
                self.next[partition] = wanted or 0
            some = self.world.log.partitions(self.stage.topic)[partition][self.next[partition] :][:TAKEN]
            if some:
                await self.stage.take_all(some)
                self.next[partition] = some[-1].offset + 1

    async def tick(self) -> None:
        await self.stage.tick()

    async def finish(self) -> None:
        await self.stage.finish()

    def is_busy(self) -> bool:
        log = self.world.log.partitions(self.stage.topic)
        unread = any(self.next.get(p, 0) < len(log[p]) for p in range(PARTITIONS))
        if isinstance(self.stage, SinkStage):
            return unread or self.stage._committing is not None or bool(self.stage.batches)
        durable = [self.stage.durable] if isinstance(self.stage, AggregateStage) else self._of_partitions()
        held = self.producer is not None and bool(self.producer.held)
        return unread or held or any(one.storing is not None for one in durable)

    def _of_partitions(self) -> list[Any]:
        return [partition.durable for partition in self.stage.partitions.values()]


def asked_of_log(
    process: Process, log: MemoryLog, *, ids_of: Sequence[str] = (), kept_of: Sequence[str] = (), partitions: int = 2
) -> StageTopics:
    """Ask the log what a command asks before its stage begins, by an admin that is watched as the command's is."""
    admin = process.calls.wrap("admin", process.wrap(Admin, log.admin()))
    return open_topics(admin, TOPICS, partitions, ids_of=ids_of, kept_of=kept_of)


class _World:
    def __init__(self, reads: str) -> None:
        self.log, self.blobs, self.clock = MemoryLog(lambda: 0), MemoryBlobs(), VirtualClock()
        # What it reads is there; what it writes is created by the stage, as on a new log.
        self.log.admin().ensure_topics([spec for spec in TOPICS.specs(PARTITIONS) if spec.name == reads])
        self.group = MemoryGroup()

    def dependencies(self, process: Process) -> tuple[StageDependencies, LaggingProducer]:
        ids = asked_of_log(process, self.log, ids_of=(TOPICS.events,)).ids
        producer = LaggingProducer(self.log)
        deps = StageDependencies(
            project=PROJECT,
            config=CONFIG,
            topics=TOPICS,
            producer=process.wrap(Producer, producer),
            blobs=process.wrap(Blobs, self.blobs),
            metrics=MemoryMetrics(),
            clock=self.clock,
            open_reader=lambda: process.wrap(Reader, self.log.reader()),
            topic_id=ids[TOPICS.events],
        )
        return deps, producer

    def close(self) -> None:
        """What lies in memory goes by itself."""

    def events(self, partition: int) -> list[Record]:
        return self.log.partitions(TOPICS.events)[partition]


def arrivals(partition: int) -> list[Record]:
    """Return a partition's events: traffic, then time goes on until everything expired and every window is empty."""
    items = [item for item in traffic(partition, EVENTS) if item[0] != "aggregate"]
    items += [("time", Punctuation(g, 1, 11_500 + 400 * step)) for step in range(16) for g in "ab"]
    return records(items, Random(partition))


ARRIVALS = [arrivals(partition) for partition in range(PARTITIONS)]


class EventsWorld(_World):
    """The log of events in memory, read by the join or by the aggregator."""

    def __init__(self) -> None:
        super().__init__(TOPICS.events)
        for partition, coming in enumerate(ARRIVALS):
            for record in coming:
                self.log.append(TOPICS.events, partition, record.value, record.key, record.headers)


class StreamWorld(EventsWorld):
    """The join: samples, read by the rule that all readers follow, are those of one undisturbed pass."""

    def start(self, process: Process) -> Driven:
        deps, producer = self.dependencies(process)
        return Driven(self, process, StreamStage(deps, spill=process.wrap(Spill, MemorySpill())), producer)

    def trouble(self) -> str:
        for partition, expected in enumerate(expected_samples()):
            if not read_samples(self.log, partition, expected.schema).equals(expected):
                return f"samples of partition {partition} differ"
        return ""


class AggregateWorld(EventsWorld):
    """The aggregator: every value in the log is counted again from the events alone."""

    def start(self, process: Process) -> Driven:
        deps, producer = self.dependencies(process)
        return Driven(self, process, AggregateStage(deps), producer)

    def trouble(self) -> str:
        counts = check_settled(PROJECT, CONFIG, [r for p in range(PARTITIONS) for r in self.events(p)])
        return "" if counts.closes() and counts.values >= 20 else str(counts)


class SinkWorld(_World):
    """The sink on a real Delta table: each sample of the topic is in it once."""

    def __init__(self) -> None:
        super().__init__(TOPICS.samples)
        self.folder = tempfile.TemporaryDirectory()
        self.expected = []
        for partition in range(PARTITIONS):
            whole, after = trainer_world.samples(3, partition, SAMPLES), (-1, -1)
            self.expected += places(whole)
            for begin in range(0, SAMPLES, SAMPLES_A_RECORD):
                after = trainer_world.send(self.log, whole.slice(begin, SAMPLES_A_RECORD), after=after)

    def start(self, process: Process) -> Driven:
        topic = TOPICS.samples
        told = asked_of_log(process, self.log, ids_of=(topic,), kept_of=(topic,))
        lake = process.wrap(LakeWriter, self.lake(samples_id=told.ids[topic]))
        stage = SinkStage(
            *(CONFIG, lake, MemoryMetrics(), self.clock),
            kept_ms=told.kept_ms[topic],
            open_reader=lambda: process.wrap(Reader, self.log.reader()),
        )
        return Driven(self, process, stage)

    def lake(self, *, samples_id: str = "") -> DeltaLake:
        return DeltaLake(str(Path(self.folder.name) / "lake"), partitions=PARTITIONS, samples_id=samples_id)

    def close(self) -> None:
        self.folder.cleanup()

    def trouble(self) -> str:
        lake = self.lake()
        if lake.state() is None:
            return "there is no lake"
        found = places(lake.read(columns=["partition", "offset", "rank"]))
        return "" if sorted(found) == sorted(self.expected) else f"{len(found)} of {len(self.expected)} samples"


def places(rows: pa.Table | pa.RecordBatch) -> list[tuple[int, ...]]:
    """Return where each sample stands."""
    return list(zip(*(rows[name].to_pylist() for name in ("partition", "offset", "rank")), strict=True))


_EXPECTED: list[pa.Table] = []


def expected_samples() -> list[pa.Table]:
    """Return, by partition, what one undisturbed pass gives."""
    for partition in range(len(_EXPECTED), PARTITIONS):
        join = JoinState(PROJECT, JOIN, silent_ms=300, partition=partition)
        coming = [
            Record("events", partition, n, r.key, r.value, r.headers, 0) for n, r in enumerate(ARRIVALS[partition])
        ]
        emitted = [e.batch for record in coming if (e := join.take(record)) is not None]
        _EXPECTED.append(pa.Table.from_batches(emitted, schema=join.schema))
    return _EXPECTED


_UNDAMAGED = {"GroupPositions.end": "asked behind a damaged record alone"}
_TRAINER = {"Admin.delete_before": "the trainer alone deletes: tests/simulation/trainer/test_steps_archive.py"}
_CLOSED: dict[str, str] = {
    "Producer.flush": "the process flushes by closing",
    "Producer.close": "the command closes it when the stage has ended",
    "GroupPositions.oldest_unread_ms": "the sink alone tells an age",
    "Admin.retention_ms": "the sink alone asks it: the row sink",
    **_TRAINER,
    **_UNDAMAGED,
}
_ONE_RECORD = {"Reader.position": "what it looks for is there: the first record that comes ends the look"}
ROWS = (
    StageRow(
        "stream",
        (Admin, Producer, Blobs, Spill, GroupPositions, Reader),
        StreamWorld,
        {**_CLOSED, **_ONE_RECORD},
    ),
    StageRow("aggregate", (Admin, Producer, Blobs, GroupPositions, Reader), AggregateWorld, _CLOSED),
    StageRow("sink", (Admin, LakeWriter, GroupPositions, Reader), SinkWorld, {**_TRAINER, **_UNDAMAGED, **_ONE_RECORD}),
)


@contextmanager
def no_threads() -> Iterator[None]:
    """Threads answer a turn of the loop later, and a sleep is a turn: the cell says all that happens."""
    turn = asyncio.sleep

    async def sleep(_: float) -> None:
        await turn(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        patch.setattr(payload, "PIECE_ROWS", 8)
        patch.setattr(waits, "in_thread", in_thread)
        patch.setattr(asyncio, "to_thread", lambda work, *args: in_thread("", lambda: work(*args)))
        yield
