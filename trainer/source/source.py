"""Where samples come from: the lake at one version in total order, then the topic from the lake's positions.

The reader keeps one position a partition. Rows at or below it are dropped; a record whose `after` lies beyond it is
held back, with an alarm, until the rows between have come. Nothing moves the position but `take`, which is called for
ranges that the steps log has committed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position, Positions, order_of, orders, position_of
from headrace.contract.formats.sample import matrix, parse_position, sample_schema
from headrace.contract.formats.sample_order import Next, SampleOrder
from headrace.contract.formats.steps import StepRange
from headrace.contract.hashing import combine64
from headrace.contract.interfaces.log import Reader, Record
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.kernels.hashes import hash64_texts
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.batch import Batch

logger = logging.getLogger("headrace.train")

HELD_MAX = 10_000
"""Most records that wait for a gap before them to close."""
BUFFER_ROWS = 131_072
"""Rows read ahead of training, over all partitions; beyond it reading pauses."""
TOTAL_ORDER = [
    ("event_time_ms", "ascending"),
    ("partition", "ascending"),
    ("offset", "ascending"),
    ("rank", "ascending"),
]


class LakeState(Protocol):
    """What one version of the lake holds."""

    @property
    def version(self) -> int:
        """The Delta table's version."""

    @property
    def positions(self) -> Positions:
        """Everything at or below these is in the lake."""

    @property
    def next_offsets(self) -> Mapping[int, int]:
        """The `samples` offsets to go on from."""


class Lake(Protocol):
    """The stored samples."""

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state (or that version's); None while there is no lake."""

    def read(self, version: int | None = None) -> pa.Table:
        """Return that version's rows, in any order."""

    def hold(self, version: int, holder: str) -> None:
        """Lease the version: its files stay until the lease is given back or ends."""

    def let_go(self, holder: str) -> None:
        """Give the holder's lease back."""


class Cursor(msgspec.Struct, frozen=True):
    """Where a run has got to. `lake_version` -1: it began without a lake, or is done with it."""

    positions: dict[str, list[int]] = {}
    next_offsets: dict[str, int] = {}
    lake_version: int = -1
    lake_taken: int = 0


@dataclass
class _Chunk:
    """Rows of one record that are not taken yet, of the recipe's tasks, in position order."""

    rows: pa.RecordBatch
    order_N: npt.NDArray[np.int64]
    record: int
    last: Position


@dataclass
class _Partition:
    taken: Position = START
    """The last position whose rows were given out."""
    order: SampleOrder = field(default_factory=SampleOrder)
    """Which records come next; its position is the last that was buffered."""
    next_offset: int = 0
    """The next `samples` record to read."""
    chunks: deque[_Chunk] = field(default_factory=deque)

    @property
    def rows(self) -> int:
        return sum(c.rows.num_rows for c in self.chunks)


def _pair(position: Position) -> tuple[int, int]:
    return (position.offset, position.rank)


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
        lake: Lake | None = None,
    ) -> None:
        self._project, self._reader, self._topic, self._metrics, self._lake = project, reader, topic, metrics, lake
        self._schema = sample_schema(project)
        self._generation = generation
        self._holder = f"train-{project.name}"
        self._partitions: dict[int, _Partition] = {}
        self._stored: pa.Table | None = None
        self._stored_taken = 0
        self._lake_version = -1
        self._assigned = False
        self._ends: dict[int, int] = {}

    def begin(self, cursor: Cursor | None) -> None:
        """Go on from `cursor`; without one, from the lake's newest version, else from the topic's beginning."""
        self._stored, self._lake_version, self._stored_taken = None, -1, 0
        begins = self._reader.begin_offsets(self._topic)
        if cursor is None:
            state = self._lake.state() if self._lake is not None else None
            self._partitions = {p: _Partition(next_offset=b) for p, b in begins.items()}
            if state is not None:
                self._open_lake(state.version)
        else:
            positions = Positions.from_json(self._generation, cursor.positions)
            self._partitions = {
                p: _Partition(positions.at(p), SampleOrder(positions.at(p)), cursor.next_offsets.get(str(p), b))
                for p, b in begins.items()
            }
            if cursor.lake_version >= 0:
                self._open_lake(cursor.lake_version)
                self._stored_taken = cursor.lake_taken
                self._leave_lake_if_done()
        self._assigned = False

    def begin_stored(self, version: int) -> None:
        """Begin afresh at this version of the lake: what a run's first recorded step says."""
        begins = self._reader.begin_offsets(self._topic)
        self._partitions = {p: _Partition(next_offset=b) for p, b in begins.items()}
        self._open_lake(version)
        self._assigned = False

    def poll(self, timeout_s: float) -> None:
        """Read ahead. Raises what the reader raises; the next call goes on from the same place."""
        if self._stored is not None or sum(p.rows for p in self._partitions.values()) >= BUFFER_ROWS:
            return
        if not self._assigned:
            self._ends = self._reader.end_offsets(self._topic)
            self._reader.assign({(self._topic, p): s.next_offset for p, s in self._partitions.items()})
            self._assigned = True
        try:
            records = self._reader.poll(256, timeout_s)
        except BaseException:
            self._assigned = False
            raise
        for record in records:
            self._partitions[record.partition].next_offset = record.offset + 1
            self._intake(record)

    def ready_rows(self) -> int:
        """Return how many rows could be taken now."""
        if self._stored is not None:
            return int(self._stored.num_rows) - self._stored_taken
        total = sum(p.rows for p in self._partitions.values())
        return 0 if total < BUFFER_ROWS and self._is_lopsided() else total

    def _is_lopsided(self) -> bool:
        """True while a backlog was read of some partitions only: learning on would run ahead of the others' time."""
        return any(not p.chunks and p.next_offset < self._ends.get(n, 0) for n, p in self._partitions.items())

    @property
    def is_stored(self) -> bool:
        """True while rows come from the lake."""
        return self._stored is not None

    def propose(self, rows_max: int) -> tuple[StepRange, ...]:
        """Return what the next step could take: at most `rows_max` rows, shared evenly among partitions."""
        if self._stored is not None:
            stop = min(self._stored.num_rows, self._stored_taken + rows_max)
            count = stop - self._stored_taken
            return (
                StepRange(kind="stored", version=self._lake_version, start=self._stored_taken, stop=stop, rows=count),
            )
        waiting = {p: s for p, s in sorted(self._partitions.items()) if s.chunks}
        ranges, left = [], rows_max
        for i, (number, partition) in enumerate(waiting.items()):
            quota = left // (len(waiting) - i)
            upto, rows = _upto(partition, quota)
            if upto > partition.taken:
                ranges.append(
                    StepRange(kind="live", partition=number, after=_pair(partition.taken), upto=_pair(upto), rows=rows)
                )
            left -= rows
        return tuple(ranges)

    def positions_after(self, ranges: tuple[StepRange, ...]) -> Positions:
        """Return the positions that the model contains once these ranges are learnt."""
        moves = {r.partition: Position(*r.upto) for r in ranges if r.kind == "live"}
        return self.positions().advanced(moves)

    def positions(self) -> Positions:
        """Return the positions that the model contains; none of the lake's before all of it is taken."""
        by_partition = {p: s.taken for p, s in sorted(self._partitions.items()) if s.taken > START}
        return Positions(self._generation, by_partition)

    def has(self, ranges: tuple[StepRange, ...]) -> bool:
        """Say whether every row of these ranges is read."""
        for r in ranges:
            if r.kind == "stored":
                if self._stored is None or r.version != self._lake_version or r.start != self._stored_taken:
                    raise InvariantBroken(
                        f"a recorded step takes lake rows {r.start}..{r.stop} of version {r.version}; this run is at "
                        f"row {self._stored_taken} of version {self._lake_version}."
                    )
            elif self._partitions[r.partition].order.position < Position(*r.upto):
                return False
        return True

    def take(self, ranges: tuple[StepRange, ...]) -> pa.Table:
        """Give out the rows of committed ranges, in the ranges' order, and move on behind them.

        Raises `InvariantBroken` when the rows found are not those that the step counted.
        """
        parts: list[pa.Table] = []
        for r in ranges:
            if r.kind == "stored":
                if self._stored is None:
                    raise InvariantBroken("a step of stored rows came after the lake was done.")
                parts.append(self._stored.slice(r.start, r.stop - r.start))
                self._stored_taken = r.stop
            else:
                parts.append(self._take_live(r))
            if parts[-1].num_rows != r.rows:
                raise InvariantBroken(f"{r} counts {r.rows} rows and {parts[-1].num_rows} were found.")
        table = pa.concat_tables(parts) if parts else self._schema.empty_table()
        self._leave_lake_if_done()
        return table

    def cursor(self) -> Cursor:
        """Return where to go on from, for a checkpoint."""
        offsets = {}
        for number, p in sorted(self._partitions.items()):
            records = [c.record for c in p.chunks] + [held.record.offset for held in p.order.held]
            offsets[str(number)] = min([p.next_offset, *records])
        return Cursor(self.positions().to_json(), offsets, self._lake_version, self._stored_taken)

    def batch(self, rows: pa.Table) -> Batch:
        """Return rows as the learner takes them."""
        return to_batch(rows, self._project)

    def _open_lake(self, version: int) -> None:
        if self._lake is None:
            raise InvariantBroken(f"the run is at version {version} of a lake, and no lake is given.")
        # Until the first checkpoint names the version, only the lease keeps its files from a vacuum.
        self._lake.hold(version, self._holder)
        stored = stored_order(conform(self._lake.read(version), self._schema), self._project.recipe.heads)
        if not stored.num_rows:
            self._lake.let_go(self._holder)
            return  # nothing to learn there: the topic has it all
        self._stored, self._lake_version, self._stored_taken = stored, version, 0
        logger.info("learning %d stored samples of lake version %d", stored.num_rows, version)

    def _leave_lake_if_done(self) -> None:
        if self._stored is None or self._stored_taken < self._stored.num_rows or self._lake is None:
            return
        state = self._lake.state(self._lake_version)
        if state is None:
            raise InvariantBroken(f"version {self._lake_version} of the lake is gone; was the store emptied?")
        for number, partition in self._partitions.items():
            at = state.positions.at(number)
            following = max(partition.next_offset, state.next_offsets.get(number, partition.next_offset))
            self._partitions[number] = _Partition(at, SampleOrder(at), following)
        self._stored, self._stored_taken, self._lake_version = None, 0, -1
        self._lake.let_go(self._holder)
        self._assigned = False

    def _intake(self, record: Record) -> None:
        if record.value is None:
            return
        partition = self._partitions[record.partition]
        order = partition.order
        following = order.offer(record)
        if following is None:
            self._metrics.add("gap_total")
            after, read = parse_position(record.headers["after"]), tuple(order.position)
            logger.warning(
                "gap: %s/%d offset %d begins after %s and only %s was read; it waits",
                *(record.topic, record.partition, record.offset, tuple(after), read),
            )
            if len(order.held) > HELD_MAX:
                raise InvariantBroken(
                    f"{len(order.held)} records of {record.topic}/{record.partition} wait for samples after "
                    f"{read} that never came. Keep the topic; `headrace ledger` shows what is missing."
                )
            return
        for each in following:
            self._buffer(partition, each)

    def _buffer(self, partition: _Partition, each: Next) -> None:
        rows = each.new_rows(decode_batch(each.record.value or b"", self._schema))
        ours = pc.is_in(rows["task"], value_set=pa.array(self._project.recipe.heads))
        if not pc.all(ours).as_py():
            rows = rows.filter(ours)
        order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
        partition.chunks.append(_Chunk(rows, order_N, each.record.offset, each.last))

    def _take_live(self, wanted: StepRange) -> pa.Table:
        partition, upto = self._partitions[wanted.partition], Position(*wanted.upto)
        if tuple(partition.taken) != tuple(wanted.after):
            raise InvariantBroken(
                f"a step takes partition {wanted.partition} after {wanted.after}; this run stands at {partition.taken}."
            )
        parts: list[pa.RecordBatch] = []
        while partition.chunks:
            chunk = partition.chunks[0]
            count = int(np.searchsorted(chunk.order_N, order_of(upto), side="right"))
            if count:
                parts.append(chunk.rows.slice(0, count))
            if chunk.last <= upto:
                partition.chunks.popleft()
                continue
            chunk.rows, chunk.order_N = chunk.rows.slice(count), chunk.order_N[count:]
            break
        partition.taken = upto
        return pa.Table.from_batches(parts, self._schema)


def _upto(partition: _Partition, rows_max: int) -> tuple[Position, int]:
    """Return the position that takes at most `rows_max` rows, and how many rows that is."""
    upto, rows = partition.taken, 0
    for chunk in partition.chunks:
        room = rows_max - rows
        if chunk.rows.num_rows <= room:
            upto, rows = chunk.last, rows + chunk.rows.num_rows
            continue
        if room:
            upto, rows = position_of(int(chunk.order_N[room - 1])), rows + room
        break
    return upto, rows


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return stored rows with exactly `schema`'s columns: missing ones null, unknown ones gone (growth rule)."""
    have = set(rows.schema.names)
    columns = [rows[f.name].cast(f.type) if f.name in have else pa.nulls(len(rows), f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def stored_order(rows: pa.Table, tasks: tuple[str, ...]) -> pa.Table:
    """Return the rows of these tasks in total order: event time, partition, offset, rank."""
    return rows.filter(pc.is_in(rows["task"], value_set=pa.array(tasks))).sort_by(TOTAL_ORDER)


def to_batch(rows: pa.Table, project: Project) -> Batch:
    """Return sample rows as the learner takes them; rows of another spec's digest are featurized again."""
    spec = project.features
    table = rows.combine_chunks()
    batches = table.to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    if batch.num_rows and pc.all(pc.equal(batch["spec"], spec.digest())).as_py():
        slots_BF, numeric_BD = matrix(batch["slots"], spec.slots), matrix(batch["numeric"], spec.numerics)
    else:
        slots_BF, numeric_BD = featurize(batch, spec)
    return Batch(
        np.array(slots_BF, np.int64),
        np.array(numeric_BD, np.float32),
        np.array(batch["label"], np.float32),
        np.array(batch["weight"], np.float32),
        np.array(batch["event_time_ms"], np.int64),
        np.array(pc.fill_null(pc.index_in(batch["task"], value_set=pa.array(project.recipe.heads)), -1), np.int8),
        sample_hashes(batch) if project.recipe.negative_share < 1 else np.zeros(batch.num_rows, np.int64),
    )


def sample_hashes(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return a hash of each sample's identity, its impression and task: int64 [B]."""
    return combine64(hash64_texts(rows["event_id"]), hash64_texts(rows["task"])).view(np.int64)


def known_ms(rows: pa.Table, window_ms: int) -> npt.NDArray[np.int64]:
    """Return when each sample's label was known, in event time: int64 [B].

    That is the feedback's time for a positive, the window's end for a negative.
    """
    by_window = pc.add(rows["event_time_ms"], window_ms)
    return np.array(pc.coalesce(rows["feedback_time_ms"], by_window), np.int64)
