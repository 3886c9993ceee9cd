"""Where samples come from: the lake at one version in total order, then the topic from the lake's positions.

Nothing moves the source on but `take`, which is called for ranges that the steps log has committed. So `take` asks
nobody outside: what the hand-over from lake to topic needs is read when the lake is opened. `propose` goes ahead of it:
a proposal begins behind the one before, and positions and cursor do not move with it.

*Mixed*: with a share for live samples the topic is read at once, behind the positions that the lake's version holds.
1. These positions are the version's and so never move: the cursor names both, and both must agree when a run goes on.
2. A step takes rows of the lake, then live ones by partition; the share says how many live ones where both sides have
   enough, and what either lacks the other fills.
3. Until the lake is learnt, positions claim nothing; how far the topic is learnt is told beside them (`Mixed`).
4. At the lake's end the partitions stand where they are: nothing is placed or read anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import START, Cursor, Mixed, Position, Positions
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.samples_topic.kept_samples import read_on_at
from headrace.contract.formats.steps import PassedOver, Step, StepRange
from headrace.contract.interfaces.lake import LakeReader, LakeState
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
        live_share: float = 0.0,
    ) -> None:
        """Read nothing yet.

        Args:
            lake_bytes: about how much memory stored rows may take.
            background: read them ahead in a thread.
            fields: of the impression, that are looked at beside what a step needs.
            shown_every: of so many readings of the lake one has all that features are made of; 0: where needed only.
            live_share: which part of a step live samples may take while the lake is learnt, below 1.
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
        self._live_share = live_share
        self._live_from: Positions | None = None
        """While stored and live samples are mixed: what the lake's version holds."""
        self._was_mixed = False
        """True where steps that are redone took live samples before the lake's end."""
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
        self._began, self._was_mixed = {}, False
        for step in steps:
            is_stored = any(each.kind == "stored" for each in step.ranges)
            for each in (r for r in step.ranges if r.kind == "live"):
                self._began.setdefault(each.partition, Position(*each.after))
            self._was_mixed |= is_stored and bool(self._began)

    def _begin(self, cursor: Cursor) -> None:
        begins = self._begins = self._reader.begin_offsets(self._topic)
        positions = Positions.from_json(self._generation, cursor.positions)
        self._stored.close()
        self._live_from = None
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
                if self._live_share or self._was_mixed or cursor.live_from is not None:
                    self._mix(cursor)
            elif self._stored.state is not None:
                self._live.stored = self._stored.state.positions.by_partition
            self._leave_lake_if_done()
        self._assigned = False

    def _mix(self, cursor: Cursor) -> None:
        """Let live samples be learnt beside the lake's version: from behind its positions, or from `cursor` on.

        Raises `InvariantBroken` where the version does not hold what it held.
        """
        state = self._stored.state
        assert state is not None
        holds = state.positions.to_json()
        if cursor.live_from is not None and cursor.live_from != holds:
            raise InvariantBroken(
                f"this run learns live samples behind {cursor.live_from}, and version {state.version} of the lake "
                f"holds {holds}: what lies between would be lost, or learnt twice. If the lake was made anew, change "
                "recipe.seed: that begins a new run."
            )
        self._live_from = state.positions
        self._place_behind(state)
        for p, position in Positions.from_json(self._generation, cursor.live).by_partition.items():
            self._live.partitions[p] = LivePartition.at(position, cursor.next_offsets.get(str(p), 0))

    def _place_behind(self, state: LakeState) -> None:
        """Let all partitions go on behind what a version of the lake holds."""
        for p, each in self._live.partitions.items():
            following = state.next_offsets.get(p, each.next_offset)
            self._place(p, state.positions.at(p), following, is_new=True)

    def _place(self, number: int, position: Position, following: int, *, is_new: bool) -> None:
        """Let a run begin with a partition: behind `position`, or where the run's recorded steps began with it."""
        is_new &= number not in self._began
        position = max(position, self._began.get(number, START))
        self._live.partitions[number] = LivePartition.at(position, following, is_fresh=is_new)
        self._placed.discard(number)

    def pass_over(self, left_out: Iterable[PassedOver]) -> None:
        """Go on behind samples that are left out by name, once all before them is taken."""
        for each in sorted(left_out, key=lambda each: each.after):
            before, (after, upto) = self._live.partitions[each.partition], (Position(*each.after), Position(*each.upto))
            if before.taken >= upto:
                continue
            following, position = before.resume_offset, before.taken
            if after <= position:
                following, position = (each.following if each.following >= 0 else following), upto
            # What was read ahead may lie behind it: it is read again.
            partition = self._live.partitions[each.partition] = LivePartition.at(position, following)
            partition.gaps = [*before.gaps, (after, upto)]
            self._assigned = False

    def poll(self, timeout_s: float) -> None:
        """Read ahead. Raises what the reader raises; the next call goes on from the same place."""
        if self._lease_is_due:
            self._stored.release()
            self._lease_is_due = False
        if self.is_mixed:
            self._read_mixed(self._project.recipe.batch_rows, timeout_s)
            return
        self._read_stored(self._project.recipe.batch_rows)
        if not self._stored.is_open and self._live.rows < BUFFER_ROWS:
            self._read(timeout_s)

    def _read_mixed(self, rows: int, timeout_s: float) -> None:
        """Read on in topic and lake; neither waits for the other."""
        if self._live_share and self._live.rows < BUFFER_ROWS:
            self._read(0.0 if self._stored.ready else timeout_s)
        has_live = self._live_ready() > 0
        try:
            self._stored.read_ahead(rows, waits=not has_live)
        except Unavailable as error:
            if not has_live:
                raise
            logger.warning("the lake is away, live samples are learnt: %s", error)
        self._leave_lake_if_done()

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
        if self._stored.is_open and not self.is_mixed:
            return
        missing = [r for r in ranges if r.kind == "live" and not self._live.has(r)]
        if self._stored.is_open and not missing:
            return
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
                "sends them again and a next start finds them. If they do not come, `headrace train repair` begins a "
                "run without them."
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
        """Return how many rows could be proposed now."""
        stored = self._stored.ready if self._stored.is_open else 0
        return stored + self._live_ready()

    def _live_ready(self) -> int:
        """Return how many live rows could be proposed now."""
        if self._stored.is_open:
            if not (self.is_mixed and self._live_share):
                return 0
            # What follows the lake's last row says positions, which are known when that row is taken.
            if self._stored.is_all_proposed:
                return 0
        total = self._live.rows
        return 0 if total < BUFFER_ROWS and self._is_lopsided() else total - self._live.ahead

    def _is_lopsided(self) -> bool:
        """True while a backlog was read of some partitions only: learning on would run ahead of the others' time."""
        partitions = self._live.partitions.items()
        return any(
            not each.has_more and max(each.next_offset, self._begins.get(p, 0)) < self._ends.get(p, 0)
            for p, each in partitions
        )

    @property
    def stored_left(self) -> int:
        """How many of the lake's rows, of all tasks, are not learnt."""
        return max(0, self._stored.rows - self._stored.taken) if self._stored.is_open else 0

    def waiting_rows(self) -> int:
        """Return how many rows are known of that are not learnt."""
        return self.stored_left + self._live.rows

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
    def taken_ms(self) -> int:
        """The broker's time of the newest record of the topic that is taken to its last row; 0 before there is one."""
        return max((each.taken_ms for each in self._live.partitions.values()), default=0)

    @property
    def is_stored(self) -> bool:
        """True while rows come from the lake."""
        return self._stored.is_open

    @property
    def is_mixed(self) -> bool:
        """True while live samples may be learnt beside those of the lake."""
        return self._live_from is not None

    def propose(self, rows_max: int) -> tuple[StepRange, ...]:
        """Return what the next step could take, at most `rows_max` rows behind what was proposed before: those of the
        lake first, then by partition."""
        if not self._stored.is_open:
            return self._live.propose(rows_max)
        if not self.is_mixed:
            return (self._stored.propose(rows_max),)
        stored, live = shared(rows_max, self._live_share, stored=self._stored.ready, live=self._live_ready())
        ranges = (self._stored.propose(stored),) if stored else ()
        return ranges + (self._live.propose(live) if live else ())

    def positions_after(self, ranges: tuple[StepRange, ...]) -> Positions:
        """Return the positions that the model contains once these ranges, and what was proposed, are learnt."""
        if self.is_mixed:
            return self.positions()
        moves = {p: each.spoken_for for p, each in self._live.partitions.items() if each.proposed > START}
        moves |= {r.partition: Position(*r.upto) for r in ranges if r.kind == "live"}
        return self.positions().advanced(moves)

    def positions(self) -> Positions:
        """Return the positions that the model contains; none of the lake's before all of it is taken."""
        if self.is_mixed:
            return Positions(self._generation)
        taken = {p: each.taken for p, each in sorted(self._live.partitions.items()) if each.taken > START}
        return Positions(self._generation, taken)

    def mixed(self) -> Mixed:
        """Return what the model contains while `positions` claim nothing, since the lake is not learnt to its end."""
        taken = {p: each.taken for p, each in sorted(self._live.partitions.items())}
        held = self._live_from
        beyond = {p: at for p, at in taken.items() if at > held.at(p)} if held is not None else {}
        return Mixed(self.stored_left, Positions(self._generation, beyond).to_json())

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
        live_from = self._live_from.to_json() if self._live_from is not None else None
        return Cursor(self.positions().to_json(), offsets, *stored, live_from, self.mixed().live)

    def batch(self, rows: pa.Table) -> Batch:
        """Return rows as the learner takes them."""
        return to_batch(rows, self._project)

    def _leave_lake_if_done(self) -> None:
        state = self._stored.state
        if state is None or not self._stored.is_done:
            return
        if not self.is_mixed:
            self._place_behind(state)
            self._assigned = False
        self._live_from = None
        self._stored.close()
        self._lease_is_due = True


def shared(rows_max: int, live_share: float, *, stored: int, live: int) -> tuple[int, int]:
    """Return how many stored and how many live rows a step takes, of so many that are ready.

    >>> shared(100, 0.25, stored=1_000, live=1_000), shared(100, 0.25, stored=1_000, live=10)
    ((75, 25), (90, 10))
    >>> shared(100, 0.25, stored=30, live=1_000), shared(100, 0.25, stored=30, live=10)
    ((30, 70), (30, 10))
    """
    of_stored = min(stored, rows_max - min(live, int(rows_max * live_share)))
    return of_stored, min(live, rows_max - of_stored)
