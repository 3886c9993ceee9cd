"""Goal: whatever dies, each sample lies in the lake once, in its hour. Method: two sinks, an upkeep and readers on one
table, faults from a seed.

The real sink and the real Delta table. A commit is killed after any of its steps: it is done on a copy of the table
(by links), and only the first of the files that it made come over, the last of them perhaps half written. Two sinks
believe that they own the same partitions; between a commit's look at the table and its write, another one commits, or a
compaction or a vacuum does. Vacuum has no patience here, so only leases keep what a reader needs. The checker stands
outside: it knows what the topic holds. Then bugs are planted, and each must be caught.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from lake_world import DAY_MS, HOUR_MS, bring, link_tree, steps
from trainer_world import TOPICS, FaultyBlobs, Killed, samples, send

from headrace.backends.clock import VirtualClock
from headrace.backends.delta.leases import Leases
from headrace.backends.lake import delta as lake_delta
from headrace.backends.lake import upkeep as lake_upkeep
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.hour_files import hour_ms
from headrace.backends.lake.listing import count_rows, files
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.backends.lake.version_files import VersionFiles
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config, LakeConfig
from headrace.contract.errors import HeadraceError
from headrace.contract.formats.positions import Position
from headrace.contract.interfaces.log import Record
from headrace.stream.sink.stage import SinkStage

PARTITIONS, ROWS, TURNS = 2, 16, 10
CONFIG = LakeConfig(compact_files=2, target_file_bytes=1_000_000, vacuum_ms=1_000)
Endpoint = tuple[int, int, int]


class Lost(AssertionError):
    """The checker found what must not be."""


class FaultyLake(DeltaLake):
    """A sink's view of the table, whose next commit may be met by others or killed."""

    between: Callable[[], None] = staticmethod(lambda: None)
    kill: Callable[[int], int | None] = staticmethod(lambda made: None)

    def append(self, batches, next_offsets, positions):
        real, copy = Path(self.uri), Path(f"{self.uri}.copy")
        before = link_tree(real, copy)
        self._writer = None
        try:
            self.uri = str(copy)
            version = super().append(batches, next_offsets, positions)
        finally:
            self.uri, self._writer = str(real), None
        made = steps(before, copy)
        stop_at = self.kill(len(made))
        bring(made, real, copy, stop_at)
        shutil.rmtree(copy)
        if stop_at is not None:
            raise Killed
        return version

    def _transactions(self, next_offsets, positions):
        # Called when the table was read and looked at, before anything is written.
        self.between()
        return super()._transactions(next_offsets, positions)


class MetUpkeep(Upkeep):
    """An upkeep whose commits may be met by others."""

    between: Callable[[], None] = staticmethod(lambda: None)

    def _commit(self, table, actions, what, marks=()):
        self.between()
        return super()._commit(table, actions, what, marks)


class World:
    """What outlives a process: the topic, the table, the leases."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.uri = Random(seed), str(folder / "lake")
        self.clock, self.blobs = VirtualClock(1_000), FaultyBlobs()
        self.leases = Leases(self.blobs, self.clock, lease_ms=60_000)
        self.log = MemoryLog(lambda: 0)
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
        self.records: dict[int, list[Record]] = {}
        self.expected: dict[Endpoint, int] = {}
        for partition in range(PARTITIONS):
            self._fill(seed, partition)
        self.sinks = [Sink(self), Sink(self)]
        self.inside, self.writing = False, False

    def _fill(self, seed: int, partition: int) -> None:
        whole = samples(seed, partition, ROWS)
        # Mostly this hour, some rows hours late.
        times = [DAY_MS + (7 - self.random.choice((0, 0, 0, 1, 3))) * HOUR_MS + i for i in range(ROWS)]
        at = whole.schema.get_field_index("event_time_ms")
        whole = whole.set_column(at, whole.schema.field(at), pa.array(times))
        after, begin = (-1, -1), 0
        while begin < ROWS:
            rows = whole.slice(begin, self.random.randint(1, 5))
            after = send(self.log, rows, after=after)
            begin += rows.num_rows
        for p, o, r, t in zip(*(whole[n].to_pylist() for n in KEYS), strict=True):
            self.expected[p, o, r] = t
        reader = self.log.reader()
        reader.assign({(TOPICS.samples, partition): 0})
        self.records[partition] = list(reader.poll(10_000, 0.0))

    def lake(self, kind: type[DeltaLake] = DeltaLake) -> DeltaLake:
        """Return a process's own view of the table."""
        return kind(self.uri, partitions=PARTITIONS, config=CONFIG, leases=self.leases)

    def upkeep(self) -> None:
        """Compact or vacuum, as far as it comes."""
        lake = self.lake()
        if lake.open() is None:
            return
        keeper = MetUpkeep(lake)
        keeper.between = lambda: self._meet_upkeep()
        if self.writing or self.random.random() < 0.6:
            if self.random.random() < 0.3:
                self._killed_compaction()
            else:
                keeper.compact(Done())
        else:
            keeper.vacuum(Done(), [])

    def _meet_upkeep(self) -> None:
        """Let others in while a compaction has written and not committed: only a vacuum has to be older than that."""
        self.writing = True
        meet(self, None)
        self.writing = False

    def _killed_compaction(self) -> None:
        real, copy = Path(self.uri), Path(f"{self.uri}.compacted")
        before = link_tree(real, copy)
        lake = DeltaLake(str(copy), partitions=PARTITIONS, config=CONFIG)
        Upkeep(lake).compact(Done())
        made = steps(before, copy)
        if made:
            # Of several commits only what belongs to the first one may come over whole.
            upto = next(i for i, p in enumerate(made) if p.startswith("_delta_log"))
            bring(made, real, copy, self.random.randint(0, upto))
        shutil.rmtree(copy)

    def reader(self) -> None:
        """Lease a version, let others work, read it: all of it must be there, and nothing else."""
        lake = self.lake()
        state = lake.state()
        if state is None:
            return
        lake.hold(state.version, "reader")
        for _ in range(self.random.randint(0, 3)):
            self.upkeep()
        try:
            rows = VersionFiles(lake.open(state.version)).read(KEYS)
        except OSError as error:
            raise Lost(f"a leased version lost its files: {error}") from error
        self.check(rows, state.positions.by_partition)
        if self.random.random() < 0.7:
            lake.let_go("reader")

    def check(self, rows: pa.Table, positions: dict[int, Position]) -> None:
        """Raise `Lost` unless the rows are those of the topic up to the positions, each once."""
        found = sorted(zip(*(rows[n].to_pylist() for n in KEYS), strict=True))
        upto = {p: tuple(at) for p, at in positions.items()}
        wanted = sorted((*place, t) for place, t in self.expected.items() if place[1:] <= upto.get(place[0], (-1, -1)))
        if found != wanted:
            raise Lost(f"{len(found)} rows, {len(set(found))} different, and {len(wanted)} should be there")

    def check_newest(self) -> None:
        """Check the newest version, the hours of its rows included."""
        lake = self.lake()
        state = lake.state()
        if state is None:
            return
        rows = lake.read(columns=[*KEYS, "event_date", "event_hour"])
        self.check(rows, dict(state.positions.by_partition))
        for at_ms, day, hour in zip(*(c.to_pylist() for c in rows.columns[3:]), strict=True):
            if at_ms // HOUR_MS * HOUR_MS != hour_ms(day, hour):
                raise Lost(f"event time {at_ms} lies in hour {hour} of {day}")


KEYS = ("partition", "offset", "rank", "event_time_ms")


class Sink:
    """One sink process: it dies, and another one takes its place."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stage: SinkStage | None = None
        self.at: dict[int, int] = {}

    async def turn(self) -> None:
        """Take some records of some partition and commit them; die of what happens."""
        random, world = self.world.random, self.world
        try:
            if self.stage is None:
                lake = world.lake(FaultyLake)
                self.stage = SinkStage(Config(), lake, MemoryMetrics(), world.clock)
                self.at = {p: await self.stage.begin(p) or 0 for p in range(PARTITIONS)}
            lake = self.stage.lake
            lake.between = lambda: meet(world, self)
            lake.kill = lambda made: random.randint(0, made) if random.random() < 0.2 else None
            for partition in random.sample(range(PARTITIONS), random.randint(1, PARTITIONS)):
                for record in world.records[partition][self.at[partition] :][: random.randint(1, 3)]:
                    await self.stage.take(record)
                    self.at[partition] = record.offset + 1
            if self.stage.batches:
                self.stage._begin_commit()
                await self.stage._committing
            if self.stage._failure is not None:
                raise self.stage._failure
        except (Killed, HeadraceError, FileExistsError):
            self.stage = None


def meet(world: World, sink: Sink | None) -> None:
    """Let others at the table while a commit, a sink's or an upkeep's, is under way."""
    if world.inside or world.random.random() < 0.6:
        return
    world.inside = True
    try:
        if world.random.random() < 0.5:
            world.upkeep()
        else:
            other = next(s for s in world.sinks if s is not sink)
            asyncio.run(other.turn())
    finally:
        world.inside = False


def simulate(folder: Path, seed: int) -> World:
    """Run one seed to its end: faults, then a sink that finishes, then upkeep."""
    world = World(folder, seed)
    for _ in range(TURNS):
        actor = world.random.choice((world.sinks[0].turn, world.sinks[1].turn, world.upkeep, world.reader))
        asyncio.run(actor()) if asyncio.iscoroutinefunction(actor) else actor()
        if world.random.random() < 0.3:
            world.check_newest()
    last = Sink(world)
    asyncio.run(finish(last, world))
    state = world.lake().state()
    ends = {p: len(records) for p, records in world.records.items()}
    if state is None or dict(state.next_offsets) != ends:
        raise Lost(f"the topic ends at {ends}, the lake is at {state}")
    world.check_newest()
    world.leases.give_back("reader")
    Upkeep(world.lake()).compact(Done())
    Upkeep(world.lake()).vacuum(Done(), [])
    world.check_newest()
    if count_rows(world.lake().open()) != len(world.expected):
        raise Lost("rows of the topic are not in the lake")
    root = Path(world.uri)
    kept = {str(root / p) for p in files(DeltaTable(world.uri))["path"].to_pylist()}
    there = {str(p) for p in root.rglob("*") if p.is_file() and "_delta_log" not in p.parts}
    if there != kept:
        raise Lost(f"{len(there - kept)} files that no version needs are left")
    return world


async def finish(sink: Sink, world: World) -> None:
    """Store what is left, without faults."""
    stage = SinkStage(Config(), world.lake(), MemoryMetrics(), world.clock)
    for partition, records in world.records.items():
        begin = await stage.begin(partition) or 0
        for record in records[begin:]:
            await stage.take(record)
    await stage.finish()
    if stage._failure is not None:
        raise stage._failure


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Vacuum and the sweep delete at once: what must stay, must stay by a lease."""
    told = lake_delta.properties
    zero = {"delta.deletedFileRetentionDuration": "interval 0 seconds"}
    monkeypatch.setattr(lake_delta, "properties", lambda config: {**told(config), **zero})
    yield


@pytest.mark.parametrize(
    "first", [0, 10, 20, *(pytest.param(first, marks=pytest.mark.long) for first in range(30, 300, 10))]
)
def test_whatever_dies_each_row_is_there_once(tmp_path: Path, first: int):
    """Seeds of half a second each: 30 with every test run, 300 in the long one."""
    for seed in range(first, first + 10):
        simulate(tmp_path / str(seed), seed)


def caught(folder: Path, seeds: int = 25) -> int | None:
    """Return the first seed that finds the bug."""
    for seed in range(seeds):
        try:
            simulate(folder / str(seed), seed)
        except Lost:
            return seed
    return None


def test_planted_a_writer_that_does_not_look_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FaultyLake, "_refuse_repeats", lambda *_: None)
    assert caught(tmp_path) is not None


def test_planted_rows_before_positions_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two commits where there must be one: the first has the rows, the second the places."""
    whole = FaultyLake.append

    def halves(self, batches, next_offsets, positions):
        whole(self, batches, {}, {})
        return whole(self, [batches[0].slice(0, 0)], next_offsets, positions)

    monkeypatch.setattr(FaultyLake, "append", halves)
    assert caught(tmp_path) is not None


def test_planted_a_vacuum_without_leases_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Leases, "active", lambda self: [])
    assert caught(tmp_path) is not None


def test_planted_upkeeps_that_do_not_know_each_other_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name of its own for each: two of them replace the same files, as delta-rs's own optimize does."""
    told, names = MetUpkeep._commit, itertools.count()

    def apart(self, table, actions, what, marks=()):
        self.between()
        monkeypatch.setattr(lake_upkeep, "UPKEEP_ID", f"upkeep-{next(names)}")
        self.between, between = (lambda: None), self.between
        try:
            return told(self, table, actions, what, marks)
        finally:
            self.between = between

    monkeypatch.setattr(MetUpkeep, "_commit", apart)
    assert caught(tmp_path) is not None


def test_planted_late_rows_in_the_newest_hour_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = lake_delta.with_hours

    def one_hour(rows: pa.Table) -> pa.Table:
        found = told(rows)
        newest = max(found["event_hour"].to_pylist())
        at = found.schema.get_field_index("event_hour")
        return found.set_column(at, found.schema.field(at), pa.array([newest] * len(found), pa.int32()))

    monkeypatch.setattr(lake_delta, "with_hours", one_hour)
    assert caught(tmp_path) is not None


def test_planted_offsets_left_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = FaultyLake._transactions

    def apart(self, next_offsets, positions):
        found = told(self, next_offsets, positions)
        return [t for t in found if not t.app_id.startswith("samples-")]

    monkeypatch.setattr(FaultyLake, "_transactions", apart)
    assert caught(tmp_path) is not None


def test_the_day_of_the_tests_is_the_day_it_says():
    assert hour_ms(date(2026, 11, 25), 0) == DAY_MS
