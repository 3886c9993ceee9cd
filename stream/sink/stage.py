"""The sink: samples from their topic to the lake, each once.

1. At an assignment ask the lake's newest version: the offset to go on from and the last position it holds. Where the
   topic has lost its end since, read it from its first record.
2. Drop rows that are not beyond the partition's position. A record that begins after a position not reached yet was
   written out of turn: it is left out, counted (`gap_total`) and comes again from the partition's owner. A record that
   is not ours, or damaged, is counted and skipped (`headrace.contract.formats.samples_topic.sample_record`); where
   samples were in it that have not come again by the topic's end, the stage stops and names it.
3. Every `sink.commit_ms`, or `sink.commit_rows`, commit rows, offsets and positions in one Delta commit.
4. Then let Faust commit. Whatever fails, in a commit or after it, the stage stops and commits no more: everything since
   the last commit is read again after a restart, and no later commit moves the positions past it.

`behind_ms` is the age of the oldest record that is not in the lake, read or not. Beyond half of what the topic keeps it
is an alarm: what the topic forgets before it is stored is lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import fit
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.samples_topic.kept_samples import read_on_at
from headrace.contract.formats.samples_topic.sample_order import SampleOrder
from headrace.contract.formats.samples_topic.sample_record import DamagedRecords, Unreadable, read_samples, samples_lost
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.lake import LakeState, LakeWriter
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.process.awake import Awake
from headrace.process.moved import moved
from headrace.process.waits import Waits
from headrace.stream.shell.engine import Engine
from headrace.stream.sink.archive import EventArchive

log = logging.getLogger("headrace.sink")

ALARM_EVERY_S = 60.0
ASK_S = 45.0
"""How long a store that is away is asked: twice as long as a NameNode needs to return, and the longest that one call of
it may take."""


class SinkStage:
    """The shell around the lake; see the module for the protocol."""

    name = "sink"
    has_one_owner = False

    def __init__(
        self,
        config: Config,
        lake: LakeWriter,
        metrics: Metrics,
        clock: Clock,
        *,
        kept_ms: int | None = None,
        open_reader: Callable[[], Reader] | None = None,
    ) -> None:
        """`kept_ms`: how long the broker keeps samples, -1 for ever; unless told, what the topic is created with.
        `open_reader` makes a reader to look whether the topic still holds what was stored of it.
        """
        self._archive: EventArchive | None = None
        self._open_reader = open_reader
        self.config, self.lake, self.metrics, self.clock = config.sink, lake, metrics, clock
        topics = Topics(config.log.generation)
        self.topic = topics.samples
        created_ms = next(t.retention_ms for t in topics.specs(1) if t.name == topics.samples)
        self.kept_ms = created_ms if kept_ms is None else kept_ms
        self.engine: Engine | None = None
        self.orders: dict[int, SampleOrder] = {}
        """How far each partition was taken. What is out of turn is left out, not held: its owner sends it again."""
        self.next: dict[int, int] = {}
        self._stored: dict[int, int] = {}
        """The offset, a partition, that the lake says to go on from."""
        self.damaged: dict[int, DamagedRecords] = {}
        self._left_out: dict[int, set[Position]] = {}
        """Where the records begin that were out of turn, behind a damaged one alone: else nothing is kept."""
        self.batches: list[tuple[int, pa.RecordBatch]] = []
        self.rows = 0
        self._moved: set[int] = set()
        self._since_ms: dict[int, int] = {}
        """When the oldest record that waits for the next commit was written, by partition."""
        self._since_committing_ms: dict[int, int] = {}
        """The same of the commit that is under way."""
        self._alarm_due_s = 0.0
        self._due_s = 0.0
        self._metrics_due_s = 0.0
        self._committing: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._waits = Waits(clock)

    async def begin(self, partition: int) -> int | None:
        """Ask the lake where the partition goes on."""
        if self._committing is not None:
            await asyncio.wait([self._committing])
        state = await self._waits.call("look at the lake", partial(_patiently, self.lake.state, self.clock))
        position = START if state is None else state.positions.at(partition)
        self.orders[partition] = SampleOrder(position, hold=False)
        following = None if state is None else state.next_offsets.get(partition)
        self._stored[partition] = following or 0
        if following is None or position == START or self._open_reader is None:
            return following
        look = partial(_read_on_at, self._open_reader, self.topic, partition, position, following)
        return await self._waits.call("look whether samples go on where the lake ends", look)

    async def take_all(self, records: Sequence[Record]) -> None:
        """Take records of one partition, in order."""
        for record in records:
            await self.take(record)

    async def take(self, record: Record) -> None:
        """Keep what is new of one record for the next commit."""
        partition = record.partition
        self.next[partition] = record.offset + 1
        self._moved.add(partition)
        self._since_ms.setdefault(partition, record.timestamp_ms)
        self.metrics.add("records_read_total")
        found = read_samples(record)
        if isinstance(found, Unreadable):
            self._skip(record, found)
            return
        order = self.orders[partition]
        following = order.offer(record)
        if following is None:
            self.metrics.add("gap_total", topic=record.topic)
            log.error(
                "samples/%d offset %d begins after %s, the lake is at %s: written out of turn and left out; its "
                "owner sends it again. If this repeats, compare `headrace ledger`.",
                partition,
                record.offset,
                found.after,
                order.position,
            )
            if (damaged := self.damaged.get(partition)) and damaged.hole(order.position, [found.after]) is not None:
                self._left_out.setdefault(partition, set()).add(found.after)
            return
        if not following:
            return
        # As it came: a batch of other rules has other columns, and the lake's schema grows by them. None was held back.
        for each in following:
            fresh = each.new_rows(found.rows)
            self.batches.append((partition, fresh))
            self.rows += fresh.num_rows
        while self.rows >= 2 * self.config.commit_rows and self._failure is None:
            await asyncio.sleep(0.01)

    async def tick(self) -> None:
        """Begin a commit that is due."""
        if self._failure is not None:
            raise self._failure
        self._waits.check()
        if self._archive is not None:
            await self._archive.tick()
        self._refuse_holes()
        now_s = self.clock.monotonic()
        if self._committing is None and self.batches and (now_s >= self._due_s or self.rows >= self.config.commit_rows):
            self._begin_commit()
        if now_s >= self._metrics_due_s and self.engine is not None:
            self._metrics_due_s = now_s + 1.0
            self.metrics.set("lag_records", self.engine.lag())
            self.look_behind()

    def _skip(self, record: Record, found: Unreadable) -> None:
        self.damaged.setdefault(record.partition, DamagedRecords()).note(found, self.orders[record.partition].position)
        self.metrics.add("records_unreadable_total", topic="samples", kind=found.kind)
        log.error(
            "%s/%d offset %d is %s and skipped: %s. Find out who writes into the topic besides `stream`.",
            *(record.topic, record.partition, record.offset, found.kind, found.detail),
        )

    def _refuse_holes(self) -> None:
        """Raise `InvariantBroken` where a damaged record held samples and the topic, read to its end, has no others."""
        for partition, damaged in self.damaged.items():
            if not damaged or not self._left_out.get(partition):
                continue
            end = None if self.engine is None else self.engine.end(partition)
            hole = damaged.hole(self.orders[partition].position, self._left_out[partition])
            if hole is not None and end is not None and self.next[partition] >= end:
                raise samples_lost(self.topic, partition, hole)

    def _resume(self, partition: int) -> int:
        """Return the record to read first after a restart, and forget which are no longer out of turn."""
        position = self.orders[partition].position
        left_out = {after for after in self._left_out.pop(partition, ()) if after > position}
        if left_out:
            self._left_out[partition] = left_out
        damaged = self.damaged.get(partition)
        kept = damaged.offsets(position, left_out) if damaged else []
        return min(self.next[partition], *kept) if kept else self.next[partition]

    def keep(self, archive: EventArchive) -> None:
        """Archive events beside, of the same partitions. What fails there unexpectedly stops the stage."""
        self._archive = archive

    def partitions(self) -> frozenset[int]:
        """Return the partitions that the group gave this process."""
        return frozenset() if self.engine is None else self.engine.assigned

    def look_behind(self) -> None:
        """Tell how far the lake is behind, and raise the alarm where the topic may forget what is not stored yet."""
        waiting = [*self._since_ms.values(), *self._since_committing_ms.values()]
        if self.engine is not None and (unread_ms := self.engine.oldest_unread_ms()) is not None:
            waiting.append(unread_ms)
        behind_ms: float = max(0, self.clock.now_ms() - min(waiting)) if waiting else 0
        # Nobody knows what lies in the log unread: that nothing waits here is no sign that nothing waits.
        if not waiting and self.engine is not None and math.isnan(self.engine.lag()):
            behind_ms = math.nan
        self.metrics.set("behind_ms", behind_ms)
        if 0 <= self.kept_ms < 2 * behind_ms and self.clock.monotonic() >= self._alarm_due_s:
            self._alarm_due_s = self.clock.monotonic() + ALARM_EVERY_S
            log.error(
                "the lake is %.1f h behind and the samples topic keeps %.1f h: what it forgets before it is stored is "
                "lost. Raise the topic's retention.ms, restart the sink, then see commit_seconds and whether the "
                "store takes writes.",
                behind_ms / 3_600_000,
                self.kept_ms / 3_600_000,
            )

    def drop(self, partitions: set[int]) -> None:
        """Forget what is not committed of revoked partitions; the lake tells the new owner where to go on."""
        self.batches = [(p, b) for p, b in self.batches if p not in partitions]
        self.rows = sum(b.num_rows for _, b in self.batches)
        self._moved -= partitions
        for partition in partitions:
            self.orders.pop(partition, None)
            self.damaged.pop(partition, None)
            self._left_out.pop(partition, None)
            self.next.pop(partition, None)
            self._since_ms.pop(partition, None)

    async def finish(self) -> None:
        """Commit what is there. Raises what stopped the stage."""
        if self._committing is not None:
            await asyncio.wait([self._committing])
        if self.batches and self._failure is None:
            self._begin_commit()
        if self._committing is not None:
            await asyncio.wait([self._committing])
        if self._failure is not None:
            raise self._failure
        if self._archive is not None:
            await self._archive.finish()

    def _begin_commit(self) -> None:
        self._due_s = self.clock.monotonic() + self.config.commit_ms / 1000
        batches, with_rows = _alike([b for _, b in self.batches]), {p for p, _ in self.batches}
        offsets = {p: self._resume(p) for p in sorted(self._moved)}
        # Repeats alone, read again behind a lost end, move nothing back.
        moved = [p for p, following in offsets.items() if p in with_rows or following >= self._stored.get(p, 0)]
        offsets = {p: offsets[p] for p in moved}
        positions = {p: self.orders[p].position for p in moved}
        self.batches, self.rows, self._moved = [], 0, set()
        self._since_committing_ms, self._since_ms = self._since_ms, {}
        self._committing = asyncio.ensure_future(self._commit(batches, offsets, positions))

    async def _commit(
        self, batches: list[pa.RecordBatch], offsets: dict[int, int], positions: dict[int, Position]
    ) -> None:
        try:
            start_s = self.clock.monotonic()
            rows = sum(batch.num_rows for batch in batches)
            version = await self._waits.call(
                f"commit of {rows} samples to the lake", partial(self.lake.append, batches, offsets, positions)
            )
            self._since_committing_ms = {}
            self._stored.update(offsets)
            for partition, following in offsets.items():
                if self.engine is not None:
                    self.engine.acknowledge(partition, following - 1)
            self.metrics.add("rows_stored_total", rows)
            self.metrics.set("lake_version", version)
            self.metrics.observe("commit_seconds", self.clock.monotonic() - start_s)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Whatever it is, and whether the commit happened or not, the lake knows: the next start asks it. Another
            # commit after this one would move the positions past rows that may not be there.
            self._failure = self._failure or error
        finally:
            self._committing = None


def _alike(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Return batches with the columns of all of them, null where one had none: rules may have changed between."""
    schema = batches[0].schema
    if all(batch.schema.equals(schema) for batch in batches):
        return batches
    schema = pa.unify_schemas([batch.schema for batch in batches])
    return [fit(batch, schema) for batch in batches]


def _read_on_at(
    open_reader: Callable[[], Reader], topic: str, partition: int, position: Position, following: int
) -> int:
    reader = open_reader()
    try:
        return read_on_at(reader, topic, partition, position, following, moved=moved)
    finally:
        reader.close()


def _patiently(ask: Callable[[], LakeState | None], clock: Clock) -> LakeState | None:
    """Return the lake's state; a store that is away is asked for `ASK_S`."""
    awake = Awake(clock.monotonic, ASK_S)
    end_s, wait_s = awake.monotonic() + ASK_S, 0.1
    while True:
        try:
            return ask()
        except Unavailable:
            if awake.monotonic() > end_s:
                raise
            clock.sleep(wait_s)
            wait_s = min(5.0, wait_s * 2)
