"""Goal: a request on a connection that the server has closed meanwhile is sent once more, and no other one.

Method: a server of sockets that ends its connections as told.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from headrace.cli.tools.traffic import Ranker
from headrace.process.kept_connection import KeptConnection

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Gives each connection the answers of its turn, then closes it; counts the requests that it read."""

    def __init__(self, *turns: tuple[bytes, ...]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.read, self.closed = self.listener.getsockname()[1], 0, [threading.Event() for _ in turns]
        self.thread = threading.Thread(target=self._serve, args=(turns,), daemon=True)
        self.thread.start()

    def _serve(self, turns: tuple[tuple[bytes, ...], ...]) -> None:
        for turn, closed in zip(turns, self.closed, strict=True):
            connection, _ = self.listener.accept()
            for answer in turn:
                request = b""
                # Headers and body come one after the other.
                while not request.endswith(b"}"):
                    request += connection.recv(65_536)
                self.read += 1
                connection.sendall(answer)
            connection.close()
            closed.set()
        self.listener.close()


@contextmanager
def kept_to(server: Server) -> Iterator[KeptConnection]:
    with closing(KeptConnection("127.0.0.1", server.port, 5.0)) as kept:
        yield kept
    server.thread.join(5.0)


def post(kept: KeptConnection) -> tuple[int, bytes]:
    return kept.post("/v1/rank", b"{}", {})


def test_a_connection_that_was_closed_while_it_idled_is_opened_anew() -> None:
    server = Server((ANSWER,), (ANSWER, ANSWER))
    with kept_to(server) as kept:
        assert post(kept) == (200, b"ok")
        assert server.closed[0].wait(5.0)
        assert [post(kept), post(kept)] == [(200, b"ok")] * 2 and server.read == 3


def test_a_new_connection_that_ends_is_no_stale_one() -> None:
    server = Server((b"",), (ANSWER,))
    with kept_to(server) as kept:
        with pytest.raises((OSError, http.client.HTTPException)):
            post(kept)
        assert server.read == 1, "it was read, and may have been done"
        assert post(kept) == (200, b"ok")


def test_an_answer_that_is_cut_off_is_not_asked_for_again() -> None:
    server = Server((ANSWER, ANSWER[:-1]))
    with kept_to(server) as kept:
        post(kept)
        with pytest.raises(http.client.IncompleteRead):
            post(kept)
        assert server.read == 2


def test_a_projects_traffic_loses_no_visit_to_a_connection_that_idled() -> None:
    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"scores":[]}'
    server = Server((answer,), (answer,))
    with closing(Ranker(server.port)) as ranker:
        assert ranker.ask({"request_id": "r-1"}) == {"scores": []}
        assert server.closed[0].wait(5.0)
        assert ranker.ask({"request_id": "r-2"}) == {"scores": []}
    server.thread.join(5.0)
