"""Goal: rows and places move together or not at all. Method: one suite on a POSIX path, killed writers included."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pytest

from headrace.backends.lake_delta import DeltaLake
from headrace.contract.errors import Unavailable
from headrace.contract.positions import Position

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("slots", pa.list_(pa.int64()))])


def rows(*ids: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"id": i, "slots": [i, -i]} for i in ids], schema=SCHEMA)


def test_a_commit_holds_rows_offsets_and_positions(tmp_path):
    lake = DeltaLake(str(tmp_path / "lake"))
    assert lake.state() is None
    assert lake.append([rows(1), rows(2)], {0: 3, 2: 7}, {0: Position(11, 4), 2: Position(2, 0)}) == 0
    assert lake.append([rows(3)], {0: 4}, {0: Position(2**40, 2**22 - 1)}) == 1
    newest, first = lake.state(), lake.state(0)
    assert newest is not None and first is not None
    assert newest.next_offsets == {0: 4, 2: 7} and first.next_offsets == {0: 3, 2: 7}
    assert newest.positions.at(0) == (2**40, 2**22 - 1) and newest.positions.at(2) == (2, 0)
    assert sorted(lake.read()["id"].to_pylist()) == [1, 2, 3]
    assert lake.read(0, ["id"]).column_names == ["id"] and lake.read(0).num_rows == 2


def test_a_new_column_is_merged_and_generations_are_apart(tmp_path):
    lake = DeltaLake(str(tmp_path / "lake"))
    lake.append([rows(1)], {0: 1}, {})
    wider = rows(2).append_column("colour", pa.array(["red"]))
    lake.append([wider], {0: 2}, {})
    assert sorted(lake.read()["colour"].to_pylist(), key=str) == [None, "red"]
    other = DeltaLake(lake.uri, generation=2).state()
    assert other is not None and other.next_offsets == {} and other.positions.by_partition == {}


def test_reading_no_lake_says_so(tmp_path):
    with pytest.raises(Unavailable, match="no lake"):
        DeltaLake(str(tmp_path / "none")).read()


def test_a_killed_writer_leaves_whole_commits(tmp_path):
    program = (
        "import sys, pyarrow as pa\nfrom headrace.backends.lake_delta import DeltaLake\n"
        "from headrace.contract.positions import Position\nlake = DeltaLake(sys.argv[1])\n"
        "for n in range(10_000):\n"
        "    lake.append([pa.RecordBatch.from_pydict({'id': [n]})], {0: n + 1}, {0: Position(n, 0)})\n"
        "    print(n, flush=True)\n"
    )
    uri = str(tmp_path / "lake")
    with subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 3:
                writer.kill()
                break
    lake = DeltaLake(uri)
    state = lake.state()
    assert state is not None and state.next_offsets[0] >= 4
    assert sorted(lake.read()["id"].to_pylist()) == list(range(state.next_offsets[0]))
    assert state.positions.at(0) == (state.next_offsets[0] - 1, 0)
