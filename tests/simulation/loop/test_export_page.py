"""Goal: every command and block of docs/export.md runs, and what an exported model says is what POST /v1/rank answers.
Method: made-up visitors of the ads example train a model through the whole loop in memory under virtual time; serving
then answers on a real socket, and the verb reads log and store of the loop."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from loop_world import Loop, opened, quiet
from test_examples import play

from headrace.cli.main import main
from headrace.cli.project_folder import load_project
from headrace.cli.runtime import Runtime
from headrace.cli.tools.init import make_project
from headrace.cli.tools.traffic import load_visits
from headrace.examples.service import Service
from headrace.serving.api.app import make_app
from headrace.serving.processes import listen

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    headrace (model export .*)$", PAGE, re.MULTILINE)
TURN_MS = 30_000


@contextmanager
def on_a_socket(loop: Loop) -> Iterator[int]:
    """Yield the port on which the loop's serving answers."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(loop.app), log_level=None))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def test_the_page_runs_and_exports_say_what_serving_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path / "mine", "ads")
    config, project = load_project(tmp_path / "mine")
    with opened(project, quiet(config, TURN_MS), tmp_path) as loop:
        service = Service(project, load_visits(tmp_path / "mine")(project, 1), log=loop.send, run="try", rank=None)
        play(loop, service, visits=300, turns=30, turn_ms=TURN_MS, asked_from=2)
        monkeypatch.setattr(Runtime, "require_kafka", lambda self: None)
        monkeypatch.setattr(Runtime, "reader", lambda self: loop.log.reader())
        monkeypatch.setattr(Runtime, "blobs", lambda self: loop.blobs)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(time, "time", lambda: loop.clock.now_ms() / 1_000)
        assert len(COMMANDS) == 2 and len(BLOCKS) == 5
        for command in COMMANDS:
            assert main(shlex.split(command)) == 0
        served, digest = loop.shared.meta().manifest, loop.trainer.learner.digest()
        said = capsys.readouterr().out
        assert f"{project.name} {served.version}: chain {served.version}, seq 0, digest {digest}" in said
        assert "rows.safetensors, which the models' caller" in said and "model.onnx" in said
        names: dict[str, Any] = {}
        with on_a_socket(loop) as port:
            for block in BLOCKS:
                there = block.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
                exec(compile(there, "docs/export.md", "exec"), names)
    # The page compares scores where versions are one: they must be here.
    assert names["answer"]["version"] == names["manifest"]["version"] == served.version
    assert names["answer"]["scores"][0] != names["answer"]["scores"][1]
    assert any(any(row.values()) for row in names["answer"]["served"]), "no counter was above 0"
    assert len(names["known"]) == 1 and names["manifest"]["digest"] == digest
    assert json.loads((tmp_path / "large" / "manifest.json").read_text())["inline"] is False
