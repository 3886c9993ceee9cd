"""A small world for the trainer's tests: a project, samples from a seed, a memory log, a process to be killed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.spans import cut_hours
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog, MemoryReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import TrainConfig
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.formats.sample import list_column, sample_schema
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs, Pieces, whole
from headrace.contract.interfaces.lake import LakeLayout, SpanMs, StoredHour, StoredSpan
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, FeatureSpec, Numeric
from headrace.process.call_watch import CallWatch
from headrace.stream.features.featurize import featurize
from headrace.trainer.commit.checkpoint import Checkpoint, CheckpointManifest, encode_manifest, folder_of, parts_of
from headrace.trainer.commit.checkpointer import made_here
from headrace.trainer.commit.parts import Arrays, Part, encode_part, grouped
from headrace.trainer.commit.retention import Retention
from headrace.trainer.dependencies import Dependencies
from headrace.trainer.run import Trainer

PARTITIONS, HOUR_MS = 3, 3_600_000
PROJECT = Project(
    name="small",
    impression=ImpressionType(
        tag="t.impression", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="t.click", fields={}),),
    tasks=(Task(name="click", feedback="click", window_ms=1_000),),
    features=FeatureSpec(
        features=(Categorical(field="user"), Categorical(field="item"), Numeric(field="price", scale=0.1))
    ),
    recipe=Recipe(dim=4, hidden=(8,), batch_rows=32),
).checked()
TOPICS = Topics()


class Killed(BaseException):
    """The process died here: nothing that it had in memory remains."""


def ended(why: str) -> None:
    """End the process that a call did not come back to, as `end_process` does."""
    raise Killed(why)


class FaultyBlobs:
    """A dictionary; `away` makes every call fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, name: str, data: bytes | Pieces) -> None:
        self.objects[name] = whole(data)

    def get(self, name: str) -> bytes | None:
        return self.objects.get(name)

    def list(self, prefix: str) -> list[str]:
        return sorted(n for n in self.objects if n.rpartition("/")[0] == prefix)

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)


def samples(seed: int, partition: int, count: int, *, offset: int = 0, spec: str | None = None) -> pa.RecordBatch:
    """Return `count` samples of one partition, one position each, from a seed."""
    rng = np.random.default_rng([seed, partition, offset])
    user, item = rng.integers(0, 40, count), rng.integers(0, 15, count)
    label = (rng.random(count) < 1 / (1 + np.exp(-((user % 5) + (item % 3) - 3.0)))).astype(np.float32)
    at = np.arange(count, dtype=np.int64)
    time_ms = 1_000_000 + (offset + at) * 20 + partition
    raw = pa.RecordBatch.from_pydict(
        {"user": pa.array(user), "item": pa.array(item), "price": pa.array(rng.random(count) * 50)}
    )
    slots_NF, numeric_ND = featurize(raw, PROJECT.features)
    ids = [f"{partition}-{offset + i}" for i in range(count)]
    columns = {
        "partition": pa.array([partition] * count, pa.int32()),
        "offset": pa.array((offset + at) // 3),
        "rank": pa.array(((offset + at) % 3).astype(np.int32)),
        "event_id": pa.array(ids),
        "request_id": pa.array(ids),
        "place": pa.array([0] * count, pa.int32()),
        "key": pa.array([str(u) for u in user]),
        "event_time_ms": pa.array(time_ms),
        "impression_offset": pa.array(offset + at),
        "impression_row": pa.array([0] * count, pa.int32()),
        "task": pa.array(["click"] * count),
        "label": pa.array(label),
        "weight": pa.array(np.ones(count, np.float32)),
        "feedback_id": pa.array([None] * count, pa.string()),
        "feedback_time_ms": pa.array([int(t) + 100 if y else None for t, y in zip(time_ms, label, strict=True)]),
        "version": pa.array([None] * count, pa.string()),
        "user": raw["user"],
        "item": raw["item"],
        "price": raw["price"],
        "slots": list_column(slots_NF, pa.int64()),
        "numeric": list_column(numeric_ND, pa.float32()),
        "spec": pa.array([spec or PROJECT.features.digest()] * count),
        "correction": pa.array([None] * count, pa.bool_()),
        "value": pa.array([None] * count, pa.float64()),
    }
    schema = sample_schema(PROJECT)
    return pa.RecordBatch.from_arrays(
        [columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema
    )


def send(log: MemoryLog, batch: pa.RecordBatch, *, after: tuple[int, int]) -> tuple[int, int]:
    """Append one `samples` record and return its last position."""
    last = (batch["offset"][-1].as_py(), batch["rank"][-1].as_py())
    headers = {"after": f"{after[0]}:{after[1]}", "last": f"{last[0]}:{last[1]}", "spec": batch["spec"][0].as_py()}
    log.append(TOPICS.samples, batch["partition"][0].as_py(), encode_batch(batch), None, headers)
    return last


def cut(seed: int, partition: int, count: int) -> list[tuple[pa.RecordBatch, tuple[int, int]]]:
    """Return a partition's samples as records of random lengths, each with its `after`."""
    rng, whole = Random(f"{seed}/{partition}"), samples(seed, partition, count)
    records, at, after = [], 0, (-1, -1)
    while at < count:
        rows = whole.slice(at, rng.randint(1, 40))
        records.append((rows, after))
        after = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
        at += rows.num_rows
    return records


@dataclass
class Lake:
    """A lake of given rows."""

    rows: pa.Table
    positions: Positions
    next_offsets: dict[int, int]
    version: int = 5
    retained_before_ms: int = 0

    def state(self, version: int | None = None) -> Lake:
        return self

    def read(
        self, version: int | None = None, columns: Sequence[str] | None = None, *, span_ms: SpanMs | None = None
    ) -> pa.Table:
        rows = self.rows
        if span_ms is not None:
            times = rows["event_time_ms"]
            rows = rows.filter(pc.and_(pc.greater_equal(times, span_ms[0]), pc.less(times, span_ms[1])))
        return rows if columns is None else rows.select(columns)

    def layout(self, version: int) -> LakeLayout:
        hour_H, rows_H = np.unique(self.rows["event_time_ms"].to_numpy() // HOUR_MS, return_counts=True)
        hours = [StoredHour(h * HOUR_MS, rows) for h, rows in zip(hour_H.tolist(), rows_H.tolist(), strict=True)]
        return LakeLayout(tuple(self.rows.column_names), tuple(hours))

    def spans(self, version: int, rows_max: int, *, within_ms: SpanMs | None = None) -> list[StoredSpan]:
        def times_in(span_ms: SpanMs) -> list[npt.NDArray[np.int64]]:
            return [self.read(version, ["event_time_ms"], span_ms=span_ms)["event_time_ms"].to_numpy()]

        return cut_hours(self.layout(version).hours, rows_max, times_in, within_ms)

    def hold(self, version: int, holder: str) -> None:
        """Nothing is deleted here."""

    def let_go(self, holder: str) -> None:
        """Nothing is leased here."""


class _ReadsAtOnce(MemoryReader):
    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        return super().poll(records_max, 0.0)


class QuickLog(MemoryLog):
    """A log whose readers never wait: nobody else writes meanwhile, and time is turned by hand."""

    def reader(self) -> MemoryReader:
        return _ReadsAtOnce(self)


@dataclass
class World:
    """What outlives a process: the log, the store, who writes the steps, time."""

    lake: Lake | None = None
    log: MemoryLog = field(default_factory=lambda: QuickLog(lambda: 0))
    blobs: FaultyBlobs = field(default_factory=FaultyBlobs)
    epochs: WriterEpochs = field(default_factory=WriterEpochs)
    clock: VirtualClock = field(default_factory=lambda: VirtualClock(1_000_000))
    stopped: bool = False

    def __post_init__(self) -> None:
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))

    def is_set(self) -> bool:
        return self.stopped

    def deps(self, **changes: object) -> Dependencies:
        """Return a new process's dependencies."""
        project = changes.get("project", PROJECT)
        assert isinstance(project, Project)
        topics = TOPICS.of(project.model)
        values: dict[str, object] = {
            "project": project,
            "config": TrainConfig(
                wait_ms=20, publish_ms=100, snapshot_ms=2_000, checkpoint_ms=2_000, lake_bytes=30_000
            ),
            "topics": topics,
            "reader": self.log.reader(),
            "producer": self.log.producer(),
            "steps_writer": FencedMemory(self.log, topics.steps, f"steps-{project.model}", self.epochs),
            "blobs": self.blobs,
            "metrics": MemoryMetrics(),
            "clock": self.clock,
            "stop": self,
            "calls": CallWatch(self.clock.monotonic, ended, by_itself=False),
            "lake": self.lake,
            "background": False,
        }
        return Dependencies(**{**values, **changes})  # type: ignore[arg-type]

    def drain(self, trainer: Trainer) -> None:
        """Turn until all that lies in the topic is learnt and published."""
        idle = 0
        while idle < 4:
            idle = 0 if trainer.turn() else idle + 1
            self.clock.advance(0.03)


def as_one_blob(checkpoint: Checkpoint) -> bytes:
    """Return a checkpoint as it was stored before there were parts."""
    arrays = {f"learner/{name}": array for name, array in checkpoint.learner.items()}
    arrays |= {f"evaluation/{name}": array for name, array in checkpoint.evaluation.items()}
    arrays["meta"] = np.frombuffer(msgspec.json.encode(checkpoint.meta), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return b"HRCKPT1\n" + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def store_checkpoint(blobs: Blobs, model: str, checkpoint: Checkpoint, *, seq: int = 1) -> str:
    """Store a checkpoint all of whose arrays lie in parts by themselves, delete old ones, return its name."""

    def put(arrays: Arrays) -> Part:
        encoded = encode_part(checkpoint.meta.run, arrays)
        blobs.put(f"{parts_of(model)}/{encoded.part.name}", encoded.pieces)
        return encoded.part

    name, data = encode_manifest(
        CheckpointManifest(
            seq=seq,
            meta=checkpoint.meta,
            learner=tuple(map(put, grouped(checkpoint.learner))),
            evaluation=tuple(map(put, grouped(checkpoint.evaluation))),
            tables={},
            positions={},
            spec_json="",
            recipe_json="",
            made_by=made_here(1),
        )
    )
    blobs.put(f"{folder_of(model)}/{name}", data)
    Retention(blobs, model).retire(checkpoint.meta.run)
    return name


COUNT = 200
"""Samples of a partition in `learnt`."""


def lake_of(seed: int, records: int, count: int = COUNT) -> Lake:
    """Return a lake of each partition's first records, of `count` samples each."""
    batches, upto, offsets = [], {}, {}
    for partition in range(PARTITIONS):
        taken = cut(seed, partition, count)[:records]
        batches += [rows for rows, _ in taken]
        upto[partition] = Position(taken[-1][0]["offset"][-1].as_py(), taken[-1][0]["rank"][-1].as_py())
        offsets[partition] = len(taken)
    return Lake(pa.Table.from_batches(batches), Positions(1, upto), offsets)


def learnt(seed: int, lake: Lake | None = None) -> tuple[World, Trainer]:
    """Return a world whose samples a trainer has learnt, and that trainer, closed."""
    world = World(lake=lake)
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    trainer.close()
    return world, trainer
