"""Goal: an export ends where all labels are final unless told otherwise, and one that goes further says so.

Method: the verb on a lake in a folder, and states of the join beside it that say how far the join was.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from export_world import DAY_MS, HOUR_MS, PROJECT

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.lake.delta import DeltaLake
from headrace.cli.main import main
from headrace.contract.rules import rules_of
from headrace.stream.join import state
from headrace.stream.join.state import VERSION

LONGEST_MS = max(task.window_ms + task.correct_ms for task in PROJECT.tasks)
PARTITIONS = 4


def exported(out: Path, *words: str) -> int:
    return main(["lake", "export", "--from", "2026-11-25T00:00:00Z", "--to-parquet", str(out), *words])


def join_stored(
    folder: Path, offset: int, watermark_ms: int, partition: int, last: tuple[int, int], **rules: Any
) -> None:
    """Store a state that has led to the sample `last`."""
    declared = msgspec.structs.replace(rules_of(PROJECT), **rules)
    plain = {"v": VERSION, "last": last, "watermark": [watermark_ms]}
    plain[state._RULES] = [{"number": 1, "rules": msgspec.to_builtins(declared)}]
    data = zlib.compress(msgspec.msgpack.encode(plain))
    FileBlobs(folder / "store" / "blobs").put(f"state/stream/g1/{partition}/{offset}", data)


@pytest.fixture
def joined(lake: DeltaLake, tmp_path: Path) -> DeltaLake:
    """The join is two hours into the day and a window, in one partition further."""
    for partition in range(PARTITIONS):
        last = tuple(lake.state().positions.at(partition))
        further_ms = HOUR_MS if partition == 0 else 0
        join_stored(tmp_path, 50, DAY_MS + 2 * HOUR_MS + LONGEST_MS + further_ms, partition, last)
    return lake


def test_an_export_ends_where_all_labels_are_final(
    joined: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(tmp_path / "out") == 0
    assert "--to settled: labels are final up to 2026-11-25T02:00:00Z." in capsys.readouterr().err
    times = [at.timestamp() * 1_000 for at in pq.read_table(tmp_path / "out")["event_timestamp"].to_pylist()]
    assert times and max(times) < DAY_MS + 2 * HOUR_MS
    assert exported(tmp_path / "told", "--to", "2026-11-25T02:00:00Z", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["settled_ms"] == DAY_MS + 2 * HOUR_MS and "warning" not in said.err


def test_one_that_goes_further_is_warned_of_biased_labels(
    joined: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(tmp_path / "out", "--to", "2026-11-25T02:00:01Z") == 0
    said = capsys.readouterr().err
    assert "final up to 2026-11-25T02:00:00Z: of later ones positives may have labels and negatives none" in said
    assert "--to settled" in said


def test_a_state_that_is_ahead_of_the_lake_says_nothing_of_it(
    joined: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its samples are on their way: the older state, which the lake covers, counts."""
    join_stored(tmp_path, 60, DAY_MS + 9 * HOUR_MS, 1, (999, 0))
    assert exported(tmp_path / "out") == 0
    assert "final up to 2026-11-25T02:00:00Z" in capsys.readouterr().err


def test_what_waits_under_a_longer_window_of_before_is_waited_for(
    joined: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = tuple(
        msgspec.structs.replace(task, window_ms=LONGEST_MS + HOUR_MS, correct_ms=0) for task in PROJECT.tasks
    )
    last = tuple(joined.state().positions.at(2))
    join_stored(tmp_path, 70, DAY_MS + 2 * HOUR_MS + LONGEST_MS, 2, last, tasks=longer)
    assert exported(tmp_path / "out") == 0
    assert "final up to 2026-11-25T01:00:00Z" in capsys.readouterr().err


def test_where_nobody_knows_a_time_is_asked_for_and_warned_of(
    lake: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(tmp_path / "out") == 2
    assert "is not known: the join's stored states" in capsys.readouterr().err
    assert exported(tmp_path / "out", "--to", "2026-11-25T02:00:00Z") == 0
    assert "warning: labels of version" in capsys.readouterr().err


def test_a_range_without_a_final_label_is_refused(
    lake: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for partition in range(PARTITIONS):
        join_stored(tmp_path, 50, DAY_MS - HOUR_MS + LONGEST_MS, partition, tuple(lake.state().positions.at(partition)))
    assert exported(tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "final up to 2026-11-24T23:00:00Z, which is not after --from 2026-11-25T00:00:00Z" in said
