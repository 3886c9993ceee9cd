"""Goal: `headrace lake export` says what it does and what is wrong, knows labels as of a time, and leaves a whole
export or none, however it is stopped. Method: the verb on a lake of export_world in a folder; exports in processes of
their own that are interrupted or killed in the midst, and that may write no more than so many bytes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import duckdb
import msgspec
import pyarrow.parquet as pq
import pytest
from export_world import DAY_MS, HOUR_MS, OLDER, PROJECT, impression_rows, oracle, store, stored_rows

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.delta.leases import Leases
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.listing import files as lake_files
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.cli.main import main
from headrace.contract.config import LakeConfig
from headrace.contract.errors import InvariantBroken, Overloaded
from headrace.contract.project import Project
from headrace.stream.export import folder as folders
from headrace.stream.export.export import ExportRequest, export_samples

FROM, TO = "2026-11-25T00:00:00Z", "2026-11-25T03:00:00Z"
TASKS = tuple(task.name for task in PROJECT.tasks)


def exported(out: Path, *words: str, begin: str = FROM, end: str = TO) -> int:
    return main(["lake", "export", "--from", begin, "--to", end, "--to-parquet", str(out), *words])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    """Return what an export has left beside its folder."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("store", "project", "home"))


def test_it_tells_what_it_wrote_and_other_programs_read_it(
    lake: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert exported(out) == 0
    wanted = oracle(stored_rows(lake), PROJECT, DAY_MS, DAY_MS + 3 * HOUR_MS, TASKS)
    said = capsys.readouterr()
    assert f"{len(wanted)} impressions of " in said.out and "1 files" in said.out and "time zone" not in said.err
    assert pq.read_table(out).to_pylist() == wanted
    # No other row has the order, so a reader that keeps it has the rows in it.
    at = duckdb.sql(
        f"select count(*), count(distinct event_id), avg(\"label.click\") from '{out}/*.parquet'"
    ).fetchall()[0]
    assert at[0] == at[1] == len(wanted)
    manifest = json.loads((out / "_manifest.json").read_text())
    version = lake.open().version()
    assert manifest["lake_version"] == version and manifest["spec"] == PROJECT.features.digest()
    assert (manifest["project"], manifest["from"], manifest["to"]) == ("exported", FROM, TO)
    assert manifest["rows"] == len(wanted) and [task["name"] for task in manifest["tasks"]] == list(TASKS)
    assert {file["name"]: file["sha256"] for file in manifest["files"]}.items() <= digests(out).items()
    assert left(tmp_path) == ["out"]
    assert Leases(FileBlobs(tmp_path / "store/blobs"), SystemClock(), lease_ms=1).active() == []
    # The same again, from a lake that was compacted meanwhile, of the version by number and by time.
    Upkeep(lake).compact(Done(), files_min=2)
    assert exported(tmp_path / "again", "--version", str(version), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(wanted)
    assert digests(tmp_path / "again") == digests(out)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--from", TO, "--to", FROM], 2, ["--from 2026-11-25T03:00:00Z is not before --to 2026-11-25T00:00:00Z"]),
        (["--from", "soon"], 2, ["'soon' is no time", "2026-11-25T01:00:00Z"]),
        (["--to", "2026-11-25T03:00"], 0, ["--to 2026-11-25T03:00 names no time zone: taken as UTC"]),
        (["--from", "2026-11-26T00:00Z", "--to", "2026-11-27T00:00Z"], 2, ["no samples", "2026-11-25T", "Nothing was"]),
        (["--tasks", "clik"], 2, ["'clik' is no task", "'click', 'order', 'slow'", "Did you mean 'click'?"]),
        (["--columns", "event_id,labl.click"], 2, ["no 'labl.click'", "Did you mean 'label.click'?", "'feature.*'"]),
        (["--version", "99"], 1, ["can't be opened at 99"]),
        (["--as-of", "2001-01-01T00:00Z"], 2, ["--as-of 2001-01-01T00:00:00Z", "lake history"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_wrong_call_is_told(
    lake: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, says: list[str]
) -> None:
    assert exported(tmp_path / "out", *words) == status
    err = capsys.readouterr().err
    assert all(each in err for each in says), err
    assert left(tmp_path) == ([] if status else ["out"])


def test_a_store_without_a_lake(tmp_path: Path, lake: DeltaLake, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/none")
    assert exported(tmp_path / "out") == 1 and "no lake" in capsys.readouterr().err
    assert exported(tmp_path / "out", "--as-of", "2999-01-01T00:00Z") == 1 and "no lake" in capsys.readouterr().err


def test_columns_and_tasks_are_chosen(lake: DeltaLake, tmp_path: Path) -> None:
    assert (
        exported(tmp_path / "out", "--columns", "label.*,feature.numeric.*,event_timestamp,gone", "--tasks", "order")
        == 0
    )
    rows = pq.read_table(tmp_path / "out")
    names = ["event_timestamp", "gone", "feature.numeric.price", "feature.numeric.price.2", "label.order"]
    assert rows.schema.names == names and rows["label.order"].null_count == 0
    wanted = oracle(stored_rows(lake), PROJECT, DAY_MS, DAY_MS + 3 * HOUR_MS, ["order"])
    assert rows.to_pylist() == [{name: row[name] for name in names} for row in wanted]


def test_a_field_with_the_name_of_a_column_is_exported_beside_it(tmp_path: Path) -> None:
    fields = {**PROJECT.impression.fields, "Event_Timestamp": "int64", "label.click": "string"}
    impression = msgspec.structs.replace(PROJECT.impression, fields=fields)
    project: Project = msgspec.structs.replace(PROJECT, impression=impression).checked()
    lake = DeltaLake(str(tmp_path / "lake"), partitions=2)
    store(lake, PROJECT, impression_rows(Random(1), PROJECT, 9, first=0, span_ms=99), 1, 0)
    request = ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + HOUR_MS, version=0)
    done = export_samples(lake, project, tmp_path / "out", request)
    assert {"event_timestamp", "raw.Event_Timestamp", "label.click", "raw.label.click"} <= set(done.columns)
    duckdb.sql(f"select \"raw.Event_Timestamp\" from '{tmp_path}/out/*.parquet'").fetchall()


def test_labels_are_those_that_the_version_knows(tmp_path: Path) -> None:
    """A correction comes later: the version before has the negative, also when its files are vacuumed."""
    blobs = FileBlobs(tmp_path / "blobs")
    leases = Leases(blobs, SystemClock(), lease_ms=3_600_000)
    lake = DeltaLake(str(tmp_path / "lake"), partitions=2, leases=leases)
    rows = impression_rows(Random(5), PROJECT, 30, first=0, span_ms=HOUR_MS)
    offset = store(lake, PROJECT, [row for row in rows if not row["correction"]], 2, 0)
    before = lake.open().version()
    late = [row for row in rows if row["correction"]]
    assert late
    store(lake, PROJECT, late, 1, offset)
    now = lake.open().version()
    request = {v: ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + HOUR_MS, version=v) for v in (before, now)}
    for version, one in request.items():
        export_samples(lake, PROJECT, tmp_path / f"v{version}", one)
        wanted = oracle(stored_rows(lake, version), PROJECT, DAY_MS, DAY_MS + HOUR_MS, TASKS)
        got = pq.read_table(tmp_path / f"v{version}").to_pylist()
        assert got == [{n: v for n, v in row.items() if n != "gone"} for row in wanted]
        assert any(row["corrected.click"] or row["corrected.order"] for row in got) == (version == now)
    keeper = Upkeep(lake)
    keeper.compact(Done(), files_min=2)
    _delete_old_files(lake)
    export_samples(lake, PROJECT, tmp_path / "vacuumed", request[before])
    assert digests(tmp_path / "vacuumed") == digests(tmp_path / f"v{before}")
    # Retention drops the hour, and vacuum its files: then the version is no more, and that is said.
    gone = DeltaLake(lake.uri, partitions=2, config=LakeConfig(retention_ms=1), leases=leases)
    store(gone, PROJECT, impression_rows(Random(6), PROJECT, 9, first=99, span_ms=1), 1, offset + 1)
    Upkeep(gone).retain(Done(), DAY_MS + 9 * HOUR_MS)
    _delete_old_files(gone)
    with pytest.raises(InvariantBroken, match="retention has dropped rows of version"):
        export_samples(gone, PROJECT, tmp_path / "none", request[before])


def _delete_old_files(lake: DeltaLake) -> None:
    """Delete the files that the newest version has not, as vacuum does when they are old enough."""
    named = set(lake_files(lake.open())["path"].to_pylist())
    old = [path for path in Path(lake.uri).glob("event_date=*/*/*") if str(path.relative_to(lake.uri)) not in named]
    assert old
    for path in old:
        path.unlink()


def test_only_an_older_export_is_replaced(lake: DeltaLake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert exported(out, "--tasks", "click") == 0  # an empty folder
    before = digests(out)
    assert exported(out) == 2 and "add --overwrite" in capsys.readouterr().err
    assert digests(out) == before
    assert exported(out, "--overwrite", "--columns", "nothing") == 2 and digests(out) == before
    assert exported(out, "--overwrite") == 0 and digests(out) != before and left(tmp_path) == ["out"]
    (out / "thesis.txt").write_text("mine")
    assert exported(out, "--overwrite") == 2
    assert "thesis.txt" not in capsys.readouterr().out and (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert exported(tmp_path / "file", "--overwrite") == 2 and "is a file" in capsys.readouterr().err


PROGRAM = """
import os, resource, signal, sys, time
sys.path.insert(0, {worlds!r})
from pathlib import Path
from export_world import DAY_MS, HOUR_MS, PROJECT
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.listing import files as lake_files
from headrace.stream.export.export import ExportRequest, export_samples
# A shell's job in the background ignores the signal, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
count = 0
def beat():
    global count
    count += 1
    if count == 3:
        {act}
lake = DeltaLake({uri!r}, partitions=2)
request = ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + 3 * HOUR_MS, version=lake.open().version(), overwrite=True)
export_samples(lake, PROJECT, Path({out!r}), request, beat=beat, slice_rows=9, row_group_rows=4, file_rows=8)
"""
STOPS = {
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    "full": ("resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))", 1),
}


def stopped(lake: DeltaLake, out: Path, act: str) -> subprocess.CompletedProcess[str]:
    worlds = str(Path(__file__).parent)
    program = PROGRAM.format(worlds=worlds, act=act, uri=lake.uri, out=str(out))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("is_replacing", [False, True])
def test_a_stop_in_the_midst_leaves_nothing_that_looks_whole(
    lake: DeltaLake, tmp_path: Path, how: str, is_replacing: bool
) -> None:
    out, (act, status) = tmp_path / "out", STOPS[how]
    if is_replacing:
        assert exported(out, "--tasks", "click") == 0
    before = digests(out) if is_replacing else {}
    done = stopped(lake, out, act)
    assert done.returncode == status, done.stderr
    assert (digests(out) if out.exists() else {}) == before
    hidden = [".out.exporting"] if how == "kill" else []
    assert left(tmp_path) == [*hidden, *(["out"] if is_replacing else [])]
    if how == "full":
        assert "was not written" in done.stderr and "Nothing of it is left" in done.stderr
    assert exported(out, "--overwrite") == 0 and left(tmp_path) == ["out"]
    wanted = oracle(stored_rows(lake), PROJECT, DAY_MS, DAY_MS + 3 * HOUR_MS, TASKS)
    assert pq.read_table(out).to_pylist() == wanted


def test_a_full_disk_is_named(
    lake: DeltaLake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "store", full)
    assert exported(tmp_path / "out") == 1
    assert "the disk is full" in capsys.readouterr().err and left(tmp_path) == []


def test_what_a_killed_one_had_set_aside_is_put_back(lake: DeltaLake, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert exported(out) == 0
    before = digests(out)
    out.rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.exporting").mkdir()
    (tmp_path / ".out.exporting" / "part-00000.parquet").write_bytes(b"half")
    assert exported(out) == 2 and digests(out) == before
    assert exported(out, "--overwrite") == 0 and left(tmp_path) == ["out"]


def test_of_two_exports_to_one_folder_the_second_is_refused(lake: DeltaLake, tmp_path: Path) -> None:
    out, ready = tmp_path / "out", tmp_path / "home"
    act = f"open({str(ready)!r}, 'w').close(); time.sleep(600)"
    worlds = str(Path(__file__).parent)
    program = PROGRAM.format(worlds=worlds, act=act, uri=lake.uri, out=str(out))
    other = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not ready.exists():
            assert other.poll() is None
            time.sleep(0.02)
        request = ExportRequest(begin_ms=DAY_MS, end_ms=DAY_MS + HOUR_MS, version=0)
        with pytest.raises(Overloaded, match="under way"):
            export_samples(lake, OLDER, out, request)
        assert (tmp_path / ".out.exporting").is_dir() and not out.exists()
    finally:
        other.kill()
        other.wait()
