"""Goal: every command of docs/tutorial.md does what the page says. Method: its files are written as they stand there,
and its commands run in its order; what needs servers runs in a stack of the test's own, and is long."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_world import CHECKOUT, free_base

from headrace.cli.project_folder import load_project
from headrace.contract.config import port
from headrace.contract.formats.events import ARROW_TYPES, feedback_schema, impression_schema
from headrace.ingest.decode.validate import event_time_ms

PAGE = (CHECKOUT / "docs" / "tutorial.md").read_text()
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
WITHOUT_SERVERS = ("mkdir", "touch", "headrace check")


def write(folder: Path, replaced: dict[str, str]) -> None:
    """Run the page's first commands, and write its files."""
    for command in COMMANDS:
        if command.startswith(("mkdir", "touch")):
            subprocess.run(command, shell=True, cwd=folder, check=True)
    for name, text in FILES.items():
        for old, new in replaced.items():
            text = text.replace(old, new)
        (folder / name).write_text(text)


def run(folder: Path, command: str, env: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in a shell, with this environment's programs first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**env, "PATH": path}, capture_output=True, text=True, timeout=timeout_s
    )
    print(command, done.stdout[-3_000:], done.stderr[-3_000:], sep="\n")
    return done


def environment(folder: Path, base: int) -> dict[str, str]:
    """Return the environment with state and ports of the test's own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return {**env, "PORT_BASE": str(base), "HEADRACE_HOME": str(folder / "state"), "HEADRACE_STORE": f"file:{folder}/s"}


def test_the_page_is_sound_without_servers(tmp_path: Path) -> None:
    assert set(FILES) == {"store/project.py", "traffic.py", "load.py"} and len(COMMANDS) >= 8
    write(tmp_path, {})
    env = environment(tmp_path, free_base())
    (check,) = [command for command in COMMANDS if command.startswith("headrace check")]
    done = run(tmp_path, check, env, 60)
    assert done.returncode == 0 and "at 50 impressions/s" in done.stdout and "settled within" in done.stdout
    lines = run(tmp_path, "python traffic.py", env, 60).stdout.splitlines()
    module: dict[str, object] = {"__name__": "load"}
    exec(FILES["load.py"], module)
    _, project = load_project(tmp_path / "store")
    schemas = {"impression": impression_schema(project), "click": feedback_schema(project, project.feedback[0])}
    counts = dict.fromkeys(schemas, 0)
    examples = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert examples
    for line in (*examples[1].splitlines(), *lines):
        for tag, record in module["events"](line):  # type: ignore[operator]
            counts[tag] += 1
            assert record.keys() <= set(schemas[tag].names) and "user" in record
            assert event_time_ms(record["event_time_ms"], None)
            for name, kind in project.impression.fields.items():
                if name in record:
                    assert isinstance(record[name], float if ARROW_TYPES[kind] == "double" else int)
    assert counts["impression"] > 5_000 and counts["click"] > 500


@pytest.mark.long
@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_page_leads_to_a_served_score(tmp_path: Path) -> None:
    base = free_base()
    env, serving = environment(tmp_path, base), port("serving", base)
    write(tmp_path, {"24224": str(port("forward", base))})
    try:
        for command in COMMANDS:
            if command.startswith(("mkdir", "touch")):
                continue
            done = run(tmp_path, command.replace("8080", str(serving)), env, 600)
            deadline = time.monotonic() + 60
            while command.startswith("curl") and "scores" not in done.stdout and time.monotonic() < deadline:
                time.sleep(2)
                done = run(tmp_path, command.replace("8080", str(serving)), env, 60)
            assert done.returncode == 0, command
            if command.startswith("curl"):
                answer = json.loads(done.stdout)
                assert answer["version"] and answer["scores"][0] > answer["scores"][1]
            if "dead-letters" in command:
                assert "store." not in done.stdout, "no event of the page is refused"
    finally:
        run(tmp_path, "headrace down", env, 120)
