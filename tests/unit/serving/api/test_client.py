"""Goal: the clients return typed answers, send again what may be sent again within the time there is, and log what was
shown with what serving said.

Method: both against serving behind a real socket, and against a server that does in turn what a script says; pauses
and chance are given.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from serving_thread import answering
from serving_world import Trainer, World

from headrace.client import Answer, AsyncClient, BadRequest, Client, Overloaded, TooLate, Unavailable
from headrace.client.attempts import FIRST_S, LONGEST_S, Attempts
from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.ranking import RankAnswer

GOOD = {"request_id": "r", "version": "a-1", "scores": [0.25, 0.75], "served": [{"counter.x": 1.0}, {"counter.x": 2.0}]}


def http(status: int, body: Any, more: str = "") -> bytes:
    text = msgspec.json.encode(body)
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n{more}\r\n".encode() + text


def problem(status: int, retry_ms: int = 0) -> bytes:
    return http(status, {"error": "wrong", "next": "do", "retry_ms": retry_ms})


class Scripted:
    """Answers the next request as the next line of the script says; b"" closes without an answer."""

    def __init__(self, script: list[bytes], closes: bool) -> None:
        self.script, self.asked, self.connections = iter(script), list[dict[str, Any]](), 0
        self.closes, self.listener = closes, socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection, connection.makefile("rb") as lines:
                while self._answers(connection, lines):
                    pass

    def _answers(self, connection: socket.socket, lines: Any) -> bool:
        head = list[bytes]()
        while (line := lines.readline()) != b"\r\n":
            if not line:
                return False
            head.append(line)
        names = dict(line.decode().lower().split(":", 1) for line in head if b":" in line)
        self.asked.append(msgspec.json.decode(lines.read(int(names["content-length"]))))
        said = next(self.script)
        connection.sendall(said)
        return bool(said) and not self.closes

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10.0)


@contextmanager
def scripted(*script: bytes, closes: bool = False) -> Iterator[Scripted]:
    server = Scripted(list(script), closes)
    try:
        yield server
    finally:
        server.close()


class Logged:
    def __init__(self) -> None:
        self.events: list[tuple[str | None, dict[str, Any]]] = []

    def emit(self, label: str | None, data: dict[str, Any]) -> bool:
        self.events.append((label, data))
        return True


class Asks:
    """Either client, asked in the same way. Pauses are noted, not waited for."""

    def __init__(self, is_async: bool, url: str, **settings: Any) -> None:
        self.pauses, self.is_async = list[float](), is_async
        settings = {"chance": lambda: 0.5, "timeout_ms": 10_000.0} | settings

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)

        self.client: Any = (
            AsyncClient(url, sleep=sleep, **settings) if is_async else Client(url, sleep=self.pauses.append, **settings)
        )

    def rank(self, times: int = 1, **rest: Any) -> Answer:
        """Ask `times` over, and return the last answer."""

        async def ask() -> Answer:
            async with self.client:
                for _ in range(times):
                    found = await self.client.rank({"user": 3}, [{"item": 1}, {"item": 2}], **rest)
                return found

        if self.is_async:
            return asyncio.run(ask())
        with self.client:
            for _ in range(times):
                found = self.client.rank({"user": 3}, [{"item": 1}, {"item": 2}], **rest)
            return found


Make = Callable[..., Asks]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Make:
    return lambda url, **settings: Asks(request.param, url, **settings)


def test_serving_answers_and_what_was_shown_is_logged_as_it_was_served(tmp_path: Path, make: Make) -> None:
    world, sender = World(tmp_path), Logged()
    trainer = Trainer(world)
    trainer.learn(Random(1))
    trainer.snapshot()
    world.follow()
    with answering(world.app) as served:
        asks = make(served.url, sender=sender, now_ms=lambda: 77)
        answer = asks.rank(times=2, request_id="r1")
        assert answer.version == "a-1" and len(answer.scores) == 2 and answer.age_ms == 4_000 and not answer.stale
        assert answer.order() == sorted([0, 1], key=lambda place: -answer.scores[place])
        asks.client.shown(answer, [1], slot="top")
        with pytest.raises(BadRequest, match="there are no candidates"):
            asyncio.run(asks.client.rank({}, [])) if asks.is_async else asks.client.rank({}, [])
    shown = {"user": 3, "item": 2, "event_id": "r1#1", "request_id": "r1", "place": 1, "event_time_ms": 77}
    assert sender.events == [("impression", shown | {"served": answer.served[1], "version": "a-1", "slot": "top"})]
    assert isinstance(answer.served[1], str)
    with pytest.raises(IndexError, match="place 2"):
        asks.client.shown(answer, [2])


def test_a_token_is_logged_as_it_came_and_a_fallback_without_a_version(make: Make) -> None:
    sender = Logged()
    with scripted(http(200, GOOD | {"served": ["t0", "t1"], "version": "", "fallback": True})) as server:
        asks = make(server.url, sender=sender)
        answer = asks.rank()
    asks.client.shown(answer, [0])
    assert answer.fallback and sender.events[0][1]["served"] == "t0" and "version" not in sender.events[0][1]


def test_what_may_be_sent_again_is_with_growing_pauses_and_the_time_that_is_left(make: Make) -> None:
    with scripted(problem(503), problem(429, retry_ms=300), problem(503), http(200, GOOD)) as server:
        asks = make(server.url)
        assert asks.rank().scores == [0.25, 0.75]
    assert asks.pauses == pytest.approx([FIRST_S, 0.3, 4 * FIRST_S])
    left = [ask["timeout_ms"] for ask in server.asked]
    assert all(0 < each <= 10_000 for each in left) and left == sorted(left, reverse=True)
    assert server.connections == 1, "the connection is kept"


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (problem(422), BadRequest, "wrong; do"),
        (problem(504), TooLate, "would have been too late"),
        (problem(500), Unavailable, "answered 500"),
        (http(200, {"scores": 1}), Unavailable, "is no serving"),
        (problem(429, retry_ms=20_000), Overloaded, "more requests than it can answer"),
    ],
)
def test_what_may_not_be_sent_again_is_raised_at_once(
    make: Make, said: bytes, error: type[Exception], words: str
) -> None:
    with scripted(said) as server:
        asks = make(server.url)
        with pytest.raises(error, match=words):
            asks.rank()
    assert len(server.asked) == 1 and not asks.pauses


def test_a_kept_connection_that_was_closed_is_made_anew_without_a_pause(make: Make) -> None:
    with scripted(*[http(200, GOOD)] * 3, closes=True) as server:
        asks = make(server.url)
        asks.rank(times=3)
    assert len(server.asked) == 3 and server.connections >= 3 and not asks.pauses


def test_an_answer_that_says_close_ends_its_connection(make: Make) -> None:
    with scripted(*[http(200, GOOD, "Connection: close\r\n")] * 2, closes=True) as server:
        asks = make(server.url)
        asks.rank(times=2)
    assert server.connections == 2 and not asks.pauses


@pytest.mark.parametrize("broken", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", b"SSH-2.0-x\r\n\r\n"])
def test_a_connection_that_breaks_is_tried_again(make: Make, broken: bytes) -> None:
    script = [broken, http(200, GOOD)]
    with scripted(*script, closes=True) as server:
        asks = make(server.url)
        assert asks.rank().version == "a-1"
    assert len(asks.pauses) == 1


def test_an_answer_in_chunks_is_read(make: Make) -> None:
    text = msgspec.json.encode(GOOD)
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (text[:10], text[10:]))
    with scripted(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n") as server:
        assert make(server.url).rank().scores == [0.25, 0.75]


def test_serving_that_is_away_is_told_when_the_time_is_over(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    now = iter(range(1_000))
    asks = make(url, monotonic=lambda: next(now) * 0.1, timeout_ms=3_000.0)
    with pytest.raises(Unavailable, match="does not answer") as wrong:
        asks.rank()
    assert not isinstance(wrong.value, TooLate) and asks.pauses == sorted(asks.pauses) and len(asks.pauses) > 2


def test_serving_that_hangs_is_given_up_in_time(make: Make) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(TooLate, match="no answer in 50 ms"):
        make(f"http://127.0.0.1:{listener.getsockname()[1]}").rank(timeout_ms=50.0)


def test_pauses_differ_by_chance_and_are_bounded() -> None:
    rng = Random(1)
    attempts = Attempts({}, 1_000.0, lambda: 0.0, rng.random)
    pauses = [attempts.answer(503, b"proxy") for _ in range(20)]
    assert len(set(pauses)) == 20
    assert all(0.5 * FIRST_S <= pause <= 1.5 * LONGEST_S for pause in pauses if isinstance(pause, float))
    assert not isinstance(pauses[0], RankAnswer)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://h", "http://", "http://h/v1/rank"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigRejected, match="no address of serving"):
        Client(url)


def test_a_client_without_a_sender_says_so() -> None:
    with scripted(http(200, GOOD)) as server, Client(server.url) as client:
        answer = client.rank({}, [{}, {}])
        with pytest.raises(ConfigRejected, match="no sender"):
            client.shown(answer, [0])


def test_it_imports_nothing_heavy() -> None:
    heavy = "torch", "pyarrow", "numpy", "numba", "starlette", "httpx"
    code = f"import sys, headrace.client; print([each for each in {heavy} if each in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60.0)
    assert done.stdout == "[]\n"
