"""Goal: all processes of serving answer on one port and end together, whichever ends first.

Method: a small stage of real processes (`serving_process`), killed in each way that is foreseen.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from local_world import free_base
from serving_stage import WORKERS, is_alive, running, until

from headrace.contract.errors import ConfigRejected
from headrace.serving.model.region_file import region_in_memory, region_path
from headrace.serving.model.shared_region import region_bytes
from headrace.serving.processes import listen


def test_all_processes_answer_on_one_port_and_stop_together(tmp_path: Path):
    with running(tmp_path) as stage:
        assert len(stage.workers) == WORKERS - 1 and len(stage.region()) == 1
        assert {stage.get("/region") for _ in range(30)} == {"seen by all"}, "one region is shared by all"
        stage.process.send_signal(signal.SIGTERM)
        status, log = stage.ended()
        assert status == 0 and "Traceback" not in log
        assert len(stage.region()) == 1, "the next stage serves at once what is in it"


def test_a_worker_that_dies_ends_the_stage(tmp_path: Path):
    with running(tmp_path) as stage:
        dead = min(stage.workers)
        os.kill(dead, signal.SIGKILL)
        status, log = stage.ended()
        assert status == 1 and f"worker {dead} ended with status 9" in log


def test_a_job_that_fails_ends_the_stage(tmp_path: Path):
    with running(tmp_path) as stage:
        (tmp_path / "fail").touch()
        status, log = stage.ended()
        assert status == 1 and "job failed; the stage ends" in log and "told to fail" in log


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_end_with_the_first_process(tmp_path: Path):
    with running(tmp_path) as stage:
        stage.process.kill()
        assert stage.ended()[0] == -signal.SIGKILL


def test_a_renewal_answers_every_request_and_keeps_the_port(tmp_path: Path) -> None:
    """Some clients keep their connection, some make a new one each time; the next image begins anew in between."""
    with running(tmp_path) as stage:
        first, said, ended = stage.process.pid, list[tuple[int, str]](), threading.Event()

        def ask(is_kept: bool) -> None:
            client = http.client.HTTPConnection("127.0.0.1", stage.port, timeout=20.0)
            while not ended.is_set():
                client.request("GET", "/renewals")
                answer = client.getresponse()
                said.append((answer.status, answer.read().decode()))
                if not is_kept:
                    client.close()
            client.close()

        clients = [threading.Thread(target=ask, args=(kept,)) for kept in (True, True, False, False)]
        for client in clients:
            client.start()
        until(lambda: len(said) > 20, "all of them are answered")
        stage.process.send_signal(signal.SIGHUP)
        until(lambda: said[-1][1] == "1", "the next image answers")
        ended.set()
        for client in clients:
            client.join(30.0)
        assert {status for status, _ in said} == {200} and {which for _, which in said} == {"0", "1"}
        assert stage.process.poll() is None, "it is the same process to whoever started it"
        until(lambda: not any(map(is_alive, stage.workers)), "the workers of the first image are gone")
        stage.pids = {first}
        until(lambda: stage.asked() and len(stage.pids) == WORKERS, "all processes answer again")
        stage.process.send_signal(signal.SIGTERM)
        status, log = stage.ended()
        assert status == 0 and "Traceback" not in log, log


def test_a_stop_takes_the_wish_for_a_renewal_back(tmp_path: Path) -> None:
    with running(tmp_path) as stage:
        stage.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        stage.process.send_signal(signal.SIGTERM)
        status, log = stage.ended()
        assert status == 0 and "Traceback" not in log, log


FORKS = """
import os, sys, threading
from headrace.cli.main import main
from headrace.serving import processes

def fork():
    print([thread.name for thread in threading.enumerate()], flush=True)
    os._exit(0)

processes.os.fork = fork
sys.argv = ["headrace", "serve", "--workers", "2", "--home", sys.argv[1], "--port-base", sys.argv[2]]
main()
"""


def test_the_verb_forks_before_it_has_threads(tmp_path: Path) -> None:
    """A lock that another thread holds at the fork is held for ever in the worker; Python 3.12 warns of it."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path), str(free_base())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60.0)
    region_in_memory(tmp_path).unlink(missing_ok=True)
    assert done.stdout == "['MainThread']\n", done.stderr


def test_the_region_lies_in_memory_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory, home = tmp_path / "memory", tmp_path / "home"
    memory.mkdir()
    path = region_path(home, dim=2, rows_max=100, memory=memory)
    assert path.parent == memory
    assert path != region_path(tmp_path / "other", dim=2, rows_max=100, memory=memory), "one for each local state"
    path.write_bytes(b"of an earlier run")
    free = region_bytes(2, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
    assert region_path(home, dim=2, rows_max=100, memory=memory).parent == home / "run" and not path.exists()


def test_a_port_that_is_taken_is_refused_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigRejected, match="PORT_BASE"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_a_worker_that_does_not_end_is_killed() -> None:
    """It keeps no port and no memory from the next stage."""
    # In a process of its own: a fork of the tests' process would copy whatever lies in it.
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.split() == [str(-signal.SIGKILL)], done.stderr


DEAF = """
import os, signal
from headrace.serving.processes import Workers

workers, (told, tell) = Workers(), os.pipe()

def deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(tell, b"x")
    signal.pause()
    return 0

workers.start(1, deaf)
assert os.read(told, 1) == b"x"
workers.end(patience_s=0.05)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
