"""Goal: serving begins anew in its place only where that gives what a restart would give, and waits for its counters.

Method: a real process that does so at SIGHUP, and a supervisor whose XML-RPC is answered here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.deploy.local import supervise
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor
from headrace.serving.renewal import RENEWALS, SOCKET, await_read, inherited

ANEW = f"""
import os, signal, sys

def anew(*_):
    number = int(os.environ.get({RENEWALS!r}, "0")) + 1
    os.execve(sys.executable, sys.orig_argv, os.environ | {{{RENEWALS!r}: str(number)}})

signal.signal(signal.SIGHUP, anew)
print("listens", flush=True)
while True:
    signal.pause()
"""


class Rpc(Supervisor):
    """A supervisor that runs one process, `serve`."""

    def __init__(self, layout: Layout, pid: int) -> None:
        super().__init__(layout)
        self.pid, self.signals = pid, 0

    def _ask(self, method: str, *words: object, space: str = "supervisor") -> Any:
        if method == "getAllProcessInfo":
            return [{"name": "serve", "pid": self.pid}, {"name": "train", "pid": self.pid}]
        assert (method, *words) == ("signalProcess", "serve", "HUP")
        self.signals += 1
        os.kill(self.pid, signal.SIGHUP)
        return True


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Rpc]:
    layout = Layout(
        home=tmp_path, port_base=30_000, brokers="b:1", store="file:/s", webhdfs="", project=tmp_path,
        own_kafka=False, own_hdfs=False,
    )  # fmt: skip
    command = [sys.executable, "-c", ANEW]
    with subprocess.Popen(command, env=layout.environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"listens\n"
        yield Rpc(layout, process.pid)
        process.kill()


def test_it_returns_when_the_process_has_begun_anew(stack: Rpc) -> None:
    assert stack.renew("serve") and stack.signals == 1


def test_other_processes_are_not_asked(stack: Rpc) -> None:
    assert not stack.renew("train") and not stack.signals


def test_a_changed_environment_takes_a_start(stack: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEBODYS_OWN", "changed")
    assert stack.renew("serve")
    monkeypatch.setenv("HEADRACE_PRIVACY_KEY", "another key of 32 letters or more")
    assert not stack.renew("serve") and stack.signals == 1


def test_one_that_does_not_is_to_be_ended_and_started(stack: Rpc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RENEWS_S", 0.0)
    assert not stack.renew("serve") and stack.signals == 1


def test_requests_wait_until_the_counters_are_read_or_the_stage_ends() -> None:
    looks = iter([True, True, False])
    await_read(lambda: next(looks), lambda _: False)
    assert next(looks, None) is None
    await_read(lambda: True, lambda _: True)


def test_a_socket_that_is_none_of_ours_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ("", "nonsense", "99999"):
        monkeypatch.setenv(SOCKET, told)
        assert inherited("127.0.0.1", 1) is None and SOCKET not in os.environ
