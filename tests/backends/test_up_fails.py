"""Goal: what waits for a stage that refuses to start fails at once with its last words, and a second try takes the
files and the environment of then.

Method: a real supervisord, with programs that say what they have; and `headrace up` with a project whose own function
raises at import in one stage alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_world import CHECKOUT, free_base, own_layout

from headrace.contract.errors import Unavailable
from headrace.deploy.local import readiness
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.supervise import Program, Supervisor

pytestmark = pytest.mark.real

PROGRAM = """
import os, sys, time
key = os.environ.get("HEADRACE_PRIVACY_KEY")
print("key", key, flush=True)
if not key:
    print("headrace train: the key is missing. Set it.", flush=True)
    sys.exit(int(sys.argv[1]))
time.sleep(600)
"""
"""Refuses to start without a key, with an exit status of our choice."""


@pytest.mark.parametrize("status", ["1", "2"])
def test_a_stage_that_dies_is_told_at_once_and_takes_a_new_environment(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADRACE_PRIVACY_KEY", raising=False)
    layout = own_layout(tmp_path / "home")
    layout.prepare()
    supervisor, file = Supervisor(layout), tmp_path / "train.py"
    file.write_text(PROGRAM)
    log = layout.logs / "train.log"
    probe = {"train": lambda: "" if log.exists() and "key secret" in log.read_text() else "no key"}
    monkeypatch.setattr(readiness, "stage_probes", lambda layout: probe)
    try:
        supervisor.start([Program("train", [sys.executable, str(file), status])])
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"train: it ended .*the key is missing"):
            local_stack.start_named(layout, ["train"], print)
        assert time.monotonic() - began < local_stack.STAGES_S / 5
        monkeypatch.setenv("HEADRACE_PRIVACY_KEY", "secret")
        local_stack.start_named(layout, ["train"], print)
        (process,) = supervisor.processes()
        assert process.state in ("starting", "running") and process.pid
        local_stack.stop_named(layout, ["train"], print)
        assert [p.state for p in supervisor.processes()] == ["stopped"]
    finally:
        supervisor.end(["train"])
        supervisor.shutdown()
    kept = [file for file in layout.home.rglob("*") if file.is_file() and b"key secret" not in file.read_bytes()]
    assert not [file for file in kept if b"=secret" in file.read_bytes()], "a secret is kept in memory alone"


FAILS = """
import sys
if "train" in sys.argv:
    raise ValueError("no table of items")
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_up_fails_with_the_words_of_the_stage_and_takes_over_when_it_is_mended(tmp_path: Path) -> None:
    project = tmp_path / "store"
    project.mkdir()
    (project / "headrace.toml").write_text("")
    sound = (CHECKOUT / "tests" / "unit" / "cli" / "mistakes.py").read_text().split('"""\\\n')[1].split('"""')[0]
    (project / "project.py").write_text(f"import tables\n{sound}")
    (project / "tables.py").write_text(FAILS)
    env = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    env |= {"PORT_BASE": str(free_base()), "HEADRACE_HOME": str(tmp_path / "home")}

    def headrace(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "headrace.cli.main", *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)

    up = ("up", "--detach", "--project", str(project), "--store", f"file:{tmp_path}/lake")
    try:
        began = time.monotonic()
        failed = headrace(*up)
        took_s = time.monotonic() - began
        print(failed.stdout, failed.stderr, took_s)
        assert failed.returncode == 1 and took_s < local_stack.STAGES_S, failed.stdout
        assert "train: it ended with exit 2" in failed.stderr and "tables.py, line 4" in failed.stderr
        assert "no table of items" in failed.stderr
        (project / "tables.py").write_text("")
        mended = headrace(*up)
        assert mended.returncode == 0, mended.stdout + mended.stderr
        assert "train is ready" in mended.stdout
        assert "events/s" in headrace("follow", "-n", "1").stdout
        applied = headrace("spec", "apply", "--project", str(project))
        assert "nothing to do" in applied.stdout, applied.stderr
        text = (project / "project.py").read_text()
        (project / "project.py").write_text(text.replace('"price": "float64"', '"price": "float64", "city": "string"'))
        applied = headrace("spec", "apply", "--restart", "--project", str(project))
        print(applied.stdout, applied.stderr)
        assert "headrace restart ingest serve train" in applied.stdout and "ingest is ready" in applied.stdout
    finally:
        print(headrace("down").stdout)
