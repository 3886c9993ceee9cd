"""Goal: rows and places move together or not at all, on every store that a lake can lie on.

Method: one suite over a POSIX path, a real HDFS and, with `make test-cephfs`, a real CephFS; killed writers included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from lake_world import DAY_MS, HOUR_MS, hours, samples

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.backends.delta.leases import Leases
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.export import parse_at
from headrace.backends.lake.listing import files, partition_columns
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.config import LakeConfig
from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.positions import START, Position
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.servers.cephfs import CephFs

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("slots", pa.list_(pa.int64()))])
# The shortest time that Delta knows: files of a second ago are old.
QUICK = LakeConfig(vacuum_ms=1_000, compact_files=2)
OLD_S = 2.1

NewLake = Callable[..., DeltaLake]


@pytest.fixture(
    params=["file", pytest.param("hdfs", marks=pytest.mark.real), pytest.param("cephfs", marks=pytest.mark.real)]
)
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a lake may lie, in each store in turn; nothing is there."""
    if request.param == "file":
        return str(tmp_path / "lake")
    if request.param == "cephfs":
        cluster: CephFs = request.getfixturevalue("cephfs")
        return str(cluster.mount / tmp_path.name / "lake")
    layout: Layout = request.getfixturevalue("stack")
    return f"{layout.store}/{tmp_path.name}"


@pytest.fixture
def new_lake(uri: str, tmp_path: Path) -> Iterator[NewLake]:
    """Return another process's view of the one lake."""
    clock = VirtualClock(1_000)
    leases = Leases(FileBlobs(tmp_path / "blobs"), clock, lease_ms=60_000)

    def make(config: LakeConfig = QUICK, generation: int = 1) -> DeltaLake:
        lake = DeltaLake(uri, generation=generation, partitions=3, config=config, leases=leases)
        lake.clock = clock  # type: ignore[attr-defined]
        return lake

    yield make


def rows(*ids: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"id": i, "slots": [i, -i]} for i in ids], schema=SCHEMA)


def fill(lake: DeltaLake, commits: int, first: int = 0) -> None:
    """Commit one record of two hours each."""
    for offset in range(first, first + commits):
        lake.append([samples(0, offset, hours(1, 2))], {0: offset + 1}, {0: Position(offset, 1)})


def places(table: pa.Table) -> list[tuple[int, int]]:
    return sorted(zip(table["offset"].to_pylist(), table["rank"].to_pylist(), strict=True))


def test_a_commit_holds_rows_offsets_and_positions(new_lake: NewLake):
    lake = new_lake()
    assert lake.state() is None
    assert lake.append([rows(1), rows(2)], {0: 3, 2: 7}, {0: Position(11, 4), 2: Position(2, 0)}) == 0
    assert lake.append([rows(3)], {0: 4}, {0: Position(2**38, 2**24 - 1)}) == 1
    newest, first = lake.state(), lake.state(0)
    assert newest is not None and first is not None
    assert newest.next_offsets == {0: 4, 2: 7} and first.next_offsets == {0: 3, 2: 7}
    assert newest.positions.at(0) == (2**38, 2**24 - 1) and newest.positions.at(2) == (2, 0)
    assert sorted(lake.read()["id"].to_pylist()) == [1, 2, 3]
    assert lake.read(0, ["id"]).column_names == ["id"] and lake.read(0).num_rows == 2


def test_a_lake_of_before_tells_where_it_is_whole(new_lake: NewLake, monkeypatch: pytest.MonkeyPatch):
    """Its positions keep 22 bits for a rank, under another name; the next commit writes today's."""
    old = new_lake()
    monkeypatch.setattr(old, "_position_id", old._old_position_id)
    monkeypatch.setattr("headrace.backends.lake.delta.order_of", lambda at: at.offset << 22 | at.rank)
    old.append([samples(0, 11, hours(1, 2))], {0: 3}, {0: Position(11, 1)})
    monkeypatch.undo()
    lake = new_lake()
    state = lake.state()
    assert state is not None and state.positions.at(0) == (11, 1)
    with pytest.raises(Unavailable, match="Another one has stored them"):
        lake.append([samples(0, 11, hours(1))], {0: 4}, {0: Position(11, 0)})
    lake.append([samples(0, 12, hours(1))], {0: 4}, {0: Position(12, 0)})
    state = new_lake().state()
    assert state is not None and state.positions.at(0) == (12, 0)


def test_a_new_column_is_merged_and_generations_are_apart(new_lake: NewLake):
    lake = new_lake()
    fill(lake, 2)
    wider = samples(0, 2, hours(1)).append_column("colour", pa.array(["red"]))
    lake.append([wider], {0: 3}, {0: Position(2, 0)})
    fill(lake, 1, first=3)  # a writer of the older schema goes on
    Upkeep(lake).compact(Done())
    assert sorted(lake.read()["colour"].to_pylist(), key=str) == [None] * 6 + ["red"]
    assert "colour" not in lake.read(1).column_names
    other = new_lake(generation=2).state()
    assert other is not None and other.next_offsets == {} and other.positions.by_partition == {}


def test_reading_no_lake_says_so(new_lake: NewLake):
    with pytest.raises(Unavailable, match="no lake"):
        new_lake().read()
    with pytest.raises(Unavailable, match="no lake"):
        Upkeep(new_lake()).compact(Done())


def test_rows_lie_in_the_hour_of_their_event_late_ones_too(new_lake: NewLake):
    lake = new_lake()
    lake.append([samples(0, 0, hours(5, 6))], {0: 1}, {0: Position(0, 1)})
    lake.append([samples(0, 1, [*hours(7, 5), DAY_MS - 1, DAY_MS + 24 * HOUR_MS])], {0: 2}, {0: Position(1, 3)})
    found = files(lake.open())
    assert sorted(
        zip(
            found["partition.event_date"].to_pylist(),
            found["partition.event_hour"].to_pylist(),
            found["num_records"].to_pylist(),
            strict=True,
        )
    ) == [
        (date(2026, 11, 24), 23, 1),
        (date(2026, 11, 25), 5, 1),
        (date(2026, 11, 25), 5, 1),
        (date(2026, 11, 25), 6, 1),
        (date(2026, 11, 25), 7, 1),
        (date(2026, 11, 26), 0, 1),
    ]
    assert lake.read(day=date(2026, 11, 25)).num_rows == 4
    assert "event_hour" not in lake.read().column_names and lake.read(columns=["event_hour"]).num_rows == 6


def test_a_field_with_the_name_of_a_partition_is_refused(new_lake: NewLake):
    clash = samples(0, 0, hours(1)).append_column("event_hour", pa.array([1]))
    with pytest.raises(ConfigRejected, match="event_hour"):
        new_lake().append([clash], {0: 1}, {0: Position(0, 0)})


def test_a_table_of_before_stays_readable_and_unpartitioned(uri: str, new_lake: NewLake):
    write_deltalake(uri, pa.Table.from_batches([samples(0, 0, hours(1, 2))]), mode="append")
    lake = new_lake(LakeConfig(vacuum_ms=1_000, compact_files=2, retention_ms=1))
    assert lake.settle() is True and lake.settle() is False
    fill(lake, 2, first=1)
    assert partition_columns(lake.open()) == []
    done = Done()
    Upkeep(lake).retain(done, 2 * DAY_MS)
    Upkeep(lake).compact(done)
    assert (done.files_compacted, done.hours_dropped) == (3, 0)
    assert places(lake.read(day=date(2026, 11, 25))) == [(o, r) for o in range(3) for r in range(2)]


def test_of_two_writers_of_a_partition_one_is_refused(new_lake: NewLake):
    mine, theirs = new_lake(), new_lake()
    fill(mine, 1)
    fill(theirs, 1, first=1)
    with pytest.raises(Unavailable, match="Another one has stored them"):
        fill(mine, 1, first=1)
    with pytest.raises(Unavailable, match="Another one has stored them"):
        mine.append([samples(1, 0, hours(1))], {0: 1, 1: 1}, {1: Position(0, 0)})
    mine.append([samples(1, 0, hours(1))], {1: 1}, {1: Position(0, 0)})
    fill(theirs, 1, first=2)
    assert places(new_lake().read()) == sorted([(o, r) for o in range(3) for r in range(2)] + [(0, 0)])


def test_writers_that_meet_in_the_log_are_told_apart(new_lake: NewLake):
    """The second writer has read the table before the first one's commit: only Delta's own check is left."""
    mine, theirs = new_lake(), new_lake()
    fill(mine, 1)
    stale = theirs.open()
    fill(mine, 1, first=1)
    theirs._newest_for_writing = lambda: stale  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="did not take a commit"):
        fill(theirs, 1, first=1)
    stale = new_lake().open()
    Upkeep(new_lake()).compact(Done())
    fill(theirs, 1, first=2)  # over a compaction it steps
    assert places(new_lake().read()) == [(o, r) for o in range(3) for r in range(2)]


def test_compaction_changes_files_and_nothing_else(new_lake: NewLake):
    lake, done = new_lake(), Done()
    fill(lake, 5)
    before = lake.state()
    keeper = Upkeep(lake)
    keeper.compact(done)
    keeper.look(done)
    assert (done.hours_compacted, done.files_compacted, done.files) == (2, 10, 2)
    after = lake.state()
    assert before is not None and after is not None
    assert (after.positions, after.next_offsets) == (before.positions, before.next_offsets)
    assert lake.read().sort_by("offset").sort_by([("offset", "ascending"), ("rank", "ascending")]) == lake.read(
        before.version
    ).sort_by([("offset", "ascending"), ("rank", "ascending")])
    keeper.compact(again := Done())
    assert again.files_compacted == 0


def test_of_two_compactions_of_the_same_files_one_is_refused(new_lake: NewLake):
    """Both read the table before either commits; rows of files that are replaced twice would be there twice."""
    lake = new_lake()
    fill(lake, 3)
    expected = places(lake.read())
    stale = [lake.open(), lake.open()]
    late, later = Upkeep(new_lake()), Upkeep(new_lake(LakeConfig(retention_ms=HOUR_MS)))
    late._open, later._open = lambda: stale[0], lambda: stale[1]  # type: ignore[method-assign]
    Upkeep(lake).compact(Done())
    for act in (late.compact, lambda done: later.retain(done, 2 * DAY_MS)):
        done = Done()
        act(done)
        assert (done.refused > 0, done.files_compacted, done.hours_dropped) == (True, 0, 0)
        assert places(new_lake().read()) == expected


def test_vacuum_leaves_what_is_new_leased_or_pinned(new_lake: NewLake):
    fill(new_lake(LakeConfig(vacuum_ms=3_600_000)), 4)
    lake = new_lake()
    lake.hold(1, "reader")
    keeper = Upkeep(lake)
    keeper.compact(Done())
    assert keeper.vacuum(Done(), []) == []  # younger than vacuum_ms
    lake.settle()
    time.sleep(OLD_S)
    done = Done()
    gone = keeper.vacuum(done, [0])
    assert (done.kept_versions, done.files_vacuumed) == ([0, 1], 4)
    assert places(lake.read(1)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lake.let_go("reader")
    # On HDFS Delta names again what it deleted before.
    assert len({*keeper.vacuum(Done(), [])} - {*gone}) == 4


def test_a_lease_that_ended_holds_nothing(new_lake: NewLake):
    lake = new_lake()
    fill(lake, 2)
    lake.hold(0, "killed")
    assert lake.leases is not None
    assert [(x.holder, x.version, x.rows) for x in lake.leases.active()] == [("killed", 0, 2)]
    lake.clock.advance(61)  # type: ignore[attr-defined]
    assert lake.leases.active() == []


def test_a_version_without_files_is_told_by_positions(new_lake: NewLake):
    lake = new_lake()
    fill(lake, 4)
    expected = places(lake.read(2))
    keeper = Upkeep(lake)
    keeper.compact(Done())
    time.sleep(OLD_S)
    assert len(keeper.vacuum(Done(), [])) == 8
    assert places(lake.read(2)) == expected
    assert lake.read(2, ["slots"]).num_rows == len(expected)


def test_retention_drops_hours_and_says_what_can_not_be_read(new_lake: NewLake):
    lake = new_lake(LakeConfig(vacuum_ms=1_000, compact_files=2, retention_ms=HOUR_MS))
    fill(lake, 3)
    lake.hold(1, "reader")
    keeper, done = Upkeep(lake), Done()
    keeper.retain(done, DAY_MS + 3 * HOUR_MS - 1)
    assert done.hours_dropped == 0
    keeper.retain(done, DAY_MS + 3 * HOUR_MS)
    assert (done.hours_dropped, done.rows_dropped) == (1, 3)
    assert set(lake.read()["rank"].to_pylist()) == {1}
    time.sleep(OLD_S)
    keeper.vacuum(Done(), [])
    assert lake.read(1).num_rows == 4
    state = lake.state()
    assert state is not None and state.positions.at(0) == (2, 1)
    lake.let_go("reader")
    keeper.vacuum(Done(), [])
    with pytest.raises(InvariantBroken, match="held 4 rows and 2 are left"):
        lake.read(1)


def test_time_travel_by_version_and_by_time(new_lake: NewLake):
    lake = new_lake()
    fill(lake, 1)
    time.sleep(0.05)
    between = datetime.now(UTC)
    time.sleep(0.05)
    fill(lake, 1, first=1)
    assert lake.open(between).version() == 0
    assert lake.open(parse_at(between.isoformat())).version() == 0
    assert [entry.version for entry in Upkeep(lake).history()] == [1, 0]
    with pytest.raises(Unavailable, match="opened at 9"):
        lake.state(9)
    with pytest.raises(ConfigRejected, match="is no time"):
        parse_at("yesterday")


def test_a_history_that_a_commit_came_into_has_the_right_numbers(new_lake: NewLake, monkeypatch: pytest.MonkeyPatch):
    lake, others = new_lake(), new_lake()
    fill(lake, 2)
    open_table, late = lake.open, [2]

    def open_then_commit(*args: object) -> object:
        table = open_table(*args)
        if late:
            fill(others, 1, first=late.pop())
        return table

    monkeypatch.setattr(lake, "open", open_then_commit)
    assert [entry.version for entry in Upkeep(lake).history()] == [2, 1, 0]


def test_duckdb_reads_the_table(uri: str, new_lake: NewLake):
    """The line of docs/lake.md: a version's files, with the hours as columns."""
    if "://" in uri:
        pytest.skip("DuckDB has no hdfs://; there it gets the Arrow table")
    lake = new_lake()
    fill(lake, 3)
    found = duckdb.sql(
        "select event_hour, count(*) from read_parquet($paths, hive_partitioning = true, union_by_name = true) "
        "group by event_hour order by event_hour",
        params={"paths": lake.open().file_uris()},
    ).fetchall()
    assert found == [(1, 3), (2, 3)]


def test_a_folder_with_a_space_is_read(tmp_path: Path):
    lake = DeltaLake(str(tmp_path / "a lake"), partitions=3)
    fill(lake, 2)
    assert places(lake.read(day=date(2026, 11, 25))) == places(lake.read(1, ["offset", "rank"])) == places(lake.read())


def test_a_commit_is_on_the_disk_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Goal: no power cut after `append` takes rows away. Method: note what is synced, hold it against what is there."""
    lake, synced, sync = DeltaLake(str(tmp_path / "lake"), partitions=3), set[Path](), os.fsync

    def noted(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    for first in range(3):
        synced.clear()
        before = set((tmp_path / "lake").rglob("*"))
        fill(lake, 1, first=first)
        made = set((tmp_path / "lake").rglob("*")) - before
        assert made <= synced and {path.parent for path in made} - {tmp_path} <= synced


def test_what_a_power_cut_tore_is_named_and_stored_again(tmp_path: Path):
    """The newest entry is on the disk and its file is not; without the entry, the sink goes on from the one before."""
    lake = DeltaLake(str(tmp_path / "lake"), partitions=3)
    fill(lake, 2)
    whole = set((tmp_path / "lake").rglob("*.parquet"))
    fill(lake, 1, first=2)
    for torn in set((tmp_path / "lake").rglob("*.parquet")) - whole:
        torn.write_bytes(b"")
    with pytest.raises(InvariantBroken, match="delete the newest entry"):
        lake.read()
    (tmp_path / "lake" / "_delta_log" / f"{2:020d}.json").unlink()
    again = DeltaLake(str(tmp_path / "lake"), partitions=3)
    state = again.state()
    assert state is not None and state.next_offsets == {0: 2}
    fill(again, 1, first=2)
    assert places(again.read()) == [(o, r) for o in range(3) for r in range(2)]


def test_a_column_that_is_not_there_is_refused_with_those_that_are(new_lake: NewLake):
    lake = new_lake()
    fill(lake, 1)
    with pytest.raises(ConfigRejected, match=r"no column \['colour'\]; it has \['partition', 'offset'"):
        lake.read(columns=["offset", "colour"])


PROGRAM = (
    "import sys, pyarrow as pa\nfrom headrace.backends.lake.delta import DeltaLake\n"
    "from headrace.contract.formats.positions import Position\nfrom lake_world import samples, hours\n"
    "lake = DeltaLake(sys.argv[1], partitions=3)\nstate = lake.state()\n"
    "first = 0 if state is None else state.next_offsets[0]\n"
    "for n in range(first, 10_000):\n"
    "    lake.append([samples(0, n, hours(*range(6)))], {0: n + 1}, {0: Position(n, 5)})\n"
    "    print(n, flush=True)\n"
)


def test_a_killed_writer_leaves_whole_commits_and_no_garbage_for_long(uri: str, new_lake: NewLake):
    for round_s in (0.02, 0.3, 0.6):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, uri],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "worlds" / "lake")},
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(round_s)  # somewhere within a later commit
            writer.kill()
    lake = new_lake()
    state = lake.state()
    assert state is not None and state.next_offsets[0] >= 3
    last = state.next_offsets[0] - 1
    assert state.positions.at(0) == (last, 5) > START
    expected = [(o, r) for o in range(last + 1) for r in range(6)]
    assert places(lake.read()) == expected
    time.sleep(OLD_S)
    lake.settle()
    keeper = Upkeep(lake)
    keeper.vacuum(Done(), [])
    assert keeper.vacuum(Done(), []) == []
    assert places(lake.read()) == expected
    if "://" not in uri:
        stored = {Path(uri).joinpath(path) for path in files(lake.open())["path"].to_pylist()}
        assert {p for p in Path(uri).rglob("*") if p.is_file() and "_delta_log" not in p.parts} == stored
