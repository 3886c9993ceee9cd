"""Goal: what crashes again and again is started ever later, up to a cap, and `headrace status` tells of it.

Method: the schedule on numbers; a real supervisord over processes that end at once, waited for by what it tells.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from local_world import free_base

from headrace.cli.stack import status
from headrace.cli.stack.flags import table
from headrace.deploy.local import supervise
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.restarts import HEALTHY_S, MAX_S, Crashes, last_words
from headrace.deploy.local.supervise import Process, Program, Supervisor, end_orphans, orphans


def crash(crashes: Crashes, ran_s: float, now_s: float = 0.0) -> float:
    """Return how long the next start waits."""
    crashes.ended(pid=7, how="exit 1", ran_s=ran_s, words="bad", now_s=now_s)
    return crashes.left_s(now_s)


@pytest.mark.parametrize("ran_s", [0.1, 2.0, 30.0, HEALTHY_S - 1.0])
def test_waits_double_up_to_the_cap_however_long_each_run_was(ran_s: float) -> None:
    crashes = Crashes()
    waits = [crash(crashes, ran_s) for _ in range(10)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_S, MAX_S, MAX_S, MAX_S]
    assert (crashes.total, crashes.in_row) == (10, 10)


def test_a_long_healthy_run_ends_the_row_and_not_the_count() -> None:
    crashes = Crashes()
    for _ in range(6):
        crash(crashes, 1.0)
    assert crash(crashes, HEALTHY_S) == 0.5
    assert (crashes.total, crashes.in_row) == (7, 1)


def test_a_row_is_over_while_the_process_still_runs() -> None:
    crashes = Crashes()
    for _ in range(6):
        crash(crashes, 1.0, now_s=50.0)
    begun_s = crashes.next_start_s
    assert crashes.told(now_s=begun_s + HEALTHY_S - 1.0, begun_s=begun_s).in_row == 6
    later = crashes.told(now_s=begun_s + HEALTHY_S, begun_s=begun_s)
    assert (later.total, later.in_row, later.next_start_s) == (6, 0, 0.0)
    # One that waits for its next start does not run, however long ago it was started.
    waits = crashes.told(now_s=begun_s - 5.0, begun_s=begun_s - 2 * HEALTHY_S)
    assert (waits.in_row, waits.next_start_s) == (6, 5.0)


def test_a_start_that_was_asked_for_waits_for_nothing() -> None:
    crashes = Crashes()
    for _ in range(6):
        crash(crashes, 1.0, now_s=50.0)
    crashes.asked()
    assert crashes.left_s(50.0) == 0.0
    assert crash(crashes, 1.0, now_s=60.0) == 0.5


def test_last_words_have_no_letter_that_xml_has_not() -> None:
    assert last_words(["x ERROR \x1b[31mbad\x00"]) == "x ERROR  [31mbad "


def row(**changes: object) -> Process:
    told = {"name": "train", "state": "running", "pid": 9, "memory_mb": 5, "port": 9106, "log": "a.log", "uptime_s": 4}
    return Process(**(told | changes))  # type: ignore[arg-type]


def test_status_says_how_it_ended_how_often_and_when_it_starts_again() -> None:
    crashes = Crashes(
        total=5, in_row=4, last_pid=8, last_exit="exit 1", last_ran_s=30.2, last_words="no store", next_start_s=3.6
    )
    lines = table([row(), row(name="sink", state="backoff", pid=0, crashes=crashes)]).splitlines()
    assert len(lines) == 4, "the head, two rows, and one line of a crash"
    assert lines[-1] == (
        "sink: 5 crashes, 4 in a row; last: exit 1 after 30 s (pid 8); next start in 4 s; last words: no store"
    )
    running = table([row(crashes=crashes)]).splitlines()[-1]
    assert "now running for 4 s (pid 9)" in running


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    home = tmp_path / "with space"
    layout = Layout(
        home=home,
        port_base=free_base(),
        brokers="127.0.0.1:1",
        store=f"file:{home}",
        webhdfs=None,
        project=tmp_path,
        own_kafka=False,
        own_hdfs=False,
    )
    layout.prepare()
    yield Supervisor(layout)
    Supervisor(layout).shutdown()
    end_orphans(home)


def awaited(supervisor: Supervisor, name: str, holds: Callable[[Process], bool]) -> Process:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = {process.name: process for process in supervisor.processes()}[name]
        if holds(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{name} stays {found}")


def test_supervisord_counts_crashes_waits_and_goes_on(supervisor: Supervisor) -> None:
    dies = [sys.executable, "-Sc", "import sys; print('x ERROR no store'); sys.exit(3)"]
    lives = [sys.executable, "-Sc", "import time; time.sleep(600)"]
    supervisor.start([Program("dies", dies), Program("lives", lives)], restart_max_s=600.0)
    supervisor.begin(["dies", "lives"])
    # The third wait is 2 s, so that it is seen.
    found = awaited(supervisor, "dies", lambda p: p.crashes.in_row >= 3 and p.state == "backoff")
    assert (found.crashes.last_exit, found.crashes.last_words) == ("exit 3", "x ERROR no store")
    assert found.pid == 0 and found.crashes.next_start_s > 0 and found.crashes.last_pid > 0
    before = awaited(supervisor, "lives", lambda p: p.state == "running")
    supervisor.kill("lives")
    after = awaited(supervisor, "lives", lambda p: p.state == "running" and p.pid != before.pid)
    assert (after.crashes.total, after.crashes.last_exit) == (1, "SIGKILL")
    supervisor.end(["lives"])
    stopped = awaited(supervisor, "lives", lambda p: p.state == "stopped")
    assert (stopped.crashes.total, stopped.crashes.in_row) == (1, 0), "a stop that was asked for is no crash"
    supervisor.end(["dies"])
    assert awaited(supervisor, "dies", lambda p: p.state == "stopped").crashes.total >= 3
    supervisor.begin(["dies"])
    again = awaited(supervisor, "dies", lambda p: p.crashes.total > found.crashes.total)
    assert again.crashes.in_row <= 2, "a start that was asked for begins a new row"


def test_last_words_are_of_the_life_that_ended(supervisor: Supervisor, tmp_path: Path) -> None:
    once = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); new = not p.exists(); p.touch()"
    once += "; new and sys.exit('x ERROR the disk is full'); time.sleep(600)"
    supervisor.start([Program("kafka", [sys.executable, "-Sc", once, str(tmp_path / "begun")])])
    supervisor.begin(["kafka"])
    first = awaited(supervisor, "kafka", lambda p: p.state == "running" and p.crashes.total == 1)
    assert first.crashes.last_words == "x ERROR the disk is full"
    supervisor.kill("kafka")
    second = awaited(supervisor, "kafka", lambda p: p.crashes.total == 2)
    assert (second.crashes.last_exit, second.crashes.last_words) == ("SIGKILL", "")


def test_status_tells_what_lives_when_supervisord_stands_still(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = supervisor.layout
    layout.save()
    args = Namespace(home=str(layout.home), json=False)
    as_json = Namespace(home=str(layout.home), json=True)
    assert status.main(args) == 1 and "nothing runs" in capsys.readouterr().out
    supervisor.start([Program("lives", [sys.executable, "-Sc", "import time; time.sleep(600)"])])
    supervisor.begin(["lives"])
    lives = awaited(supervisor, "lives", lambda p: p.state == "running")
    assert status.main(args) == 0 and "lives" in capsys.readouterr().out
    monkeypatch.setattr(supervise, "ANSWER_S", 0.5)
    (pid,) = (p.pid for p in orphans(layout.home) if p.pid != lives.pid)
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert status.main(args) == 2
    assert time.monotonic() - begin < 30.0
    said = capsys.readouterr().out
    assert f"supervisord (pid {pid}, stopped) does not answer" in said and f"kill -CONT {pid}" in said
    assert str(sorted([pid, lives.pid])) in said
    assert status.main(as_json) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["running"] is True and "does not answer" in told["trouble"]
    os.kill(pid, signal.SIGCONT)
    monkeypatch.undo()
    assert status.main(as_json) == 0 and json.loads(capsys.readouterr().out)["trouble"] == ""
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert status.main(args) == 2 and "no supervisord answers" in capsys.readouterr().out
