"""Goal: ids are found in the lake whether or not their hour was compacted: of the files that compaction writes, Delta's
log has statistics of a few columns alone. Method: a lake of export_world, asked before and after a compaction."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from deltalake import DeltaTable
from export_world import DAY_MS, HOUR_MS, PROJECT, filled_lake, stored_rows

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.stored_ids import LakeIds
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.stream.export.export import ExportRequest, export_samples


def test_a_compacted_hour_has_the_ids_that_it_had(tmp_path: Path) -> None:
    lake = filled_lake(tmp_path / "lake", Random(3), older=20, newer=40)
    ids, rows = LakeIds(lake), stored_rows(lake)
    wanted = {c: frozenset(row[c] for row in rows if row[c] is not None) for c in ("event_id", "feedback_id")}

    def check() -> None:
        for column, known in wanted.items():
            assert ids.stored([*known, "none"], column, DAY_MS, DAY_MS + 3 * HOUR_MS) == known
            # Arrow simplifies a filter on few values by what is said of the file, one on many not.
            for one in sorted(known)[:9]:
                assert ids.stored([one], column, DAY_MS, DAY_MS + 3 * HOUR_MS) == {one}

    check()
    done = Done()
    Upkeep(lake).compact(done, files_min=2)
    assert done.hours_compacted == 3
    check()


def test_an_export_finds_the_samples_of_a_compacted_hour(tmp_path: Path) -> None:
    lake = filled_lake(tmp_path / "lake", Random(3), older=20, newer=40)
    Upkeep(lake).compact(Done(), files_min=2)
    state = lake.state()
    assert state is not None
    request = ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + 3 * HOUR_MS, version=state.version)
    assert export_samples(lake, PROJECT, tmp_path / "out", request).samples == len(stored_rows(lake))


def test_a_version_that_is_read_piece_by_piece_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a reading opens the files alone that can have its times."""
    filled = filled_lake(tmp_path / "lake", Random(3), older=20, newer=40)
    version, rows = filled.open().version(), stored_rows(filled)
    lake, listed = DeltaLake(filled.uri, partitions=2), 0
    list_files = DeltaTable.get_add_actions

    def counted(table: DeltaTable, flatten: bool = False) -> object:
        nonlocal listed
        listed += 1
        return list_files(table, flatten)

    monkeypatch.setattr(DeltaTable, "get_add_actions", counted)
    assert sum(hour.rows for hour in lake.layout(version).hours) == len(rows)
    found = 0
    for span in lake.spans(version, 9):
        found += lake.read(version, ["event_id"], span_ms=span.span_ms).num_rows
    assert found == len(rows) and listed == 1
    for path in (tmp_path / "lake").glob("event_date=*/event_hour=1/*"):
        path.unlink()
    hour_ms = DAY_MS + 2 * HOUR_MS, DAY_MS + 3 * HOUR_MS
    wanted = [row for row in rows if hour_ms[0] <= row["event_time_ms"] < hour_ms[1]]
    assert lake.read(version, ["event_id"], span_ms=hour_ms).num_rows == len(wanted)
