"""Goal: whatever dies, the archive has each record of `events` once, as it lay, up to where it says; what it has not it
says. Method: two processes that archive one log, an upkeep and readers on one Delta table, faults from a seed.

A commit is killed after any of its steps: it is done on a copy of the table (by links), and only the first of the
files that it made come over. Two processes believe that they own the same partitions; between a commit's look at the
table and its write another one commits, or an upkeep does. The topic's retention takes records, archived or not; the
archive's drops hours. Vacuum has no patience here, so only leases keep what a reader needs. The checker stands outside:
it knows every record that was ever appended. Then bugs are planted, and each must be caught.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
from archive_world import CONFIG, EVENTS, append, new_archive, new_log
from lake_world import bring, link_tree, steps
from trainer_world import Killed

from headrace.backends.archive import delta as archive_delta
from headrace.backends.archive import files as archive_files
from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.archive.files import listed
from headrace.backends.archive.upkeep import ArchiveUpkeep
from headrace.backends.clock import VirtualClock
from headrace.backends.delta import fsync
from headrace.backends.lake.upkeep import Done
from headrace.backends.log.archived import ArchivedReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ArchiveConfig
from headrace.contract.errors import HeadraceError, InvariantBroken, Unavailable
from headrace.contract.interfaces.archive import Offsets
from headrace.contract.interfaces.log import Record, VerbatimRecord, read_range
from headrace.stream.sink.archive import EventArchive

PARTITIONS, TURNS, START_MS = 2, 14, 1_795_564_800_000
STAGE = ArchiveConfig(commit_bytes=1_048_576)


class Lost(AssertionError):
    """The checker found what must not be."""


class FaultyArchive(DeltaArchive):
    """A process's view of the table, whose next commit may be met by others or killed."""

    between: Callable[[], None] = staticmethod(lambda: None)
    kill: Callable[[int], int] | None = None
    killed: ClassVar[list[int]] = [0]
    """How many commits were killed."""

    def append(self, records, taken, lost):
        if self.kill is None:
            return super().append(records, taken, lost)
        real, copy = Path(self.uri), Path(f"{self.uri}.copy")
        before = link_tree(real, copy)
        try:
            self.uri, self._writer = str(copy), None
            super().append(records, taken, lost)
        finally:
            self.uri, self._writer = str(real), None
        made = steps(before, copy)
        self.killed[0] += 1
        bring(made, real, copy, self.kill(len(made)))
        shutil.rmtree(copy)
        raise Killed

    def _written(self, table, records):
        # Called when the table was read and looked at, before anything is written.
        if not self.uri.endswith(".copy"):
            self.between()
        return super()._written(table, records)


class World:
    """The log, the table, and what was ever appended."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.clock = folder, Random(seed), VirtualClock(START_MS)
        self.log = new_log(self.clock, PARTITIONS)
        self.truth: dict[int, list[VerbatimRecord]] = {p: [] for p in range(PARTITIONS)}
        self.dropped_before_ms = 0
        self.processes = [self.start(), self.start()]

    def start(self) -> EventArchive:
        view = new_archive(self.folder, self.clock, PARTITIONS, events_id=self.log.admin().topic_id(EVENTS))
        view.__class__ = FaultyArchive
        return EventArchive(
            *(STAGE, EVENTS, view, MemoryMetrics(), self.clock),
            open_reader=lambda: self.log.reader(verbatim=True),
            partitions=lambda: range(PARTITIONS),
            kept_ms=-1,
        )

    def archive(self) -> DeltaArchive:
        return new_archive(self.folder, self.clock, PARTITIONS)

    def fill(self) -> None:
        for _ in range(self.random.randrange(12)):
            partition = self.random.randrange(PARTITIONS)
            if self.random.random() < 0.1:
                self.log.mark(EVENTS, partition)
            self.truth[partition].append(append(self.log, partition, self.random))
            self.clock.advance(self.random.choice((0, 0.001, 1, 700)))

    def round(self, stage: EventArchive) -> None:
        """Do one round, as `EventArchive._work` does; a thread less."""
        try:
            stage._one_round(frozenset(range(PARTITIONS)))
        except Unavailable:
            stage._forget()

    def turn(self) -> None:
        """Do one thing, with one fault."""
        random = self.random
        number = random.randrange(len(self.processes))
        stage = self.processes[number]
        view = stage.archive
        assert isinstance(view, FaultyArchive)
        fault = random.choice(("none", "none", "kill", "other", "upkeep", "trim"))
        if fault == "kill":
            view.kill = lambda made: random.randrange(made + 1)
        elif fault == "other":
            view.between = lambda: self.round(self.start())
        elif fault == "upkeep":
            view.between = self.upkeep
        elif fault == "trim":
            self.trim()
        try:
            self.round(stage)
        except Killed:
            self.processes[number] = self.start()
        view.kill, view.between = None, lambda: None
        if random.random() < 0.3:
            self.upkeep()

    def trim(self) -> None:
        """Let the topic forget, archived or not."""
        partition = self.random.randrange(PARTITIONS)
        begin, end = self.log.begins[EVENTS, partition], self.log.reader().end_offsets(EVENTS)[partition]
        self.log.trim(EVENTS, partition, self.random.randint(begin, end))

    def upkeep(self) -> None:
        archive = self.archive()
        if archive.open() is None:
            return
        archive.config = CONFIG
        keeper, done = ArchiveUpkeep(archive, self.clock.now_ms() + 2 * 3_600_000), Done()
        keeper.compact(done)
        if self.random.random() < 0.3:
            archive.config = archive.config.__class__(retention_ms=3_600_000, vacuum_ms=1, compact_files=2)
            now_ms = START_MS + self.random.randrange(3, 6) * 3_600_000
            ArchiveUpkeep(archive, now_ms).retain(done, now_ms)
            self.dropped_before_ms = max(self.dropped_before_ms, now_ms - 2 * 3_600_000)
        keeper.vacuum(done, ())

    def read_on(self) -> Iterator[Record]:
        """Read both as one log, while others go on."""
        reader = ArchivedReader(self.log.reader(), self.archive(), EVENTS, holder="reader")
        begins = reader.begin_offsets(EVENTS)
        try:
            yield from read_range(reader, EVENTS, begins=begins, silent_s=0.3)
        finally:
            reader.close()

    def check(self) -> None:
        """Hold all that is archived against what was appended."""
        archive = self.archive()
        state = archive.state()
        if state is None:
            return
        every = listed(archive.opened())
        for partition, whole in state.whole.items():
            truth = self.truth[partition]
            found = list(archive.read(state.version, partition, Offsets(0, 1 << 60)))
            offsets = [record.offset for record in found]
            if offsets != sorted(set(offsets)):
                raise Lost(f"partition {partition} has a record twice: {offsets}")
            rows = sum(file.rows for file in every if file.place.partition == partition)
            if rows != len(found):
                raise Lost(f"partition {partition} has {rows} rows of {len(found)} records")
            if any(record not in truth for record in found):
                raise Lost(f"partition {partition} has what never lay in the topic")
            wanted = [record for record in truth if whole.begin <= record.offset < whole.end]
            if [record for record in found if whole.begin <= record.offset < whole.end] != wanted:
                raise Lost(f"partition {partition} is not whole in {whole}")
            if whole.begin and not self._is_known(partition, whole, state.lost.get(partition)):
                raise Lost(f"nobody says why partition {partition} begins at {whole.begin}: {state}")

    def _is_known(self, partition: int, whole: Offsets, lost: Offsets | None) -> bool:
        if lost is not None and lost.end == whole.begin:
            return True
        before = [record for record in self.truth[partition] if record.offset < whole.begin]
        # A first commit begins where the topic began.
        first = self.log.begins[EVENTS, partition] >= whole.begin
        return first or (bool(before) and before[-1].timestamp_ms < self.dropped_before_ms + 3_600_000)


def simulate(folder: Path, seed: int) -> World:
    world = World(folder, seed)
    reading: Iterator[Record] | None = None
    got: list[Record] = []
    for _ in range(TURNS):
        world.fill()
        world.turn()
        world.check()
        if reading is None and world.random.random() < 0.3:
            reading, got = world.read_on(), []
        if reading is not None:
            reading = read_some(world, reading, got)
    for stage in (world.start(), world.start()):
        world.round(stage)
        world.check()
    state = world.archive().state()
    for partition, records in world.truth.items():
        left = [r for r in records if r.offset >= world.log.begins[EVENTS, partition]]
        if left and (state is None or state.whole[partition].end <= left[-1].offset):
            raise Lost(f"partition {partition} is archived up to {state}, {left[-1].offset} is in the topic")
    check_one_log(world)
    return world


def read_some(world: World, reading: Iterator[Record], got: list[Record]) -> Iterator[Record] | None:
    """Read a few records on; what is read is in order, without a hole."""
    try:
        for _ in range(world.random.randrange(1, 12)):
            got.append(next(reading))
    except StopIteration:
        check_read(world, got)
        return None
    except InvariantBroken as error:
        # The topic forgot what nobody had archived: said with both ends, and not passed by.
        if "is wanted" not in str(error):
            raise
        check_read(world, got)
        return None
    return reading


def check_read(world: World, got: list[Record]) -> None:
    for partition, truth in world.truth.items():
        ours = [(r.offset, r.value) for r in got if r.partition == partition]
        if ours:
            wanted = [(r.offset, r.value) for r in truth if ours[0][0] <= r.offset <= ours[-1][0]]
            if ours != wanted:
                raise Lost(f"partition {partition} was read as {ours}")


def check_one_log(world: World) -> None:
    got = list(world.read_on())
    check_read(world, got)
    for partition, truth in world.truth.items():
        ours = [r.offset for r in got if r.partition == partition]
        if truth and world.log.begins[EVENTS, partition] <= truth[-1].offset and ours[-1:] != [truth[-1].offset]:
            raise Lost(f"partition {partition} was read up to {ours[-1:]} of {truth[-1].offset}")


@pytest.fixture(autouse=True)
def _without_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power stays on here: what is written is there."""
    monkeypatch.setattr(fsync, "sync", lambda path: None)
    monkeypatch.setattr(fsync, "read_back", lambda root, versions: None)


def test_each_record_is_archived_once_whatever_dies(tmp_path: Path):
    before = FaultyArchive.killed[0]
    for seed in range(6):
        simulate(tmp_path / str(seed), seed)
    assert FaultyArchive.killed[0] > before + 4


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6, 306))
def test_each_record_is_archived_once_whatever_dies_long(tmp_path: Path, seed: int):
    simulate(tmp_path, seed)


def is_caught(folder: Path, seeds: int = 8) -> bool:
    """Say whether the checker finds something within these seeds."""
    for seed in range(seeds):
        try:
            simulate(folder / str(seed), seed)
        except (Lost, HeadraceError, AssertionError):
            return True
    return False


def test_planted_a_commit_that_does_not_look_where_the_archive_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = DeltaArchive._moved
    monkeypatch.setattr(
        DeltaArchive, "_moved", lambda self, table, p, span, lost: told(self, _Blind(table), p, span, lost)
    )
    assert is_caught(tmp_path)


class _Blind:
    def __init__(self, table):
        self.table = table

    def transaction_version(self, name):
        return None


def test_planted_an_end_that_is_one_too_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = DeltaArchive.append

    def append_(self, records, taken, lost):
        return told(self, records[:-1] or records, taken, lost)

    monkeypatch.setattr(FaultyArchive, "append", append_)
    assert is_caught(tmp_path)


def test_planted_a_gap_that_is_passed_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = EventArchive._commit

    def commit(self, taking):
        spans = {
            p: Offsets(taking.lost[p].begin if p in taking.lost else s.begin, s.end) for p, s in taking.taken.items()
        }
        told(self, taking._replace(lost={}, taken=spans))

    monkeypatch.setattr(EventArchive, "_commit", commit)
    assert is_caught(tmp_path)


def test_planted_a_retention_that_does_not_say_what_it_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = ArchiveUpkeep._commit
    monkeypatch.setattr(
        ArchiveUpkeep, "_commit", lambda self, table, actions, what, marks=(): told(self, table, actions, what, ())
    )
    assert is_caught(tmp_path)


def test_planted_a_compaction_that_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = ArchiveUpkeep._commit

    def commit(self, table, actions, what, marks=()):
        return told(self, table, actions[:-1] if what == "compact" else actions, what, marks)

    monkeypatch.setattr(ArchiveUpkeep, "_commit", commit)
    assert is_caught(tmp_path)


def test_planted_headers_of_which_the_last_alone_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = archive_files.to_rows

    def rows(records):
        return told([_with_last(record) for record in records])

    def _with_last(record):
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        return VerbatimRecord(**fields | {"raw_headers": tuple(dict(record.raw_headers).items())})

    monkeypatch.setattr(archive_delta, "to_rows", rows)
    assert is_caught(tmp_path)
