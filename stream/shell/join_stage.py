"""The stream stage: one pure join a partition, its samples to Kafka, its state to the store.

1. Apply records, as many at once as wait; send the samples that they resolved, with `after`, `last` and `spec`.
2. Every `join.snapshot_ms` take the state at its offset.
3. When all samples sent up to then have their receipts, store the state: its new parts, then its manifest, atomically.
4. Then, and only then, let Faust commit up to that offset; keep the three newest manifests and the parts they need.

The rules that impressions are read by come from the log: those of change 1, then each change where it lies. What the
project on disk declares is only compared with them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow.compute as pc

from headrace.contract.config import Config
from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import format_position
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer, Record
from headrace.contract.metrics import Metrics, Name
from headrace.contract.project import Project
from headrace.contract.rules import Rules, differences, rules_of
from headrace.stream.join.join import JoinState
from headrace.stream.join.outcome import Emitted, TaskCounts
from headrace.stream.join.payload import Spill
from headrace.stream.join.state import Damaged, Snapshot, StateWriter, load, part_names, read_manifest
from headrace.stream.shell.engine import Engine

log = logging.getLogger("headrace.stream")

T = TypeVar("T")

STATES_KEPT = 3
RECORD_ROWS = 20_000
"""Most samples in one record; an expiry of a backlog is cut."""
METRICS_S = 1.0
_TOTALS: tuple[tuple[Name, str], ...] = (
    ("positives_total", "positives"),
    ("negatives_total", "negatives"),
    ("feedback_duplicate_total", "duplicate"),
    ("feedback_late_total", "late"),
    ("feedback_orphan_total", "orphans"),
)


@dataclass
class _Part:
    state: JoinState
    writer: StateWriter
    due_s: float
    shown: list[TaskCounts]
    sent: int = 0
    delivered: int = 0
    stored: int = -1
    storing: asyncio.Task[None] | None = None
    manifests: dict[str, list[str]] = field(default_factory=dict)
    """Names of the kept manifests, oldest first, and of the parts that each needs."""


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
        spill: Spill | None = None,
        declared: Rules | None = None,
    ) -> None:
        self.project, self.config, self.topics = project, config, topics
        self.declared = rules_of(project) if declared is None else declared
        """What the project on disk says, where that is not `project`, whose rules the log begins with; after a change,
        what the worker would find there, if it had said before what was in force."""
        self.producer, self.blobs, self.metrics, self.clock, self.spill = producer, blobs, metrics, clock, spill
        self.engine: Engine | None = None
        self.parts: dict[int, _Part] = {}
        self._failure: Exception | None = None
        # A blob store serves one thread at a time.
        self._blob_lock = asyncio.Lock()
        self._metrics_due_s = 0.0

    async def begin(self, partition: int) -> int | None:
        """Restore the newest readable state."""
        folder = self._folder(partition)
        names = sorted(await self._blob(partial(self.blobs.list, folder)), key=_offset_of)
        manifests: dict[str, list[str]] = {}
        restored: tuple[JoinState, StateWriter] | None = None
        for name in reversed(names):
            data = await self._blob(partial(self.blobs.get, f"{folder}/{_base(name)}"))
            try:
                if data is None:
                    continue
                plain = await asyncio.to_thread(read_manifest, data)
                manifests[_base(name)] = part_names(plain)
                if restored is None:
                    state = self._new_state(partition)
                    restored = state, await self._blob(partial(load, state, plain, partial(self._part, partition)))
            except Damaged as error:
                log.error("%s/%s is damaged (%s); taking the one before", folder, name, error)
        if restored is None:
            state = self._new_state(partition)
            restored = state, StateWriter(state)
        state, writer = restored
        snapshot_s = self.config.join.snapshot_ms / 1000
        due_s = self.clock.monotonic() + snapshot_s * (1 + partition % 4 / 4)
        kept = dict(sorted(manifests.items(), key=lambda item: _offset_of(item[0])))
        self.parts[partition] = _Part(state, writer, due_s, state.totals.tasks, stored=state.offset, manifests=kept)
        self._tell_rules(partition, state, None)
        return state.offset + 1 if state.offset >= 0 else None

    async def take_all(self, records: Sequence[Record]) -> None:
        """Join records of one partition, in order, and send what they resolved."""
        partition = records[0].partition
        part = self.parts[partition]
        before = part.state.era
        emitted = part.state.take_all(records)
        if part.state.era.number != before.number:
            self._tell_rules(partition, part.state, before.rules)
        self.metrics.add("records_read_total", len(records))
        if emitted is not None:
            pieces = _pieces(emitted)
            # Counted before they are sent: no state is stored while one of them still waits for room.
            part.sent += len(pieces)
            for piece in pieces:
                await self._send(part, partition, piece)
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
            if part is not None:
                part.state.payload.clear()
                if part.storing is not None:
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

    def _tell_rules(self, partition: int, state: JoinState, before: Rules | None) -> None:
        """Log what the partition is read by; `before` are the rules until now, unless the worker just began."""
        rules = state.era.rules
        log.info("partition %d is read by rules %s (change %d)", partition, rules.digest(), state.era.number)
        # A worker that was in line with the log before a change has the project of before: nothing hangs on that.
        if before == self.declared:
            self.declared = rules
        if lines := differences(rules, self.declared):
            log.warning(
                "partition %d: the project that this worker was started with (%s) differs from the rules in the log, "
                "and the log counts. It would change:\n  %s\n`headrace spec apply` puts it in force.",
                partition,
                self.declared.digest(),
                "\n  ".join(lines),
            )

    def _new_state(self, partition: int) -> JoinState:
        silent_ms = self.config.ingest.silent_ms
        return JoinState(self.project, self.config.join, silent_ms=silent_ms, partition=partition, spill=self.spill)

    def _part(self, partition: int, name: str) -> bytes | None:
        return self.blobs.get(f"{self._folder(partition, parts=True)}/{name}")

    async def _blob(self, work: Callable[[], T]) -> T:
        async with self._blob_lock:
            return await asyncio.to_thread(work)

    async def _send(self, part: _Part, partition: int, emitted: Emitted) -> None:
        headers = {
            "after": format_position(emitted.after),
            "last": format_position(emitted.last),
            "spec": ",".join(pc.unique(emitted.batch.column("spec")).to_pylist()),
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
        self.producer.poll(0.0)

    def _snapshot(self, partition: int, part: _Part) -> None:
        if part.state.offset > part.stored:
            part.storing = asyncio.ensure_future(self._store(partition, part, part.sent, part.writer.take()))

    async def _store(self, partition: int, part: _Part, sent: int, snapshot: Snapshot) -> None:
        try:
            while part.delivered < sent:
                await asyncio.sleep(0.005)
            await self._put(partition, snapshot)
            part.stored = snapshot.offset
            part.manifests[f"{snapshot.offset:020d}"] = snapshot.names
            if self.engine is not None and self.parts.get(partition) is part:
                self.engine.acknowledge(partition, snapshot.offset)
            await self._clean(partition, part)
            self.metrics.add("state_snapshots_total")
        except Unavailable as error:
            self._failure = error
        finally:
            part.storing = None

    async def _put(self, partition: int, snapshot: Snapshot) -> None:
        folder = self._folder(partition, parts=True)
        for name, encode in snapshot.fresh.items():
            await self._blob(partial(_store, self.blobs, f"{folder}/{name}", encode))
        await self._blob(
            partial(_store, self.blobs, f"{self._folder(partition)}/{snapshot.offset:020d}", snapshot.manifest)
        )

    async def _clean(self, partition: int, part: _Part) -> None:
        """Delete manifests beyond the three newest, and parts that only they needed."""
        while len(part.manifests) > STATES_KEPT:
            oldest = next(iter(part.manifests))
            needed = part.manifests.pop(oldest)
            await self._blob(partial(self.blobs.delete, f"{self._folder(partition)}/{oldest}"))
            for name in set(needed).difference(*part.manifests.values()):
                await self._blob(partial(self.blobs.delete, f"{self._folder(partition, parts=True)}/{name}"))

    def _folder(self, partition: int, *, parts: bool = False) -> str:
        return f"state/{'stream-parts' if parts else 'stream'}/g{self.topics.generation}/{partition}"

    def _show(self) -> None:
        parts = list(self.parts.values())
        if not parts:
            return
        self.metrics.set("pending_impressions", sum(p.state.waiting for p in parts))
        self.metrics.set("pending_feedback", sum(len(p.state.early) for p in parts))
        self.metrics.set("watermark_ms", min(p.state.watermark.time_ms for p in parts))
        self.metrics.set("rules_number", min(p.state.era.number for p in parts))
        self.metrics.set("rules_differ", float(any(p.state.era.rules != self.declared for p in parts)))
        for part in parts:
            tasks = part.state.totals.tasks
            # A task that has just been declared begins with what came before it, which is no news.
            for (task, _), now, before in zip(part.state.tasks, tasks, part.shown, strict=False):
                for name, count in _TOTALS:
                    grown = getattr(now, count) - getattr(before, count)
                    if grown:
                        self.metrics.add(name, grown, reason=task)
            part.shown = tasks
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
    spill: Spill | None,
    declared: Rules,
    datadir: Path,
    stop: threading.Event,
    ready: Callable[[bool, str], None],
) -> int:
    """Join until `stop`; return the exit status. See `StreamStage` for `project` and `declared`."""
    stage = StreamStage(project, config, topics, producer, blobs, metrics, clock, spill, declared)
    name = f"headrace-stream-g{topics.generation}"
    stage.engine = Engine(name, brokers, topics.events, config.log.partitions, datadir)
    return stage.engine.run(stage, stop, ready)


def _pieces(emitted: Emitted) -> list[Emitted]:
    rows = emitted.batch.num_rows
    if rows <= RECORD_ROWS:
        return [emitted]
    offset_N, rank_N = emitted.batch.column("offset"), emitted.batch.column("rank")
    pieces: list[Emitted] = []
    after = emitted.after
    for start in range(0, rows, RECORD_ROWS):
        part = emitted.batch.slice(start, RECORD_ROWS)
        end = start + part.num_rows - 1
        last = Position(offset_N[end].as_py(), rank_N[end].as_py())
        pieces.append(Emitted(part, after, last))
        after = last
    return pieces


def _store(blobs: Blobs, name: str, encode: Callable[[], bytes]) -> None:
    blobs.put(name, encode())


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _offset_of(name: str) -> int:
    return int(_base(name))
