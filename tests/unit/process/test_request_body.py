"""Goal: no client hangs a task, holds what others need, or loses an event that was answered with 200.

Method: real sockets on both doors that read bodies, serving's and the collector's, with small bounds: a backlog that is
full, clients that leave in the body and before the answer, that never end, that are slow, that take no answer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import httpx
import pytest
from collector_world import Site, site
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from headrace.contract.errors import BadRequest
from headrace.ingest.http import collector
from headrace.process import http_bounds, request_body
from headrace.process.request_body import Bodies
from headrace.serving.api.answers import problem
from headrace.serving.api.app import BODIES
from headrace.serving.processes import answer_requests, listen

BYTES, DISCARDED, BODY_S = 100_000, 300_000, 60.0


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def event(number: int) -> dict[str, Any]:
    return {"tag": "shop.impression", "event_id": f"e{number}", "request_id": "r", "user_id": 1, "item_id": number}


class Door:
    """One of the two servers; `bodies` is what it reads with."""

    path = "/"

    def __init__(self, bodies: Bodies, port: int, listener: socket.socket) -> None:
        self.bodies, self.port, self.listener = bodies, port, listener
        self.made: Site | None = None

    def connect(self, sent: bytes = b"", *, timeout_s: float = 30.0) -> socket.socket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        raw.sendall(sent)
        return raw

    def head(self, *lines: str) -> bytes:
        told = [f"POST {self.path} HTTP/1.1", "Host: h", "Content-Type: application/json", *lines, "", ""]
        return "\r\n".join(told).encode()

    def asks(self, body: bytes = b"[]", **headers: str) -> int:
        """Return the status of a client that does all right."""
        url = f"http://127.0.0.1:{self.port}{self.path}"
        return httpx.post(url, content=body, headers=headers, timeout=30.0, trust_env=False).status_code


@contextlib.contextmanager
def serving(body_s: float = BODY_S) -> Iterator[Door]:
    bounds = replace(BODIES, bytes_max=BYTES, together_max=2 * BYTES, discard_max=DISCARDED, seconds=body_s)
    bodies, over, listener = Bodies(bounds), threading.Event(), listen("127.0.0.1", 0)

    async def take(request: Request) -> Response:
        try:
            return PlainTextResponse(await bodies.read(request) * 200)
        except BadRequest as error:
            return problem(error.status, error.error, error.step)

    def end() -> None:
        over.wait()
        raise ValueError("told to end")

    app = Starlette(routes=[Route("/", take, methods=["POST"])])
    thread = threading.Thread(target=lambda: answer_requests(app, listener, over, jobs={"end": end}))
    thread.start()
    try:
        yield Door(bodies, listener.getsockname()[1], listener)
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def collecting(monkeypatch: pytest.MonkeyPatch, body_s: float = BODY_S) -> Iterator[Door]:
    monkeypatch.setattr(collector, "_BODY_S", body_s)
    monkeypatch.setattr(collector, "_DISCARD_BYTES_MAX", DISCARDED)
    listeners = list[socket.socket]()
    told = collector.listen

    def listen_here(*args: Any, **named: Any) -> socket.socket:
        listeners.append(told(*args, **named))
        return listeners[-1]

    monkeypatch.setattr(collector, "listen", listen_here)
    with site(collector_bytes_max=BYTES, buffer_bytes_max=8 * BYTES) as made:
        door = Door(made.collector._bodies, made.port, listeners[0])
        door.path, door.made = "/v1/events", made
        yield door


@pytest.fixture
def body_s() -> float:
    """How long a body may take: no test waits for it but those that say so."""
    return BODY_S


@pytest.fixture(params=["serving", "collector"])
def door(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, body_s: float) -> Iterator[Door]:
    """Each door in turn; at its end it holds nothing of any body, and no thread of it is left."""
    with serving(body_s) if request.param == "serving" else collecting(monkeypatch, body_s) as made:
        yield made
        until(lambda: made.bodies.held == 0)
        assert made.asks() == 200


def test_clients_beyond_a_full_backlog_are_answered_when_there_is_room(door: Door, monkeypatch: pytest.MonkeyPatch):
    """The loop stands still meanwhile; what the kernel did not take, its client sends again by itself."""
    blocked, gate = threading.Event(), threading.Event()
    told = Bodies.read

    async def read(self: Bodies, request: Request) -> bytes:
        if "x-block" in request.headers:
            blocked.set()
            gate.wait(30.0)
        return await told(self, request)

    monkeypatch.setattr(request_body.Bodies, "read", read)
    statuses = list[int]()
    holder = threading.Thread(target=lambda: statuses.append(door.asks(**{"X-Block": "1"})))
    holder.start()
    assert blocked.wait(30.0)
    door.listener.listen(2)

    def ask() -> None:
        for _ in range(5):
            # The kernel may end a connection that it had no room for when its data come.
            with contextlib.suppress(httpx.TransportError):
                statuses.append(door.asks())
                return

    clients = [threading.Thread(target=ask) for _ in range(12)]
    for one in clients:
        one.start()
    with contextlib.ExitStack() as idle, pytest.raises(TimeoutError):
        # The queue of the kernel is full by the time that one of these is not taken.
        for _ in range(12):
            idle.enter_context(door.connect(timeout_s=0.2))
    assert not statuses
    gate.set()
    for one in (holder, *clients):
        one.join()
    assert statuses == [200] * 13


@pytest.mark.parametrize("line", ["Content-Length: 50000", "Transfer-Encoding: chunked"])
def test_a_client_that_leaves_in_the_body_costs_its_own_request(door: Door, line: str):
    left = [door.connect(door.head(line) + b"2000\r\n" + b"x" * 8_000) for _ in range(5)]
    until(lambda: door.bodies.held >= 5 * 8_000)
    for number, one in enumerate(left):
        if number % 2:
            # A reset in place of an orderly end.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        one.close()
    until(lambda: door.bodies.held == 0)
    assert door.made is None or door.made.log.rows() == []


def test_an_endless_body_is_told_that_it_is_too_large_and_ended(door: Door, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_bounds, "HEADERS_S", 0.2)
    most = list[int]()
    with door.connect(door.head("Transfer-Encoding: chunked")) as endless:

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    endless.sendall(b"1000\r\n" + b"x" * 4_096 + b"\r\n")
                    most.append(door.bodies.held)

        sender = threading.Thread(target=send)
        sender.start()
        seen = b""
        with contextlib.suppress(OSError):
            while piece := endless.recv(4_096):
                seen += piece
        sender.join()
    assert b" 413 " in seen
    assert max(most) <= BYTES


def test_what_is_too_large_is_held_by_nobody_while_it_is_read_on(door: Door):
    """What is thrown away takes no room of the others."""
    heads = [door.connect(door.head(f"Content-Length: {DISCARDED - 1}") + b"x" * (DISCARDED - 1_000)) for _ in range(4)]
    assert door.asks(b" " * (BYTES - 2) + b"[]") == 200
    for one in heads:
        one.sendall(b"x" * 999)
        assert b" 413 " in one.recv(1_000)
        one.close()


@pytest.mark.parametrize("body_s", [0.3])
def test_a_slow_body_is_ended(door: Door):
    with door.connect(door.head("Content-Length: 10") + b"[") as slow:
        assert door.asks() == 200
        seen = b""
        with contextlib.suppress(OSError):
            while piece := slow.recv(1_000):
                seen += piece
        assert b" 408 " in seen and b"the body took more than" in seen


def test_a_client_that_takes_no_answer_is_ended_and_its_task_too(monkeypatch: pytest.MonkeyPatch):
    """The answer is larger than what the kernel holds of it: the task waits for the client."""
    monkeypatch.setattr(http_bounds, "ANSWER_S", 0.2)
    refused = list[str]()
    cut = http_bounds.BoundedProtocol.cut

    def told(self: http_bounds.BoundedProtocol, reason: str, why: str) -> None:
        refused.append(reason)
        cut(self, reason, why)

    monkeypatch.setattr(http_bounds.BoundedProtocol, "cut", told)
    with serving() as door:
        deaf = [door.connect(door.head(f"Content-Length: {BYTES}") + b"x" * BYTES) for _ in range(3)]
        deaf[0].close()
        until(lambda: refused.count("slow_reader") == 2)
        assert door.asks() == 200
        for one in deaf[1:]:
            with contextlib.suppress(ConnectionResetError):
                while one.recv(1_000_000):
                    pass
            one.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_was_acked_is_there_and_what_was_not_counts_once_when_it_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, seed: int
):
    """Clients leave in the body, before the answer, and in it; who has no 200 sends the same again."""
    random, wanted, acked = Random(seed), 30, set[int]()
    with collecting(monkeypatch) as door:
        assert door.made is not None
        for number in range(wanted):
            body = json.dumps([event(number)]).encode()
            whole = door.head(f"Content-Length: {len(body)}", f"Idempotency-Key: k{number}") + body
            way = random.choice(("leaves in the body", "leaves before the answer", "leaves in the answer", "stays"))
            with door.connect(
                whole[: -random.randrange(1, len(body))] if way == "leaves in the body" else whole
            ) as one:
                if way == "leaves in the answer":
                    one.recv(1)
                if way == "stays" and one.recv(1_000).startswith(b"HTTP/1.1 200"):
                    acked.add(number)
        assert {f"e{number}" for number in acked} <= set(door.made.ids()) and len(acked) > 3
        for number in set(range(wanted)) - acked:
            status = door.asks(json.dumps([event(number)]).encode(), **{"Idempotency-Key": f"k{number}"})
            assert status == 200
        assert sorted(door.made.ids()) == sorted(f"e{number}" for number in range(wanted))
        until(lambda: door.made is not None and door.made.metrics.gauges["requests_open", ""] == 0)
        assert door.bodies.held == 0
