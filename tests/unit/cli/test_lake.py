"""Goal: `headrace lake` does what its help says, and its schedule counts it. Method: the verb on a lake in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lake_world import hours, samples
from pyarrow import csv, parquet

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock, VirtualClock
from headrace.backends.delta.leases import Leases
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done
from headrace.backends.lake.upkeep_schedule import UpkeepSchedule
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.lake import lake as stage_lake
from headrace.cli.lake.lake_archive import partition_row
from headrace.cli.main import main
from headrace.cli.project_folder import load_project
from headrace.cli.runtime import Runtime
from headrace.cli.stages.sink import upkeep_command
from headrace.contract.config import LakeConfig
from headrace.contract.formats.positions import Position
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.archive import ArchiveState, Offsets
from headrace.contract.interfaces.log import VerbatimRecord


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose lake has four commits of two hours."""
    monkeypatch.setattr(stage_lake.os, "nice", lambda _: 0)
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/store")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HEADRACE_BROKERS", "127.0.0.1:9")
    lake = DeltaLake(str(tmp_path / "store/lake/samples"), partitions=1)
    for offset in range(4):
        lake.append([samples(0, offset, hours(1, 2))], {0: offset + 1}, {0: Position(offset, 1)})
    return tmp_path / "store"


class HandClock(VirtualClock):
    """A wall clock that can be set."""

    set_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.set_ms


@pytest.mark.parametrize("days", [1, -1])
def test_while_the_clock_is_set_nothing_of_the_lake_is_deleted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, days: int
) -> None:
    """A clock a day ahead ends every lease, and takes a writer's file that is not committed yet for a killed one's."""
    clock, flags = HandClock(1_700_000_000_000), list[list[str]]()
    config = LakeConfig(lease_ms=7_200_000)
    schedule = UpkeepSchedule(
        config, ["keep"], MemoryMetrics(), clock, threading.Event(), steady_s=lambda: clock.monotonic()
    )

    def keep(command: list[str]) -> tuple[int, str]:
        flags.append(command[1:])
        return 0, msgspec.json.encode(Done()).decode()

    monkeypatch.setattr(schedule, "_upkeep", keep)
    steps = [(0, 60, []), (days, 60, ["--compact-only"]), (days, 60, ["--compact-only"]), (0, 60, [])]
    steps += [(days, 60, ["--compact-only"]), (days, 7_100, ["--compact-only"]), (days, 200, []), (days, 60, [])]
    for set_days, later_s, _ in steps:
        clock.set_ms = set_days * 86_400_000
        clock.advance(later_s)
        # A second is what a time server moves: no setting.
        clock.set_ms += 1_000
        schedule.run_once(True)
    assert flags == [wanted for _, _, wanted in steps]
    assert caplog.text.count("retention and vacuum wait") == 2


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """Return the JSON lines that the verb prints."""
    capsys.readouterr()
    assert main(["lake", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_compact_history_and_vacuum(store: Path, capsys: pytest.CaptureFixture[str]):
    assert said(capsys, "compact") == [said(capsys, "compact")[0] | {"files_compacted": 0}]  # 4 files are few
    done = said(capsys, "compact", "--files", "2")[0]
    assert (done["hours_compacted"], done["files_compacted"], done["files"], done["version"]) == (2, 8, 2, 5)
    history = said(capsys, "history", "--limit", "3")
    assert [(h["version"], h["operation"], h["files_added"], h["files_removed"]) for h in history] == [
        (5, "compact", 1, 4),
        (4, "compact", 1, 4),
        (3, "WRITE", 2, 0),
    ]
    assert said(capsys, "vacuum", "--dry-run")[0]["files_vacuumed"] == 0  # all younger than an hour
    assert said(capsys, "upkeep", "--no-vacuum")[0]["hours_dropped"] == 0
    assert said(capsys, "upkeep", "--compact-only")[0]["files_vacuumed"] == 0
    assert main(["lake", "compact"]) == 0
    assert "2 files" in capsys.readouterr().out


def test_read_by_version_time_and_day_in_every_form(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert len(said(capsys, "read")) == 8
    assert [row["offset"] for row in said(capsys, "read", "--version", "0", "--columns", "offset")] == [0, 0]
    assert len(said(capsys, "read", "--at", "2999-01-01", "--limit", "3")) == 3
    assert said(capsys, "read", "--day", "2026-11-24") == []
    for suffix in ("parquet", "arrow", "csv", "jsonl"):
        assert main(["lake", "read", "--out", str(tmp_path / f"rows.{suffix}")]) == 0
    assert parquet.read_table(tmp_path / "rows.parquet").num_rows == 8
    assert csv.read_csv(tmp_path / "rows.csv")["slots"][0].as_py().startswith("[")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 8
    assert main(["lake", "read", "--out", str(tmp_path / "rows.xls")]) == 2
    assert main(["lake", "read", "--version", "77"]) == 1
    assert Leases(FileBlobs(store / "blobs"), SystemClock(), lease_ms=1).active() == []


def test_a_store_without_a_lake(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/none")
    assert said(capsys, "upkeep")[0]["version"] == -1  # the sink's schedule may be before its first commit
    assert main(["lake", "compact"]) == 1
    assert "no lake" in capsys.readouterr().err


def test_the_schedule_counts_what_an_upkeep_tells(store: Path, tmp_path: Path, shop_dir: Path):
    config, project = load_project(shop_dir)
    runtime = Runtime(
        project=project,
        config=config,
        topics=Topics(),
        brokers="127.0.0.1:9",
        store=f"file:{store}",
        webhdfs=None,
        home=tmp_path / "home",
        port_base=31_000,
        project_dir=shop_dir,
    )
    metrics = MemoryMetrics()
    command = upkeep_command(runtime)
    schedule = UpkeepSchedule(config.lake, command, metrics, runtime.clock, threading.Event())
    assert schedule.run_once(True) is True
    assert schedule.run_once(False) is True
    assert metrics.gauges["lake_files", ""] == 8
    assert schedule.count(1, "no such store") is False
    assert schedule.count(0, "not JSON") is False
    assert metrics.counters["lake_upkeep_failed_total", ""] == 2


def test_a_schedule_goes_on_after_an_upkeep_that_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, no memory, no program: counted, and tried again. An upkeep that says much is read meanwhile."""
    metrics, stop = MemoryMetrics(), threading.Event()
    runs: list[list[str]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **how: Any) -> None:
            runs.append(command)
            if len(runs) < 3:
                raise (OSError(11, "no process"), MemoryError())[len(runs) - 1]
            stop.set()
            super().__init__(command, **how)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    done = msgspec.json.encode(Done(files=8)).decode()
    says = f"print('x' * 200_000); print({done!r})"
    schedule = UpkeepSchedule(LakeConfig(compact_ms=1), [sys.executable, "-c", says], metrics, VirtualClock(), stop)
    monkeypatch.setattr(schedule.stopped, "is_set", lambda: False)
    schedule.run()
    assert metrics.counters["lake_upkeep_failed_total", ""] == 2
    assert metrics.gauges["lake_files", ""] == 8


def test_upkeep_looks_after_the_archive_of_events_too(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = DeltaArchive(str(store / "lake/events"), "events", partitions=4)
    for offset in range(10):
        record = VerbatimRecord("events", 0, offset, None, b"x", {}, 3_600_000, 2, ())
        archive.append([record], {0: Offsets(offset, offset + 1)}, {})
    done = said(capsys, "upkeep")[0]["archive"]
    assert (done["files"], done["rows_dropped"]) == (0, 10), "an hour of 1970: the retention of 30 days takes it"
    assert archive.state().whole == {0: Offsets(10, 10)}


@pytest.mark.parametrize(
    ("state", "topic", "wrong"),
    [
        (None, (0, 5), ""),
        (ArchiveState(1, {0: Offsets(0, 4)}), (2, 5), ""),
        (ArchiveState(1, {0: Offsets(0, 6)}), (2, 5), "the topic has lost its end: it is archived up to 6"),
        (ArchiveState(1, {0: Offsets(0, 1)}), (2, 5), "offsets 1 to before 2 were forgotten before they were archived"),
        (ArchiveState(1, {0: Offsets(3, 5)}, {0: Offsets(1, 3)}), (4, 5), "offsets 1 to before 3 were forgotten"),
    ],
)
def test_what_is_wrong_with_an_archive_is_told_by_partition(state: Any, topic: tuple[int, int], wrong: str) -> None:
    row = partition_row(0, state, topic)
    assert row["wrong"].startswith(wrong) and bool(row["wrong"]) == bool(wrong)
    assert row["waiting"] == {(0, 5): 5, (4, 5): 0}.get(topic, max(0, 5 - max(2, state.whole[0].end if state else 0)))
