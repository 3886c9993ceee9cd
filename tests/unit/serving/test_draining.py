"""Goal: SIGTERM drops no request that was accepted, and says beforehand that the process ends.

Method: a small stage of real processes (`serving_process`) under clients of all kinds, that gets SIGTERM.
"""

from __future__ import annotations

import http.client
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import serving_process
from serving_stage import running, until


class Clients:
    """Clients that ask without pause until connections are refused; what each was told."""

    def __init__(self, port: int) -> None:
        self.port, self.statuses, self.closed = port, list[int](), 0
        self.failures = list[str]()
        kinds = [(kept, path) for kept in (True, False) for path in ("/", "/slow")] * 3
        self.threads = [threading.Thread(target=self._ask, args=kind) for kind in kinds]
        for thread in self.threads:
            thread.start()

    def _ask(self, is_kept: bool, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20.0)
        while True:
            try:
                if connection.sock is None:
                    connection.connect()
            except ConnectionRefusedError:
                return
            except OSError as error:
                self.failures.append(f"connect: {error!r}")
                return
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{path} {is_kept}: {error!r}")
                return
            self.statuses.append(answer.status)
            self.closed += answer.getheader("Connection") == "close"
            if not is_kept:
                connection.close()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(30.0)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.mark.parametrize("drain_s", ["0.5", "0"])
def test_every_accepted_request_is_answered_and_then_connections_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain_s: str
) -> None:
    monkeypatch.setenv(serving_process.DRAIN_S, drain_s)
    with running(tmp_path) as stage:
        clients = Clients(stage.port)
        until(lambda: len(clients.statuses) > 50, "all of them are answered")
        stage.process.send_signal(signal.SIGTERM)
        status, log = stage.ended()
        clients.join()
        assert status == 0 and "Traceback" not in log, log
        assert not clients.failures and set(clients.statuses) == {200}
        assert clients.closed >= 6, "kept connections are ended with an answer"


def test_while_it_drains_it_says_so_in_all_processes_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serving_process.DRAIN_S, "30")
    with running(tmp_path) as stage:
        assert stage.get("/draining") == "False"
        stage.process.send_signal(signal.SIGTERM)
        until(lambda: {stage.get("/draining") for _ in range(20)} == {"True"}, "all of them drain")
        stage.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert stage.asked(), "a second SIGTERM changes nothing"
        stage.process.send_signal(signal.SIGINT)
        status, log = stage.ended()
        assert status == 0 and "Traceback" not in log, log


def test_a_kept_connection_that_idles_does_not_hold_the_end_up(tmp_path: Path) -> None:
    with running(tmp_path) as stage, socket.create_connection(("127.0.0.1", stage.port)) as idle:
        until(stage.asked, "it answers")
        stage.process.send_signal(signal.SIGTERM)
        assert idle.recv(10) == b""
        status, _ = stage.ended()
        assert status == 0
