"""Goal: clients that leave, stop in the middle, idle or are too many cost serving nothing but their own request.

Method: real sockets on the server that answers; one real process that may open few files.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving_process
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from headrace.contract.errors import BadRequest
from headrace.process import http_bounds
from headrace.process.request_body import Bodies, BodyBounds
from headrace.serving.api.answers import problem
from headrace.serving.api.app import BODIES
from headrace.serving.processes import answer_requests, listen

HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n"


class Server:
    """The server, with an application that reads bodies as `POST /v1/rank` does; `hold` keeps answers back."""

    def __init__(self, connections_max: int, bounds: BodyBounds) -> None:
        self.bodies, self.refused, self.ends = Bodies(bounds), Counter[str](), list[int]()
        self.over = threading.Event()
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        app = Starlette(routes=[Route("/", self.take, methods=["POST"])])
        self.thread = threading.Thread(
            target=lambda: answer_requests(
                app,
                listener,
                self.over,
                jobs={"end": lambda: self.over.wait() and self.fail()},
                connections_max=connections_max,
                refused=lambda reason: self.refused.update([reason]),
            )
        )
        self.thread.start()

    def fail(self) -> None:
        raise ValueError("told to end")

    async def take(self, request: Request) -> Response:
        try:
            sent = await self.bodies.read(request)
        except BadRequest as error:
            self.ends.append(error.status)
            return problem(error.status, error.error, error.step)
        return PlainTextResponse(sent)

    def connect(self, sent: bytes = b"") -> socket.socket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=10.0)
        raw.sendall(sent)
        return raw

    def answers(self) -> bool:
        """A client that does all right is answered at once."""
        return httpx.post(f"http://127.0.0.1:{self.port}/", content=b"ask", trust_env=False).text == "ask"


@contextlib.contextmanager
def running(connections_max: int = 100, **bounds: Any) -> Iterator[Server]:
    server = Server(connections_max, replace(BODIES, **bounds))
    try:
        yield server
    finally:
        server.over.set()
        server.thread.join()
    assert server.bodies.held == 0


def test_headers_that_do_not_end_and_silent_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "HEADERS_S", 0.2)
    with running() as server:
        for sent in (b"", b"POST / HTTP/1.1\r\nHost:"):
            with server.connect(sent) as slow, contextlib.suppress(ConnectionResetError):
                assert slow.recv(100) == b""
        assert server.refused["headers_timeout"] == 2
        assert server.answers()


def test_a_body_that_stops_in_the_middle_is_ended_and_others_are_answered() -> None:
    with running(seconds=0.3) as server, server.connect(HEAD + b"[") as slow:
        assert server.answers()
        seen = b""
        while piece := slow.recv(1_000):
            seen += piece
        assert b" 408 " in seen and b"the body took more than" in seen


def test_a_client_that_leaves_in_the_middle_costs_its_own_request() -> None:
    with running() as server:
        server.connect(HEAD + b"[").close()
        server.connect(HEAD + b"0123456789").close()
        until(lambda: server.ends == [400])
        assert server.answers()


def test_bodies_have_a_bound_each_and_together() -> None:
    with running(bytes_max=9, together_max=12) as server:
        with server.connect(HEAD + b"0123456789") as large:
            assert b" 413 " in large.recv(1_000)
        with server.connect(HEAD + b"01234567"):
            until(lambda: server.bodies.held == 8)
            with server.connect(HEAD + b"01234567") as second:
                assert b" 503 " in second.recv(1_000)
            assert server.answers()


def test_idle_connections_give_way_to_those_that_ask() -> None:
    with running(connections_max=3) as server:
        idle = [server.connect() for _ in range(9)]
        assert server.answers()
        assert server.refused["idle"] >= 6
        for one in idle:
            one.close()


def test_fewer_files_than_connections_are_no_end_of_answers(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["prlimit", "--nofile=200:200", sys.executable, serving_process.__file__, str(tmp_path), "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            until(lambda: is_answered(port))
            many = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
            assert is_answered(port), "an idle connection gives way"
            for one in many:
                one.close()
        finally:
            process.kill()


def is_answered(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=15.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
