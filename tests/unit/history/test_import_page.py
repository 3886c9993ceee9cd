"""Goal: the worked example of docs/lake.md runs as it stands there, and the verb says what a person needs. Method: its
mapping and commands in README's project, on a lake in a folder, without servers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest
from loop_world import START_MS

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.imports import Begun, Imports
from headrace.cli.main import main
from headrace.cli.runtime import Runtime
from headrace.cli.tools.init import make_project
from headrace.contract.errors import Unavailable
from headrace.stream.history import border

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "lake.md").read_text()
SECTION = PAGE.partition("## History that was not logged here")[2].partition("\n## ")[0]
MAPPINGS = re.findall(r"^```toml\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    headrace (lake import .*)$", SECTION, re.MULTILINE)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README's project, with the files of the example, and a store that nothing is in; nothing is live."""
    make_project(tmp_path / "store")
    monkeypatch.chdir(tmp_path / "store")
    monkeypatch.setenv("HEADRACE_PROJECT", str(tmp_path / "store"))
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/blobs")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Runtime, "require_kafka", lambda self: None)
    monkeypatch.setattr(Runtime, "reader", lambda self: None)
    monkeypatch.setattr(Runtime, "of_variant", lambda self, name: self)
    monkeypatch.setattr(border, "first_in_log", lambda reader, topics: None)
    rows = [
        {"event_id": f"i{n}", "request_id": f"r{n}", "user_id": n % 7, "item_id": n % 5, "price_eur": n / 4}
        for n in range(200)
    ]
    shown = pa.Table.from_pylist([{**row, "shown_at": START_MS + n * 60_000} for n, row in enumerate(rows)])
    Path("shown").mkdir()
    parquet.write_table(shown.slice(0, 90), "shown/1.parquet")
    parquet.write_table(shown.slice(90), "shown/2.parquet")
    clicks = [
        {
            "request_id": f"r{n}",
            "user_id": n % 7,
            "item_id": n % 5,
            "at": START_MS + n * 60_000 + 2_000,
            "event_id": f"c{n}",
        }
        for n in range(0, 200, 10)
    ]
    csv.write_csv(pa.Table.from_pylist([*clicks, {**clicks[0], "at": None, "event_id": "c"}]), "clicks.csv")
    Path("history.toml").write_text(MAPPINGS[0])
    return tmp_path


def test_the_example_runs(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 2 and len(MAPPINGS) == 2
    lake = DeltaLake(f"{store}/blobs/lake/samples")
    assert main(shlex.split(COMMANDS[0])) == 0
    said = capsys.readouterr().out
    assert "rows read: impressions 200, feedback.click 21" in said
    assert "refused, bad_type: 1\n" in said and "clicks.csv, row 21: the time is missing" in said
    assert "samples that would be stored: 200: click 200 (20 positive)" in said
    assert lake.state() is None
    monkeypatch.setattr("headrace.trainer.commit.publish.read_manifests", lambda *_: [])
    assert main(shlex.split(COMMANDS[1])) == 0
    said = capsys.readouterr().out
    assert "samples: 200: click 200 (20 positive)" in said and "no run of the model has begun" in said
    assert lake.read().num_rows == 200
    (path,) = (store / "home" / "import").glob("[0-9a-f]" * 16 + "/refused.jsonl")
    assert f"refused rows: {path}" in said
    refused = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(each["reason"] == "bad_type" and each["row"] == 21 for each in refused)
    assert "that meets no impression" not in said
    # Once more: it is done.
    assert main(shlex.split(COMMANDS[1])) == 0
    assert "is done" in capsys.readouterr().out
    assert main(["lake", "import", "--abandon"]) == 0
    assert "no import is under way" in capsys.readouterr().out


def test_feedback_that_meets_no_impression_is_told(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mapping takes another column for the request than the impressions' one."""
    Path("wrong.toml").write_text(
        MAPPINGS[0].replace('columns = {event_time_ms = "at"}', 'columns = {event_time_ms = "at", request_id = "at"}')
    )
    assert main(["lake", "import", "wrong.toml", "--dry-run", "--until", "2023-11-20"]) == 0
    said = capsys.readouterr().out
    assert "feedback of task click that meets no impression: 20." in said and "click 200 (0 positive)" in said


@pytest.mark.parametrize(("step", "told"), [(0, "headrace restart train"), (7, "recipe.seed")])
def test_the_remedy_for_a_run_that_began_before(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int, told: str
) -> None:
    monkeypatch.setattr(Runtime, "require_kafka", lambda _: None)
    monkeypatch.setattr(Runtime, "reader", lambda _: None)
    manifest = SimpleNamespace(run="r1", step=step)
    monkeypatch.setattr("headrace.trainer.commit.publish.read_manifests", lambda *_: [manifest])
    assert main(["lake", "import", "history.toml", "--until", "2023-11-15"]) == 0
    assert "run r1 of model 'store' " in (said := capsys.readouterr().out) and told in said


def test_who_needs_kafka_and_who_does_not(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(self: Runtime) -> None:
        raise Unavailable("no broker answers")

    monkeypatch.setattr(Runtime, "require_kafka", away)
    assert main(["lake", "import", "history.toml"]) == 1
    assert "no broker answers" in (said := capsys.readouterr().err) and "with --until TIME it is" in said
    assert main(["lake", "import", "history.toml", "--until", "2023-11-15", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["refused"]["after_until"] > 0 and found["samples"] == found["events"]["impression"] > 0
    assert "Kafka did not answer" in told.err and "names no time zone: taken as UTC" in told.err


def test_the_second_mapping_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = parquet.read_table("shown/1.parquet").rename_columns(
        ["event_id", "request_id", "user_id", "item_id", "price", "shown_at"]
    )
    clicked = pa.array([n % 9 == 0 for n in range(90)])
    at = pa.array([START_MS + n * 60_000 + 500 if n % 9 == 0 else None for n in range(90)], pa.int64())
    parquet.write_table(rows.append_column("clicked", clicked).append_column("clicked_at", at), "rows.parquet")
    Path("labelled.toml").write_text(MAPPINGS[1])
    assert main(["lake", "import", "labelled.toml", "--until", "2023-11-16T00:00Z", "--dry-run"]) == 0
    assert "samples that would be stored: 90: click 90 (10 positive)" in capsys.readouterr().out


def test_ctrl_c_goes_on_later_and_a_half_done_import_can_be_let_go(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, calls = Imports.append, 0

    def interrupted(self: Imports, begun: Begun, rows: pa.Table) -> Begun:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return append(self, begun, rows)

    monkeypatch.setattr("headrace.trainer.commit.publish.read_manifests", lambda *_: [])
    monkeypatch.setattr(Imports, "append", interrupted)
    command = ["lake", "import", "history.toml", "--until", "2023-11-15T00:00Z", "--commit-rows", "20"]
    assert main(command) == 130
    assert "stopped; the same command goes on." in capsys.readouterr().err
    lake = DeltaLake(f"{store}/blobs/lake/samples")
    assert lake.read().num_rows == 20
    # Another one is refused, with what to do.
    assert main([*command[:4], "2023-11-14T23:00Z"]) == 2
    assert "is half done" in (said := capsys.readouterr().err) and "--abandon" in said
    # The same one goes on.
    calls = 2
    assert main(command) == 0
    assert "20 of them stored before" in capsys.readouterr().out
    whole = lake.read().num_rows
    # Another one that is half done is let go: what it stored stays, and the next one knows these rows.
    calls = 0
    Path("clicks.csv").write_text(Path("clicks.csv").read_text() + "\n")
    again = ["lake", "import", "history.toml", "--until", "2023-11-16T00:00Z", "--commit-rows", "20"]
    assert main(again) == 130
    assert main(["lake", "import", "--abandon"]) == 0
    assert "the 20 samples that it stored stay in the lake" in capsys.readouterr().out
    calls = 2
    assert main([*again[:4], "2023-11-17T00:00Z"]) == 0
    ids = lake.read()["event_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 200 > whole
