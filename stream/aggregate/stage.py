"""The aggregate stage: settled counters into every partition of `events`, and all of them to `features`.

1. Read all partitions of `events`; its own records among them are skipped.
2. Write what a grid point settled: counters over other keys than the partition's to every partition of `events` (epoch
   first, then time), and every counter's buckets to `features`, keyed "<counter>/<key>"; an emptied key is deleted.
3. Every `aggregate.snapshot_ms` encode the state; when all that was sent has its receipts, store it, let Faust commit.

A restart settles the points after its state once more, under a higher epoch and with equal values.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.formats.events import AGGREGATE, AGGREGATE_SCHEMA, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer, Record
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.stream.aggregate.core import AggregatorState, Settled
from headrace.stream.shell.engine import Engine

log = logging.getLogger("headrace.aggregate")

STATES_KEPT = 3
RECORD_ROWS = 5_000


class AggregateStage:
    """The shell around `AggregatorState`; see the module for the protocol."""

    def __init__(
        self,
        project: Project,
        config: Config,
        topics: Topics,
        producer: Producer,
        blobs: Blobs,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self.project, self.config, self.topics = project, config, topics
        self.producer, self.blobs, self.metrics, self.clock = producer, blobs, metrics, clock
        self.engine: Engine | None = None
        self.state: AggregatorState | None = None
        self.epoch = 0
        self._names: list[str] = []
        self._sent = self._delivered = 0
        self._stored: list[int] = []
        self._due_s = 0.0
        self._metrics_due_s = 0.0
        self._storing: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._folder = f"state/aggregate/g{topics.generation}"

    async def begin(self, partition: int) -> int | None:
        """Restore the newest readable state, common to all partitions."""
        if self.state is None:
            self.state = await self._restore()
        offset = self.state.offsets[partition]
        return offset + 1 if offset >= 0 else None

    async def take_all(self, records: Sequence[Record]) -> None:
        """Take records of one partition, in order."""
        for record in records:
            await self.take(record)

    async def take(self, record: Record) -> None:
        """Count one record and write what it settled."""
        if self.state is None:
            raise InvariantBroken("a partition was taken away while others stay: restart, state is restored.")
        self.metrics.add("records_read_total")
        if record.headers.get("kind") == AGGREGATE:
            self.state.offsets[record.partition] = record.offset
            return
        settled = self.state.take(record)
        if settled:
            await self._write(settled)

    async def tick(self) -> None:
        """Run receipts; begin a snapshot that is due."""
        self.producer.poll(0.0)
        if self._failure is not None:
            raise self._failure
        now_s = self.clock.monotonic()
        if self.state is not None and self._storing is None and now_s >= self._due_s:
            self._due_s = now_s + self.config.aggregate.snapshot_ms / 1000
            self._snapshot()
        if self.state is not None and self.engine is not None and now_s >= self._metrics_due_s:
            self._metrics_due_s = now_s + 1.0
            self.metrics.set("lag_records", self.engine.lag())
            self.metrics.set("watermark_ms", min(w.time_ms for w in self.state.watermarks))

    def drop(self, partitions: set[int]) -> None:
        """Forget the state: it is restored with the next assignment."""
        if partitions:
            self.state = None

    async def finish(self) -> None:
        """Store the state."""
        if self._storing is None and self.state is not None:
            self._snapshot()
        while self._storing is not None:
            self.producer.poll(0.0)
            await asyncio.sleep(0.005)

    async def _restore(self) -> AggregatorState:
        aggregate, ingest = self.config.aggregate, self.config.ingest
        state = AggregatorState(
            self.project,
            self.config.log.partitions,
            grid_ms=aggregate.grid_ms,
            silent_ms=ingest.silent_ms,
            horizon_ms=self.config.join.repeat_horizon_ms,
        )
        names = [n.rsplit("/", 1)[-1] for n in await asyncio.to_thread(self.blobs.list, self._folder)]
        self._names = sorted(names)
        for name in reversed(self._names):
            data = await asyncio.to_thread(self.blobs.get, f"{self._folder}/{name}")
            try:
                if data is None:
                    continue
                plain = msgspec.msgpack.decode(zlib.decompress(data))
            except (zlib.error, msgspec.DecodeError) as error:
                log.error("%s/%s is damaged (%s); taking the one before", self._folder, name, error)
                continue
            state.load_plain(plain)
            break
        self.epoch = state.epoch_seen = max(self.clock.now_ms(), state.epoch_seen + 1)
        self._stored = list(state.offsets)
        return state

    async def _write(self, settled: list[Settled]) -> None:
        ours = [s for s in settled if s.is_shared]
        for start in range(0, len(ours), RECORD_ROWS):
            rows = ours[start : start + RECORD_ROWS]
            columns = [
                pa.array([s.counter for s in rows], pa.string()),
                pa.array([s.key for s in rows], pa.string()),
                pa.array([s.as_of_ms for s in rows], pa.int64()),
                pa.array([self.epoch] * len(rows), pa.int64()),
                pa.array([s.counts for s in rows], pa.list_(pa.float32())),
            ]
            value = encode_batch(pa.RecordBatch.from_arrays(columns, schema=AGGREGATE_SCHEMA))
            for partition in range(self.config.log.partitions):
                await self._send(self.topics.events, partition, value, headers={"kind": AGGREGATE})
        for item in settled:
            body = {
                "counter": item.counter,
                "key": item.key,
                "as_of_ms": item.as_of_ms,
                "epoch": self.epoch,
                "bucket_ms": item.bucket_ms,
                "buckets": {str(b): counts for b, counts in item.buckets.items()},
            }
            value_or_gone = msgspec.json.encode(body) if item.buckets else None
            await self._send(self.topics.features, 0, value_or_gone, key=f"{item.counter}/{item.key}".encode())
        self.metrics.add("aggregates_written_total", len(settled))

    async def _send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        while True:
            try:
                self.producer.send(topic, partition, value, key=key, headers=headers, delivered=self._on_delivered)
                break
            except Overloaded:
                self.producer.poll(0.0)
                await asyncio.sleep(0.01)
        self._sent += 1

    def _on_delivered(self, error: Exception | None, _offset: int) -> None:
        self._delivered += 1
        if error is not None:
            self._failure = error

    def _snapshot(self) -> None:
        state = self.state
        if state is None or state.offsets == self._stored:
            return
        data = zlib.compress(msgspec.msgpack.encode(state.to_plain()), 1)
        self._storing = asyncio.ensure_future(self._store(list(state.offsets), self._sent, data))

    async def _store(self, offsets: list[int], sent: int, data: bytes) -> None:
        try:
            while self._delivered < sent:
                await asyncio.sleep(0.005)
            # Offsets only grow, and so does their sum: names sort in the order of the log.
            name = f"{sum(offsets) + len(offsets):020d}"
            await asyncio.to_thread(self.blobs.put, f"{self._folder}/{name}", data)
            self._stored = offsets
            if name not in self._names:
                self._names.append(name)
            for partition, offset in enumerate(offsets):
                if self.engine is not None:
                    self.engine.acknowledge(partition, offset)
            while len(self._names) > STATES_KEPT:
                await asyncio.to_thread(partial(self.blobs.delete, f"{self._folder}/{self._names.pop(0)}"))
            self.metrics.add("state_snapshots_total")
        except Unavailable as error:
            self._failure = error
        finally:
            self._storing = None


def run(
    project: Project,
    config: Config,
    topics: Topics,
    brokers: str,
    producer: Producer,
    blobs: Blobs,
    metrics: Metrics,
    clock: Clock,
    datadir: Path,
    stop: threading.Event,
    ready: Callable[[bool, str], None],
) -> int:
    """Aggregate until `stop`; return the exit status."""
    stage = AggregateStage(project, config, topics, producer, blobs, metrics, clock)
    name = f"headrace-aggregate-g{topics.generation}"
    stage.engine = Engine(name, brokers, topics.events, config.log.partitions, datadir)
    return stage.engine.run(stage, stop, ready)
