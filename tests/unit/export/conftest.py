"""A lake in a folder, which `headrace lake export` is called on."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import pytest
from export_world import PROJECT, filled_lake

from headrace.backends.lake.delta import DeltaLake


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaLake:
    """A store whose lake has 60 impressions of two specifications, and the project that it is of."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "headrace.toml").write_text("")
    declared = msgspec.json.encode(PROJECT).decode()
    # The world registers the project's own functions.
    imports = "import export_world\nimport msgspec\nfrom headrace.contract.project import Project\n"
    text = f"{imports}PROJECT = msgspec.json.decode({declared!r}, type=Project)\n"
    (project / "project.py").write_text(text)
    monkeypatch.setenv("HEADRACE_PROJECT", str(project))
    monkeypatch.setenv("HEADRACE_STORE", f"file:{tmp_path}/store")
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HEADRACE_BROKERS", "127.0.0.1:9")
    return filled_lake(tmp_path / "store/lake/samples", Random(3), older=20, newer=40)
