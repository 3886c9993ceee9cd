"""Where samples come from: the lake at one version in total order, then the topic from the lake's positions.

Nothing moves the source on but `take`, which is called for ranges that the steps log has committed. So `take` asks
nobody outside: what the hand-over from lake to topic needs is read when the lake is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.kept_samples import read_on_at
from headrace.contract.formats.positions import START, Cursor, Position, Positions
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.steps import Step, StepRange
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.trainer.model.batch import Batch
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.columns import stored_columns
from headrace.trainer.source.judged import judge_of
from headrace.trainer.source.live import LivePartition, LiveRows
from headrace.trainer.source.range_reader import RangeReader
from headrace.trainer.source.stored import LAKE_BYTES, StoredRows

logger = logging.getLogger("headrace.train")

BUFFER_ROWS = 131_072
"""Rows read ahead of training, over all partitions; beyond it reading pauses."""


class Source:
    """Reads the samples of the recipe's tasks. For one thread."""

    def __init__(
        self,
        project: Project,
        reader: Reader,
        topic: str,
        *,
        generation: int,
        metrics: Metrics,
        lake: LakeReader | None = None,
        lake_bytes: int = LAKE_BYTES,
        background: bool = False,
        fields: Sequence[str] = (),
        shown_every: int = 0,
    ) -> None:
        """Read nothing yet.

        Args:
            lake_bytes: about how much memory stored rows may take.
            background: read them ahead in a thread.
            fields: of the impression, that are looked at beside what a step needs.
            shown_every: of so many readings of the lake one has all that features are made of; 0: where needed only.
        """
        self._project, self._reader, self._topic, self._lake = project, reader, topic, lake
        self._generation = generation
        schema, tasks = sample_schema(project), project.recipe.heads
        judge, columns = judge_of(project), stored_columns(project, fields=fields, shown_every=shown_every)
        holder, order = f"train-{project.model}", project.recipe.stored_order
        self._stored = StoredRows(
            *(lake, columns, tasks, holder), order=order, judge=judge, bytes_max=lake_bytes, background=background
        )
        self._live = LiveRows(schema, tasks, metrics, judge=judge)
        self._ranges = RangeReader(self._stored, self._live, schema)
        self._assigned = False
        self._placed: set[int] = set()
        """Partitions of which it is known that the topic goes on where they are read to."""
        self._lease_is_due = False
        """True from the end of the lake until the lease is given back."""
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        """The topic's begins and ends when reading began."""
        self._began: dict[int, Position] = {}
        """Where the steps that are redone begin, by partition."""

    def begin(self, cursor: Cursor | None) -> None:
        """Go on from `cursor`; without one, from the lake's newest version, else from the topic's beginning."""
        if cursor is None:
            state = self._lake.state() if self._lake is not None else None
            self._begin(Cursor(lake_version=state.version) if state is not None else Cursor())
        else:
            self._begin(cursor)

    def begin_stored(self, version: int) -> None:
        """Begin afresh at this version of the lake: what a run's first recorded step says."""
        self._begin(Cursor(lake_version=version))

    def expect(self, steps: Iterable[Step]) -> None:
        """Say before beginning which steps will be redone. Where their run began behind a hole, they do too."""
        self._began = {}
        for each in (r for step in steps for r in step.ranges if r.kind == "live"):
            self._began.setdefault(each.partition, Position(*each.after))

    def _begin(self, cursor: Cursor) -> None:
        begins = self._begins = self._reader.begin_offsets(self._topic)
        positions = Positions.from_json(self._generation, cursor.positions)
        self._stored.close()
        self._live.partitions, self._live.stored = {}, {}
        self._placed.clear()
        for p, begin in begins.items():
            position, following = positions.at(p), cursor.next_offsets.get(str(p))
            if position > START:
                self._live.partitions[p] = LivePartition.at(position, following or 0)
            else:
                # Steps that are redone take what the topic held first: offset 0 shows what it has lost since.
                afresh = 0 if p in self._began else begin
                is_new = following in (None, begin)
                self._place(p, START, afresh if following is None else following, is_new=is_new)
        if cursor.lake_version >= 0:
            place = cursor.lake_from_ms, cursor.lake_before
            self._stored.open(cursor.lake_version, taken=cursor.lake_taken, place=place)
            if self._stored.is_open:
                logger.info("learning %d stored samples of lake version %d", self.stored_left, cursor.lake_version)
            elif self._stored.state is not None:
                self._live.stored = self._stored.state.positions.by_partition
            self._leave_lake_if_done()
        self._assigned = False

    def _place(self, number: int, position: Position, following: int, *, is_new: bool) -> None:
        """Let a run begin with a partition: behind `position`, or where the run's recorded steps began with it."""
        is_new &= number not in self._began
        position = max(position, self._began.get(number, START))
        self._live.partitions[number] = LivePartition.at(position, following, is_fresh=is_new)
        self._placed.discard(number)

    def poll(self, timeout_s: float) -> None:
        """Read ahead. Raises what the reader raises; the next call goes on from the same place."""
        if self._lease_is_due:
            self._stored.release()
            self._lease_is_due = False
        self._read_stored(self._project.recipe.batch_rows)
        if not self._stored.is_open and self._live.rows < BUFFER_ROWS:
            self._read(timeout_s)

    def _read_stored(self, rows: int) -> None:
        """Read on in the lake, and leave it where there is no more of it."""
        if self._stored.is_open:
            self._stored.read_ahead(rows)
            self._leave_lake_if_done()

    def poll_for(self, ranges: tuple[StepRange, ...], timeout_s: float) -> None:
        """Read on towards the rows of recorded ranges. Where the buffer is full of other partitions' rows, only the
        partitions are read whose rows are missing: it grows by no more than the recorded steps took.

        Raises as `poll`, and `InvariantBroken` when the topic ends before the ranges do.
        """
        self._read_stored(max((r.rows for r in ranges if r.kind == "stored"), default=1))
        if self._stored.is_open:
            return
        missing = [r for r in ranges if r.kind == "live" and not self._live.has(r)]
        if self._live.rows >= BUFFER_ROWS:
            self._assign({r.partition for r in missing})
            self._assigned = True
        records = self._read(timeout_s)
        if not records:
            for each in missing:
                self._check_end(each)
        if self._live.rows >= BUFFER_ROWS:
            self._assigned = False

    def _check_end(self, wanted: StepRange) -> None:
        at, end = self._reader.position(self._topic, wanted.partition), self._ends[wanted.partition]
        if at >= end:
            have = tuple(self._live.partitions[wanted.partition].order.position)
            raise InvariantBroken(
                f"a recorded step takes the samples of {self._topic}/{wanted.partition} up to {wanted.upto}; the "
                f"topic, read to its end at offset {end}, has them up to {have}. If it has lost its end, `stream` "
                "sends them again and a next start finds them. If it was made anew, change recipe.seed: that begins a "
                "new run."
            )

    def _read(self, timeout_s: float) -> Sequence[Record]:
        """Read what comes. Raises `InvariantBroken` where samples lay in a damaged record and did not come again."""
        if not self._assigned:
            self._assign(self._live.partitions)
            self._assigned = True
        try:
            records = self._reader.poll(256, timeout_s)
        except BaseException:
            self._assigned = False
            self._placed.clear()
            raise
        for record in records:
            self._live.intake(record)
        self._live.refuse_holes(self._topic, self._ends)
        return records

    def _assign(self, partitions: Iterable[int]) -> None:
        self._ends, self._begins = self._reader.end_offsets(self._topic), self._reader.begin_offsets(self._topic)
        reading = {p: self._live.partitions[p] for p in partitions}
        for p, each in reading.items():
            self._check_place(p, each)
        starts = {(self._topic, p): each.start_at(self._begins[p]) for p, each in reading.items()}
        newest = self._lake.state() if self._lake is not None and any(p.is_cut for p in reading.values()) else None
        self._live.newest = newest.positions.by_partition if newest is not None else {}
        self._reader.assign(starts)

    def _check_place(self, number: int, partition: LivePartition) -> None:
        """Read a partition from its first record where the topic has lost its end since its place was noted."""
        position = partition.order.position
        if number not in self._placed and position > START:
            partition.next_offset = read_on_at(self._reader, self._topic, number, position, partition.next_offset)
        self._placed.add(number)

    def ready_rows(self) -> int:
        """Return how many rows could be taken now."""
        if self._stored.is_open:
            return self._stored.ready
        total = self._live.rows
        return 0 if total < BUFFER_ROWS and self._is_lopsided() else total

    def _is_lopsided(self) -> bool:
        """True while a backlog was read of some partitions only: learning on would run ahead of the others' time."""
        partitions = self._live.partitions.items()
        return any(
            not each.chunks and max(each.next_offset, self._begins.get(p, 0)) < self._ends.get(p, 0)
            for p, each in partitions
        )

    @property
    def stored_left(self) -> int:
        """How many of the lake's rows, of all tasks, are not learnt."""
        return max(0, self._stored.rows - self._stored.taken) if self._stored.is_open else 0

    def waiting_rows(self) -> int:
        """Return how many rows are known of that are not learnt."""
        return self.stored_left if self._stored.is_open else self._live.rows

    def lag(self, ends: Mapping[int, int]) -> int:
        """Return how many of the topic's records, which ends at `ends`, hold samples that are not learnt."""
        following = {p: each.resume_offset for p, each in self._live.partitions.items()}
        # What retention deleted is no record any more; a partition from which none came yet is read from its begin.
        return sum(max(0, end - max(following.get(p, 0), self._begins.get(p, 0))) for p, end in ends.items())

    @property
    def next_offsets(self) -> dict[int, int]:
        """The offset, a partition, that the topic is read to."""
        return {p: each.next_offset for p, each in self._live.partitions.items()}

    @property
    def is_stored(self) -> bool:
        """True while rows come from the lake."""
        return self._stored.is_open

    def propose(self, rows_max: int) -> tuple[StepRange, ...]:
        """Return what the next step could take: at most `rows_max` rows."""
        return (self._stored.propose(rows_max),) if self._stored.is_open else self._live.propose(rows_max)

    def positions_after(self, ranges: tuple[StepRange, ...]) -> Positions:
        """Return the positions that the model contains once these ranges are learnt."""
        moves = {r.partition: Position(*r.upto) for r in ranges if r.kind == "live"}
        return self.positions().advanced(moves)

    def positions(self) -> Positions:
        """Return the positions that the model contains; none of the lake's before all of it is taken."""
        taken = {p: each.taken for p, each in sorted(self._live.partitions.items()) if each.taken > START}
        return Positions(self._generation, taken)

    def has(self, ranges: tuple[StepRange, ...]) -> bool:
        """Say whether every row of these ranges is read."""
        return self._ranges.has(ranges)

    def take(self, ranges: tuple[StepRange, ...]) -> pa.Table:
        """Give out the rows of committed ranges and move on behind them, at the lake's end to the topic; raises as
        `RangeReader.take`."""
        rows = self._ranges.take(ranges)
        self._leave_lake_if_done()
        return rows

    def cursor(self) -> Cursor:
        """Return where to go on from, for a checkpoint."""
        offsets = {str(p): each.resume_offset for p, each in sorted(self._live.partitions.items())}
        from_ms, before = self._stored.place
        stored = self._stored.version, self._stored.taken, from_ms, before
        return Cursor(self.positions().to_json(), offsets, *stored)

    def batch(self, rows: pa.Table) -> Batch:
        """Return rows as the learner takes them."""
        return to_batch(rows, self._project)

    def _leave_lake_if_done(self) -> None:
        state = self._stored.state
        if state is None or not self._stored.is_done:
            return
        for p, each in self._live.partitions.items():
            following = state.next_offsets.get(p, each.next_offset)
            self._place(p, state.positions.at(p), following, is_new=True)
        self._stored.close()
        self._lease_is_due, self._assigned = True, False
