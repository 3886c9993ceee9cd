"""The stream stage: one pure join a partition, its samples to Kafka, its state to the store.

1. Apply a record; send the samples that it resolved, with `after`, `last` and `spec`.
2. Every `join.snapshot_ms` encode the state at its offset.
3. When all samples sent up to then have their receipts, store the state, atomically.
4. Then, and only then, let Faust commit up to that offset; keep the three newest states.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from headrace.contract.blobs import Blobs
from headrace.contract.clock import Clock
from headrace.contract.config import Config
from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.events import encode_batch
from headrace.contract.log import Producer, Record
from headrace.contract.metrics import Metrics
from headrace.contract.positions import Position
from headrace.contract.project import Project
from headrace.contract.sample import format_position
from headrace.contract.topics import Topics
from headrace.stream.engine import Engine
from headrace.stream.join import Emitted, JoinState
from headrace.stream.state import encode_state, load_state

log = logging.getLogger("headrace.stream")

T = TypeVar("T")

STATES_KEPT = 3
RECORD_ROWS = 20_000
"""Most samples in one record; an expiry of a backlog is cut."""
METRICS_S = 1.0


@dataclass
class _Part:
    state: JoinState
    due_s: float
    sent: int = 0
    delivered: int = 0
    stored: int = -1
    storing: asyncio.Task[None] | None = None
    names: list[str] = field(default_factory=list)


class StreamStage:
    """The shell around `JoinState`; see the module for the protocol."""

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
        self.parts: dict[int, _Part] = {}
        self._failure: Exception | None = None
        # A blob store serves one thread at a time.
        self._blob_lock = asyncio.Lock()
        self._metrics_due_s = 0.0
        self._digest = project.features.digest()

    async def begin(self, partition: int) -> int | None:
        """Restore the newest readable state."""
        state = JoinState(self.project, self.config.join, silent_ms=self.config.ingest.silent_ms, partition=partition)
        folder = self._folder(partition)
        names = sorted(await self._blob(partial(self.blobs.list, folder)), key=_offset_of)
        for name in reversed(names):
            data = await self._blob(partial(self.blobs.get, f"{folder}/{_base(name)}"))
            try:
                if data is None:
                    continue
                load_state(state, data)
                break
            except (zlib.error, msgspec.DecodeError) as error:
                log.error("%s/%s is damaged (%s); taking the one before", folder, name, error)
        snapshot_s = self.config.join.snapshot_ms / 1000
        due_s = self.clock.monotonic() + snapshot_s * (1 + partition % 4 / 4)
        self.parts[partition] = _Part(state, due_s, stored=state.offset, names=[_base(n) for n in names])
        return state.offset + 1 if state.offset >= 0 else None

    async def take(self, record: Record) -> None:
        """Join one record and send what it resolved."""
        part = self.parts[record.partition]
        emitted = part.state.take(record)
        self.metrics.add("records_read_total")
        if emitted is not None:
            for piece in _pieces(emitted):
                await self._send(part, record.partition, piece)
            self.metrics.add("samples_emitted_total", emitted.batch.num_rows)

    async def tick(self) -> None:
        """Run receipts, begin snapshots that are due, show numbers."""
        self.producer.poll(0.0)
        if self._failure is not None:
            raise self._failure
        now_s = self.clock.monotonic()
        for partition, part in self.parts.items():
            if now_s >= part.due_s and part.storing is None:
                part.due_s = now_s + self.config.join.snapshot_ms / 1000
                self._snapshot(partition, part)
        if now_s >= self._metrics_due_s:
            self._metrics_due_s = now_s + METRICS_S
            self._show()

    def drop(self, partitions: set[int]) -> None:
        """Forget revoked partitions; what they sent is sent again by the new owner, with the same positions."""
        for partition in partitions:
            part = self.parts.pop(partition, None)
            if part is not None and part.storing is not None:
                part.storing.cancel()

    async def finish(self) -> None:
        """Store the state of every partition."""
        for partition, part in self.parts.items():
            if part.storing is None:
                self._snapshot(partition, part)
        tasks = [part.storing for part in self.parts.values() if part.storing is not None]
        waiting = asyncio.gather(*tasks, return_exceptions=True)
        while not waiting.done():
            self.producer.poll(0.0)
            await asyncio.sleep(0.005)

    async def _blob(self, work: Callable[[], T]) -> T:
        async with self._blob_lock:
            return await asyncio.to_thread(work)

    async def _send(self, part: _Part, partition: int, emitted: Emitted) -> None:
        headers = {
            "after": format_position(emitted.after),
            "last": format_position(emitted.last),
            "spec": self._digest,
        }

        def delivered(error: Exception | None, _offset: int) -> None:
            part.delivered += 1
            if error is not None:
                self._failure = error

        value = encode_batch(emitted.batch)
        while True:
            try:
                self.producer.send(self.topics.samples, partition, value, headers=headers, delivered=delivered)
                break
            except Overloaded:
                self.producer.poll(0.0)
                await asyncio.sleep(0.01)
        part.sent += 1
        self.producer.poll(0.0)

    def _snapshot(self, partition: int, part: _Part) -> None:
        if part.state.offset > part.stored:
            data = encode_state(part.state)
            part.storing = asyncio.ensure_future(self._store(partition, part, part.state.offset, part.sent, data))

    async def _store(self, partition: int, part: _Part, offset: int, sent: int, data: bytes) -> None:
        try:
            while part.delivered < sent:
                await asyncio.sleep(0.005)
            name = f"{offset:020d}"
            folder = self._folder(partition)
            await self._blob(partial(self.blobs.put, f"{folder}/{name}", data))
            part.stored = offset
            part.names.append(name)
            if self.engine is not None and self.parts.get(partition) is part:
                self.engine.acknowledge(partition, offset)
            while len(part.names) > STATES_KEPT:
                old = f"{folder}/{part.names.pop(0)}"
                await self._blob(partial(self.blobs.delete, old))
            self.metrics.add("state_snapshots_total")
        except Unavailable as error:
            self._failure = error
        finally:
            part.storing = None

    def _folder(self, partition: int) -> str:
        return f"state/stream/g{self.topics.generation}/{partition}"

    def _show(self) -> None:
        states = [part.state for part in self.parts.values()]
        if not states:
            return
        self.metrics.set("pending_impressions", sum(len(s.waiting) for s in states))
        self.metrics.set("pending_feedback", sum(s.early_rows for s in states))
        self.metrics.set("watermark_ms", min(s.watermark.time_ms for s in states))
        if self.engine is not None:
            self.metrics.set("lag_records", self.engine.lag())


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
    """Join until `stop`; return the exit status."""
    stage = StreamStage(project, config, topics, producer, blobs, metrics, clock)
    name = f"headrace-stream-g{topics.generation}"
    stage.engine = Engine(name, brokers, topics.events, config.log.partitions, datadir)
    return stage.engine.run(stage, stop, ready)


def _pieces(emitted: Emitted) -> list[Emitted]:
    rows = emitted.batch.num_rows
    if rows <= RECORD_ROWS:
        return [emitted]
    offset = emitted.last.offset
    pieces: list[Emitted] = []
    after = emitted.after
    for start in range(0, rows, RECORD_ROWS):
        part = emitted.batch.slice(start, RECORD_ROWS)
        last = Position(offset, start + part.num_rows - 1)
        pieces.append(Emitted(part, after, last))
        after = last
    return pieces


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _offset_of(name: str) -> int:
    return int(_base(name))
