"""Goal: a commit of very many hours of event time is one commit like any other, and takes bounded memory.
Method: samples whose times lie hours apart, in a folder; delta-rs's own writer is called for no row of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from trainer_world import samples

import headrace.backends.lake.delta as delta
from headrace.backends.lake import hour_files
from headrace.backends.lake.delta import HOURS_AT_ONCE, DeltaLake
from headrace.backends.lake.listing import files
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.errors import Unavailable
from headrace.contract.formats.positions import Position

MANY = HOURS_AT_ONCE + 6


def scattered(count: int, hours: int, *, first: int = 0) -> pa.RecordBatch:
    """Return samples of one partition whose times lie in so many hours, in turn."""
    rows = samples(1, 0, count, offset=first)
    at_N = 1_600_000_000_000 + (np.arange(count) % hours) * 3_600_000
    return rows.set_column(rows.schema.get_field_index("event_time_ms"), "event_time_ms", pa.array(at_N))


def append(lake: DeltaLake, rows: pa.RecordBatch, *, following: int) -> int:
    """Commit the rows with their last position."""
    return lake.append([rows], {0: following}, {0: Position(rows["offset"][-1].as_py(), rows["rank"][-1].as_py())})


def in_order(table: pa.Table) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in hour_files.ORDER])


def test_rows_of_many_hours_are_stored_as_those_of_few(tmp_path: Path) -> None:
    rows = scattered(3 * MANY, MANY)
    lake, plain = DeltaLake(str(tmp_path / "many"), partitions=1), DeltaLake(str(tmp_path / "few"), partitions=1)
    append(lake, rows, following=7)
    for start in range(0, rows.num_rows, HOURS_AT_ONCE // 2):
        append(plain, rows.slice(start, HOURS_AT_ONCE // 2), following=7)
    assert in_order(lake.read()).equals(in_order(plain.read()))
    state, expected = lake.state(), plain.state()
    assert state is not None and expected is not None
    assert (state.positions, state.next_offsets) == (expected.positions, expected.next_offsets)
    listed = files(lake.open())
    assert listed.num_rows == MANY and sum(listed["num_records"].to_pylist()) == rows.num_rows
    assert set(
        zip(listed["partition.event_date"].to_pylist(), listed["partition.event_hour"].to_pylist(), strict=True)
    ) == (
        set(
            zip(*(files(plain.open())[f"partition.{n}"].to_pylist() for n in ("event_date", "event_hour")), strict=True)
        )
    )
    (version, *_) = Upkeep(lake).history()
    assert (version.rows_added, version.files_added) == (rows.num_rows, MANY)
    day = listed["partition.event_date"][0].as_py()
    assert in_order(lake.read(day=day)).equals(in_order(plain.read(day=day)))


def test_they_join_what_is_there_with_a_new_column_and_compaction_takes_them(tmp_path: Path) -> None:
    lake = DeltaLake(str(tmp_path / "lake"), partitions=1)
    append(lake, scattered(20, 2), following=1)
    more = scattered(2 * MANY, MANY, first=20)
    wider = more.append_column("colour", pa.array(["red"] * more.num_rows))
    append(lake, wider, following=2)
    append(lake, scattered(4, 2, first=20 + more.num_rows), following=3)
    read = lake.read()
    assert read.num_rows == 24 + more.num_rows and read["colour"].null_count == 24
    done = Done()
    Upkeep(lake).compact(done, files_min=2)
    assert done.hours_compacted == 2 and in_order(lake.read()).equals(in_order(read))


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    own = delta.write_deltalake

    def watched(table: object, rows: pa.Table, **options: object) -> None:
        written.append(rows.num_rows)
        own(table, rows, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(delta, "write_deltalake", watched)
    append(DeltaLake(str(tmp_path / "lake"), partitions=1), scattered(MANY, MANY), following=1)
    assert written == [0], "delta-rs made the table and wrote no row"
    assert hour_files.WRITERS <= HOURS_AT_ONCE


def test_of_two_writers_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "lake")
    first, second = DeltaLake(uri, partitions=1), DeltaLake(uri, partitions=1)
    append(first, scattered(4, 2), following=1)
    rows = scattered(MANY, MANY, first=4)
    own = delta.write_hours

    def overtaken(table: object, stored: pa.Table) -> object:
        append(first, scattered(6, 2, first=4), following=2)
        monkeypatch.setattr(delta, "write_hours", own)
        return own(table, stored)

    monkeypatch.setattr(delta, "write_hours", overtaken)
    with pytest.raises(Unavailable, match="did not take a commit"):
        append(second, rows, following=3)
    assert second.read().num_rows == 10
    with pytest.raises(Unavailable, match="Another one has stored them"):
        append(second, rows, following=3)
