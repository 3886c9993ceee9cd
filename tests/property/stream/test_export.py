"""Goal: an export is what a plain program finds that reads the lake's samples one at a time, however its slices, files
and row groups are cut. Method: random samples of a project with every kind of column, of two specifications, in random
commits; the oracle of export_world."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tempfile
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from export_world import DAY_MS, FEATURES, HOUR_MS, PROJECT, filled_lake, oracle, stored_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.stream.export.columns import feature_columns
from headrace.stream.export.export import ExportRequest, export_samples
from headrace.stream.export.folder import MANIFEST

TASKS = tuple(task.name for task in PROJECT.tasks)


def exported(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(folder).to_pylist()
    return rows


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def check(seed: int, older: int, newer: int, slice_rows: int, group_rows: int, tasks: tuple[str, ...]) -> None:
    rng = Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lake = filled_lake(folder / "lake", rng, older=older, newer=newer)
        state = lake.state()
        assert state is not None
        begin_ms = DAY_MS + rng.choice([0, HOUR_MS, HOUR_MS + 1, 777_777])
        end_ms = begin_ms + rng.choice([3 * HOUR_MS, HOUR_MS, HOUR_MS // 2])
        wanted = oracle(stored_rows(lake), PROJECT, begin_ms, end_ms, tasks)
        request = ExportRequest(begin_ms=begin_ms, end_ms=end_ms, version=state.version, tasks=tasks)
        if not wanted:
            return
        sizes = {"row_group_rows": group_rows, "file_rows": 3 * group_rows}
        done = export_samples(lake, PROJECT, folder / "one", request, slice_rows=slice_rows, **sizes)
        got = exported(folder / "one")
        assert [set(row) - {"gone"} for row in got[:1]] == [set(row) - {"gone"} for row in wanted[:1]]
        for row in wanted:
            if older == 0:
                del row["gone"]
        assert got == wanted
        assert done.rows == len(wanted)
        manifest = json.loads((folder / "one" / "_manifest.json").read_text())
        assert [file["rows"] for file in manifest["files"]] == [
            pq.read_metadata(folder / "one" / file["name"]).num_rows for file in manifest["files"]
        ]
        for file in manifest["files"]:
            meta = pq.read_metadata(folder / "one" / file["name"])
            assert all(meta.row_group(i).num_rows <= group_rows for i in range(meta.num_row_groups))
        # Again with other slices, and from the newest version after a compaction: the same bytes, but for its number.
        export_samples(lake, PROJECT, folder / "two", request, slice_rows=rng.choice([1, 5, 10_000]), **sizes)
        Upkeep(lake).compact(Done(), files_min=2)
        newest = lake.state()
        assert newest is not None
        compacted = dataclasses.replace(request, version=newest.version)
        export_samples(lake, PROJECT, folder / "three", compacted, **sizes)
        one, two, three = (digests(folder / name) for name in ("one", "two", "three"))
        assert one == two
        assert {n: d for n, d in one.items() if n != MANIFEST} == {n: d for n, d in three.items() if n != MANIFEST}


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    older=st.integers(0, 12),
    newer=st.integers(1, 40),
    slice_rows=st.integers(1, 60),
    group_rows=st.integers(1, 30),
    tasks=st.sampled_from([t for n in (1, 2, 3) for t in itertools.combinations(TASKS, n)]),
)
def test_an_export_equals_a_plain_reading(
    seed: int, older: int, newer: int, slice_rows: int, group_rows: int, tasks: tuple[str, ...]
) -> None:
    check(seed, older, newer, slice_rows, group_rows, tasks)


@pytest.mark.long
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), slice_rows=st.integers(1, 60), group_rows=st.integers(1, 30))
def test_so_do_many(seed: int, slice_rows: int, group_rows: int) -> None:
    check(seed, 20, 60, slice_rows, group_rows, TASKS)


def test_the_oracle_knows_all_columns_of_features() -> None:
    assert [column.name for column in feature_columns(PROJECT.features)] == [name for name, *_ in FEATURES]
