"""Where samples come from: the lake at one version in total order, then the topic from the lake's positions.

Nothing moves the source on but `take`, which is called for ranges that the steps log has committed. So `take` asks
nobody outside: what the hand-over from lake to topic needs is read when the lake is opened.
"""

from __future__ import annotations

import logging

import pyarrow as pa

from headrace.contract.formats.positions import START, Cursor, Position, Positions
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.steps import StepRange
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.trainer.model.batch import Batch
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.live import LivePartition, LiveRows
from headrace.trainer.source.range_reader import RangeReader
from headrace.trainer.source.stored import StoredRows

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
    ) -> None:
        self._project, self._reader, self._topic, self._lake = project, reader, topic, lake
        self._generation = generation
        schema, tasks = sample_schema(project), project.recipe.heads
        self._stored = StoredRows(lake, schema, tasks, f"train-{project.name}")
        self._live = LiveRows(schema, tasks, metrics)
        self._ranges = RangeReader(self._stored, self._live, schema)
        self._assigned = False
        self._lease_is_due = False
        """True from the end of the lake until the lease is given back."""
        self._ends: dict[int, int] = {}

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

    def _begin(self, cursor: Cursor) -> None:
        begins = self._reader.begin_offsets(self._topic)
        positions = Positions.from_json(self._generation, cursor.positions)
        self._live.partitions = {
            p: LivePartition.at(positions.at(p), cursor.next_offsets.get(str(p), begin)) for p, begin in begins.items()
        }
        self._stored.close()
        if cursor.lake_version >= 0:
            self._stored.open(cursor.lake_version, taken=cursor.lake_taken)
            if self._stored.is_open:
                logger.info("learning %d stored samples of lake version %d", self._stored.rows, cursor.lake_version)
            self._leave_lake_if_done()
        self._assigned = False

    def poll(self, timeout_s: float) -> None:
        """Read ahead. Raises what the reader raises; the next call goes on from the same place."""
        if self._lease_is_due:
            self._stored.release()
            self._lease_is_due = False
        if self._stored.is_open or self._live.rows >= BUFFER_ROWS:
            return
        if not self._assigned:
            self._ends = self._reader.end_offsets(self._topic)
            self._reader.assign({(self._topic, p): each.next_offset for p, each in self._live.partitions.items()})
            self._assigned = True
        try:
            records = self._reader.poll(256, timeout_s)
        except BaseException:
            self._assigned = False
            raise
        for record in records:
            self._live.intake(record)

    def ready_rows(self) -> int:
        """Return how many rows could be taken now."""
        if self._stored.is_open:
            return self._stored.left
        total = self._live.rows
        return 0 if total < BUFFER_ROWS and self._is_lopsided() else total

    def _is_lopsided(self) -> bool:
        """True while a backlog was read of some partitions only: learning on would run ahead of the others' time."""
        partitions = self._live.partitions.items()
        return any(not each.chunks and each.next_offset < self._ends.get(p, 0) for p, each in partitions)

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
        return Cursor(self.positions().to_json(), offsets, self._stored.version, self._stored.taken)

    def batch(self, rows: pa.Table) -> Batch:
        """Return rows as the learner takes them."""
        return to_batch(rows, self._project)

    def _leave_lake_if_done(self) -> None:
        state = self._stored.state
        if state is None or self._stored.left > 0:
            return
        for p, each in self._live.partitions.items():
            following = max(each.next_offset, state.next_offsets.get(p, each.next_offset))
            self._live.partitions[p] = LivePartition.at(state.positions.at(p), following)
        self._stored.close()
        self._lease_is_due, self._assigned = True, False
