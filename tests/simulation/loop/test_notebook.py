"""Goal: every block of docs/notebook.md runs, over an export of the ads example, and the models that it fits are good.
Method: made-up visitors through gateway, join and sink in memory under virtual time; the page's command and code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from loop_world import opened, quiet
from test_examples import play

from headrace.cli.main import main
from headrace.cli.project_folder import load_project
from headrace.cli.tools.init import make_project
from headrace.cli.tools.traffic import load_visits
from headrace.examples.service import Service

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "notebook.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    headrace (lake export .*)$", PAGE, re.MULTILINE)
TURN_MS = 60_000


def test_the_page_runs_and_its_models_are_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path / "mine", "ads")
    config, project = load_project(tmp_path / "mine")
    (tmp_path / "store/lake").mkdir(parents=True)
    with opened(project, quiet(config, TURN_MS), tmp_path) as loop:
        # Nobody asks for scores, so nothing need be learnt.
        monkeypatch.setattr(loop.trainer, "turn", lambda: False)
        service = Service(project, load_visits(tmp_path / "mine")(project, 1), log=loop.send, run="try", rank=None)
        play(loop, service, visits=2_250, turns=90, turn_ms=TURN_MS, asked_from=2)
    (tmp_path / "lake").rename(tmp_path / "store/lake/samples")
    for name, value in {
        "STORE": f"file:{tmp_path}/store",
        "HOME": str(tmp_path / "home"),
        "BROKERS": "127.0.0.1:9",
    }.items():
        monkeypatch.setenv(f"HEADRACE_{name}", value)
    assert len(COMMANDS) == 1 and len(BLOCKS) == 3
    assert main(shlex.split(COMMANDS[0])) == 0
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/notebook.md", "exec"), names)
    assert len(names["samples"]) == sum(names["by_minute"]["impressions"]) > 5_000
    for name, (auc, calibration) in names["found"].items():
        assert auc > 0.6 and 0.85 < calibration < 1.15, (name, auc, calibration)
