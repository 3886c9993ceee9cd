"""Goal: what README tells a newcomer to write works as it stands. Method: its project is loaded from a folder, and
its sender's lines are run against a real gateway of that project."""

from __future__ import annotations

import re
import tomllib
from functools import partial
from pathlib import Path

import gateway_world
import pytest
from gateway_world import Running
from ingest_world import dependencies

from headrace.cli.project_folder import load_project
from headrace.contract.config import Config

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
PROJECT, SENDER = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def write(folder: Path) -> Path:
    """Write README's project, with the empty headrace.toml that it speaks of."""
    (folder / "headrace.toml").write_text("")
    (folder / "project.py").write_text(PROJECT)
    return folder


def test_the_project_needs_an_empty_headrace_toml_and_has_every_default(tmp_path: Path) -> None:
    config, project = load_project(write(tmp_path))
    assert config == Config() and project.name == "store"


def test_the_senders_lines_reach_the_log_as_events_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, project = load_project(write(tmp_path))
    monkeypatch.setattr(gateway_world, "dependencies", partial(dependencies, project=project))
    gateway = Running()
    try:
        spool = str(tmp_path / "spool")
        lines = SENDER.replace("port=24224", f"port={gateway.port}").replace("/var/spool/store", spool)
        assert spool in lines and str(gateway.port) in lines
        names: dict[str, object] = {}
        exec(lines, names)
        sender = names["sender"]
        assert sender.flush(gateway_world.NEVER_S)  # type: ignore[attr-defined]
        sender.close()  # type: ignore[attr-defined]
    finally:
        gateway.stop()
    rows = {row["event_id"]: row for row in gateway.log.rows()}
    assert rows["i-1"]["_kind"] == "impression" and rows["i-1"]["price"] == 3.5
    assert rows["c-1"]["_type"] == "click" and rows["c-1"]["request_id"] == rows["i-1"]["request_id"] == "r-1"
    assert len(rows) == 2 and not gateway.log.letters()


def test_readme_and_the_package_name_the_same_versions_of_python() -> None:
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    said = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3" in line]
    assert f"Python {', '.join(said[:-1])} or {said[-1]}" in README and project["requires-python"] == f">={said[0]}"


def test_what_a_passed_test_wrote_goes_at_once(pytestconfig: pytest.Config) -> None:
    """The shared regions of the serving tests alone would be 30 GB."""
    assert pytestconfig.getini("tmp_path_retention_policy") == "failed"
