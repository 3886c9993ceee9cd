"""Live rows: samples of the topic, by position, read ahead of training.

Each partition keeps three positions: up to where its rows were given out, up to where they were proposed, and up to
where they were read. A row is proposed once, and given out once; a record that is out of turn is held back, with an
alarm, until the rows before it have come. Where retention deleted what lies before the first record, nothing can come:
a run that begins there says so and goes on behind the hole, any other run is refused.

A record that is not ours, or damaged, is counted and skipped. Where samples of ours were in it, the record behind it
begins after them: then reading stops, unless they come again before the end that the topic had when reading began.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position, order_of, orders, position_of
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.samples_topic.sample_order import SampleOrder
from headrace.contract.formats.samples_topic.sample_record import DamagedRecords, Unreadable, read_samples, samples_lost
from headrace.contract.formats.steps import PassedOver, StepRange
from headrace.contract.interfaces.log import Record
from headrace.contract.metrics import Metrics
from headrace.trainer.source.judged import Judge, with_judged

logger = logging.getLogger("headrace.train")

HELD_MAX = 10_000
"""Most records that wait for a gap before them to close."""


@dataclass
class _Chunk:
    """Rows of one record that are not taken yet, of the recipe's tasks, in position order."""

    rows: pa.RecordBatch
    order_N: npt.NDArray[np.int64]
    record: int
    last: Position
    time_ms: int = 0
    """Of the record, by the broker."""


@dataclass
class LivePartition:
    """One partition's rows that were read and not taken."""

    taken: Position = START
    """The last position whose rows were given out."""
    next_offset: int = 0
    """The next `samples` record to read."""
    order: SampleOrder = field(default_factory=SampleOrder)
    """Which records come next; its position is the last that was read."""
    chunks: deque[_Chunk] = field(default_factory=deque)
    damaged: DamagedRecords = field(default_factory=DamagedRecords)
    """Records with our headers that could not be read."""
    proposed: Position = START
    """The last position whose rows were proposed; what was proposed and never recorded dies with the process."""
    ahead: int = 0
    """How many rows were proposed and not given out."""
    is_fresh: bool = False
    """True until the first record comes to a run that begins with this partition."""
    is_cut: bool = False
    """True until the first record comes, where the topic has lost records before it that were not read."""
    taken_ms: int = 0
    """The broker's time of the newest record of which the last row was given out."""
    gaps: Sequence[tuple[Position, Position]] = ()
    """What is left out by name, after which position and up to which, ascending: reading goes on behind it."""

    @classmethod
    def at(cls, position: Position, next_offset: int, *, is_fresh: bool = False) -> LivePartition:
        """Return a partition whose rows up to `position` are taken."""
        return cls(position, next_offset, SampleOrder(position), is_fresh=is_fresh)

    def start_at(self, begin: int) -> int:
        """Return the record to read first, where the topic's first is `begin`. The next offset stays: what is missing
        must be found again after a restart, until the first record tells whether anything is."""
        self.is_cut = self.next_offset < begin or (self.is_fresh and begin > 0)
        return max(self.next_offset, begin)

    @property
    def rows(self) -> int:
        """How many rows wait."""
        return sum(chunk.rows.num_rows for chunk in self.chunks)

    @property
    def has_more(self) -> bool:
        """Whether records were read behind what was proposed."""
        return bool(self.chunks) and self.chunks[-1].last > self.spoken_for

    @property
    def spoken_for(self) -> Position:
        """The last position that was given out, proposed or left out by name behind these: a proposal begins there."""
        return self._behind_gaps(max(self.taken, self.proposed))

    @property
    def resume_offset(self) -> int:
        """The first record that holds rows which are not taken: where a restart reads on."""
        records = [chunk.record for chunk in self.chunks] + [held.record.offset for held in self.order.held]
        return min([self.next_offset, *records, *self.damaged.offsets(self.order.position, self._waiting)])

    @property
    def hole(self) -> Unreadable | None:
        """The damaged record whose samples are missing before those that wait."""
        return self.damaged.hole(self.order.position, self._waiting)

    @property
    def _waiting(self) -> set[Position]:
        return {held.after for held in self.order.held}

    def jump(self) -> None:
        """Go on behind what is left out by name, where reading has come to it."""
        self.order.position = self._behind_gaps(self.order.position)

    def leave(self) -> None:
        """Go on behind what is left out by name, where all before it is given out."""
        self.taken = self._behind_gaps(self.taken)

    def _behind_gaps(self, at: Position) -> Position:
        """Return the end of what is left out by name there, and right behind it; `at` where nothing is."""
        for after, upto in self.gaps:
            if after <= at < upto:
                at = upto
        return at

    def upto(self, rows_max: int) -> tuple[Position, int]:
        """Return the position up to which at most `rows_max` rows can be proposed, and how many rows that is."""
        after = upto = self.spoken_for
        rows = 0
        for chunk in (each for each in self.chunks if each.last > after):
            left, first = rows_max - rows, _through(chunk, after)
            if chunk.rows.num_rows - first <= left:
                upto, rows = chunk.last, rows + chunk.rows.num_rows - first
                if any(gap == upto for gap, _ in self.gaps):
                    break  # No range goes over what is left out.
                continue
            if left:
                upto, rows = position_of(int(chunk.order_N[first + left - 1])), rows + left
            break
        return upto, rows

    def propose(self, upto: Position) -> list[pa.RecordBatch]:
        """Return the rows that were not proposed before, up to `upto`; they stay where they are."""
        found: list[pa.RecordBatch] = []
        after = self.spoken_for
        for chunk in (each for each in self.chunks if each.last > after):
            first = _through(chunk, after)
            found.append(chunk.rows.slice(first, _through(chunk, upto) - first))
            if chunk.last >= upto:
                break
        self.proposed = upto
        self.ahead += sum(rows.num_rows for rows in found)
        return found

    def take(self, after: Position, upto: Position) -> list[pa.RecordBatch]:
        """Give out the rows beyond `after`, up to `upto`; those before `after` are dropped."""
        taken: list[pa.RecordBatch] = []
        while self.chunks:
            chunk = self.chunks[0]
            first, stop = _through(chunk, after), _through(chunk, upto)
            if stop > first:
                taken.append(chunk.rows.slice(first, stop - first))
            if chunk.last > upto:
                chunk.rows, chunk.order_N = chunk.rows.slice(stop), chunk.order_N[stop:]
                break
            self.chunks.popleft()
            self.taken_ms = max(self.taken_ms, chunk.time_ms)
        self.taken = upto
        self.ahead = max(0, self.ahead - sum(rows.num_rows for rows in taken))
        self.leave()
        return taken


def _through(chunk: _Chunk, position: Position) -> int:
    """Return how many rows of a chunk lie at or before a position."""
    return int(np.searchsorted(chunk.order_N, order_of(position), side="right"))


def _pair(position: Position) -> tuple[int, int]:
    return position.offset, position.rank


class LiveRows:
    """The rows of these tasks in the partitions of the `samples` topic. For one thread."""

    def __init__(
        self,
        schema: pa.Schema,
        tasks: tuple[str, ...],
        metrics: Metrics | None = None,
        *,
        judge: Judge | None = None,
    ) -> None:
        """`judge` gives what proposed ranges say of their rows; replay, which proposes none, needs none."""
        self._schema, self._tasks, self._metrics, self._judge = schema, tasks, metrics, judge
        self.partitions: dict[int, LivePartition] = {}
        self.stored: Mapping[int, Position] = {}
        """Up to where the lake that it began with has no row of these tasks, by partition: there none is missing."""
        self.newest: Mapping[int, Position] = {}
        """Up to where the lake holds all rows now."""

    @property
    def rows(self) -> int:
        """How many rows were read and not taken."""
        return sum(partition.rows for partition in self.partitions.values())

    @property
    def ahead(self) -> int:
        """How many of them were proposed."""
        return sum(partition.ahead for partition in self.partitions.values())

    def intake(self, record: Record) -> None:
        """Take what is new of a record and of those that waited for it.

        Raises `InvariantBroken` when too many wait, or when retention deleted samples that this run would skip.
        """
        partition = self.partitions[record.partition]
        partition.next_offset = record.offset + 1
        found = read_samples(record, self._schema)
        if isinstance(found, Unreadable):
            self._skip(record, found)
            return
        if partition.is_cut:
            self._begin_late(partition, record)
        partition.is_cut = partition.is_fresh = False
        partition.jump()
        order = partition.order
        following = order.offer(record)
        if following is None:
            self._tell_gap(record, order)
            return
        for each in following:
            whole = found.rows if each.record is record else decode_batch(each.record.value or b"", self._schema)
            at = each.record.offset, each.last, each.record.timestamp_ms
            self._append(partition, each.new_rows(whole), *at)

    def refuse_holes(self, topic: str, ends: Mapping[int, int]) -> None:
        """Raise `InvariantBroken` where samples lay in a damaged record and did not come again below `ends`."""
        for number, partition in self.partitions.items():
            if not partition.damaged or not partition.order.held or partition.next_offset < ends.get(number, 0):
                continue
            hole = partition.hole
            if hole is not None:
                raise samples_lost(topic, number, hole)

    def seed(self, number: int, rows: pa.Table, upto: Position) -> None:
        """Put rows of the lake before the records of a partition, which then go on behind `upto`.

        Args:
            rows: of this partition, in position order, each once; none up to `upto` is missing.
        """
        partition = self.partitions[number]
        for batch in (each for each in rows.to_batches() if each.num_rows):
            last = Position(batch["offset"][-1].as_py(), batch["rank"][-1].as_py())
            self._append(partition, batch, partition.next_offset, last, 0)
        partition.order = SampleOrder(upto)

    def propose(self, rows_max: int) -> tuple[StepRange, ...]:
        """Return ranges of at most `rows_max` rows behind what was proposed, shared evenly among the partitions that
        have some."""
        waiting = {number: partition for number, partition in sorted(self.partitions.items()) if partition.has_more}
        ranges: list[StepRange] = []
        rows_of: list[list[pa.RecordBatch]] = []
        left = rows_max
        for i, (number, partition) in enumerate(waiting.items()):
            upto, rows = partition.upto(left // (len(waiting) - i))
            if upto > partition.spoken_for:
                after = _pair(partition.spoken_for)
                ranges.append(StepRange(kind="live", partition=number, after=after, upto=_pair(upto), rows=rows))
                rows_of.append(partition.propose(upto))
            left -= rows
        return tuple(ranges) if self._judge is None else with_judged(ranges, rows_of, self._judge)

    def has(self, wanted: StepRange) -> bool:
        """Say whether every row of the range is read."""
        return self.partitions[wanted.partition].order.position >= Position(*wanted.upto)

    def take(self, wanted: StepRange) -> pa.Table:
        """Give out the rows of the partition's next range."""
        partition, after = self.partitions[wanted.partition], Position(*wanted.after)
        if partition.taken != after:
            raise InvariantBroken(
                f"a step takes partition {wanted.partition} after {wanted.after}; it is at {tuple(partition.taken)}."
            )
        return pa.Table.from_batches(partition.take(after, Position(*wanted.upto)), self._schema)

    def pass_over(self, left_out: PassedOver) -> None:
        """Go on behind samples that are left out by name, where their partition is read: they are never given out."""
        partition = self.partitions.get(left_out.partition)
        if partition is not None:
            partition.gaps = sorted({*partition.gaps, (Position(*left_out.after), Position(*left_out.upto))})
            partition.leave()

    def _append(
        self, partition: LivePartition, rows: pa.RecordBatch, record: int, last: Position, time_ms: int
    ) -> None:
        ours = pc.is_in(rows["task"], value_set=pa.array(self._tasks))
        if not pc.all(ours).as_py():
            rows = rows.filter(ours)
        order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
        partition.chunks.append(_Chunk(rows, order_N, record, last, time_ms))

    def _begin_late(self, partition: LivePartition, record: Record) -> None:
        """Move a run that begins with this partition behind what the topic has lost; refuse any other."""
        after, position = parse_position(record.headers["after"]), partition.order.position
        if after <= position:
            return
        where = (
            f"{record.topic}/{record.partition} begins at offset {record.offset} with the samples after {tuple(after)}"
        )
        learnt = max(position, self.stored.get(record.partition, START))
        if not partition.is_fresh or learnt < min(after, self.newest.get(record.partition, START)):
            raise InvariantBroken(
                f"{where}; this run has learnt up to {tuple(learnt)}, and would skip what retention deleted between. "
                "`headrace train repair` says what can be done about it, and does it. Keep samples longer than a "
                "trainer is ever away."
            )
        if after > learnt:
            logger.warning("%s; what lies before, after %s, is in no lake: learning goes on", where, tuple(learnt))
            if self._metrics is not None:
                self._metrics.add("gap_total", topic=record.topic)
        partition.taken, partition.order = after, SampleOrder(after)

    def _skip(self, record: Record, found: Unreadable) -> None:
        partition = self.partitions[record.partition]
        partition.damaged.note(found, partition.order.position)
        if self._metrics is not None:
            self._metrics.add("records_unreadable_total", topic="samples", kind=found.kind)
        logger.error(
            "%s/%d offset %d is %s and skipped: %s. Find out who writes into the topic besides `stream`.",
            *(record.topic, record.partition, record.offset, found.kind, found.detail),
        )

    def _tell_gap(self, record: Record, order: SampleOrder) -> None:
        if self._metrics is not None:
            self._metrics.add("gap_total", topic=record.topic)
        after, read = parse_position(record.headers["after"]), tuple(order.position)
        logger.warning(
            "gap: %s/%d offset %d begins after %s and only %s was read; it waits",
            *(record.topic, record.partition, record.offset, tuple(after), read),
        )
        if len(order.held) > HELD_MAX:
            raise InvariantBroken(
                f"{len(order.held)} records of {record.topic}/{record.partition} wait for samples after {read} that "
                "never came. Keep the topic; restart `stream`, which sends again what it has. Where it does not have "
                "them, `headrace train repair` goes on behind them."
            )
