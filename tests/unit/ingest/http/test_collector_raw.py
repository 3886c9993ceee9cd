"""Goal: bytes that no well-meaning client sends cost their own connection, in bounded time. Method: raw sockets, what
was refused by its reason, and a good client beside them."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from collector_world import Site, site
from gateway_world import eventually
from ingest_world import impression

from headrace.process import http_bounds

CHUNKED = b"POST /v1/events HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def made() -> Iterator[Site]:
    with site() as running:
        yield running


def _event(number: int) -> bytes:
    return json.dumps({"tag": "shop.impression", **impression(number)}).encode()


def _post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/events HTTP/1.1", b"Host: h", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", b""]) + body


def _connect(made: Site) -> socket.socket:
    return socket.create_connection(("127.0.0.1", made.port), timeout=30)


def _whole(made: Site, sent: bytes) -> bytes:
    """Return all that is answered until the connection ends."""
    seen = b""
    with _connect(made) as raw, suppress(ConnectionResetError, BrokenPipeError):
        with suppress(ConnectionResetError, BrokenPipeError):
            raw.sendall(sent)
        while data := raw.recv(65_536):
            seen += data
    return seen


def _refused(made: Site, reason: str) -> float:
    return made.metrics.counters["connections_refused_total", reason]


@pytest.mark.parametrize("order", [0, 1])
def test_a_request_with_two_lengths_is_refused_and_what_follows_it_is_not_read(made: Site, order: int) -> None:
    lengths = [b"Transfer-Encoding: chunked", b"Content-Length: 6"]
    head = b"\r\n".join([b"POST /v1/events HTTP/1.1", b"Host: h", *lengths[:: 1 - 2 * order], b"", b""])
    # By its Content-Length the request ends before the second one, which a proxy then never saw.
    answer = _whole(made, head + b"0\r\n\r\n" + b"\r\n" + _post(_event(900 + order)))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert f"e{900 + order}" not in made.ids()


def test_a_body_in_pieces_of_a_byte_costs_a_thousand_of_them(made: Site) -> None:
    before = _refused(made, "no_http")
    answer = _whole(made, CHUNKED + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer, "refused, or reset before the answer was read"
    assert _refused(made, "no_http") == before + 1


def test_a_body_in_a_line_a_piece_is_taken(made: Site) -> None:
    pieces = [_event(10_000 + number) + b"\n" for number in range(3_000)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = CHUNKED.replace(b"Host: h", b"Host: h\r\nConnection: close\r\nContent-Type: application/x-ndjson")
    assert b'"appended":3000' in _whole(made, head + body)


def test_what_follows_an_answered_request_and_is_no_http_ends_the_connection_without_a_fault(
    made: Site, caplog: pytest.LogCaptureFixture
) -> None:
    before = _refused(made, "no_http")
    # Answered before the body is read, which then goes on with nonsense.
    head = CHUNKED.replace(b"Host: h", b"Host: h\r\nOrigin: http://elsewhere.test")
    with _connect(made) as raw:
        raw.sendall(head)
        assert raw.recv(4_096).startswith(b"HTTP/1.1 403 ")
        raw.sendall(b"nonsense\r\n" * 10)
        with suppress(ConnectionResetError):
            while raw.recv(4_096):
                pass
    eventually(lambda: _refused(made, "no_http") == before + 1, "counted")
    assert "Traceback" not in caplog.text and not [r for r in caplog.records if r.name == "asyncio"]


def test_who_leaves_its_answers_unread_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_bounds, "ANSWER_S", 0.2)
    with site() as made, _connect(made) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        raw.settimeout(0.5)
        with suppress(TimeoutError, ConnectionResetError, BrokenPipeError):
            for _ in range(5_000):
                raw.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n")
        eventually(lambda: _refused(made, "slow_reader") == 1, "closed and counted")
        with _connect(made) as other:
            other.sendall(_post(_event(1)))
            assert other.recv(4_096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\nx", 400),
        (b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: 9%s\r\n\r\nx" % (b"9" * 40), 400),
        (b"POST /v1/events HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nxx", 400),
        (b"POST /v1/events HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (b"POST /v1/events?\0 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"POST /v1/events HTTP/1.1\r\n\r\n", 400),
        (b"POST /v1/events HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 1_000_000, 400),
        (CHUNKED + b"1;" + b"a" * 1_000_000, 400),
        (CHUNKED + b"10000\r\n" + b" " * 65_536 + (b"\r\n10000\r\n" + b" " * 65_536) * 300, 413),
        (_post(gzip.compress(b" " * 100_000_000), b"Content-Encoding: gzip"), 413),
    ],
    ids=["negative", "huge", "two", "coding", "nul", "no host", "header", "extension", "endless", "bomb"],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(made: Site, sent: bytes, status: int) -> None:
    answer = _whole(made, sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status) or not answer
    counted = _refused(made, "no_http" if status == 400 else "http_413")
    assert counted >= 1
    good = _whole(made, _post(_event(2_000), b"Connection: close"))
    assert b'"appended"' in good, "others are served"


def test_requests_in_one_write_are_all_answered_in_their_order(made: Site) -> None:
    sent = b"".join(_post(_event(3_000 + number)) for number in range(50))
    assert _whole(made, sent + _post(b"[]", b"Connection: close")).count(b'"appended":1') == 50


def test_what_a_client_sent_before_it_left_counts_once(made: Site) -> None:
    for _ in range(2):
        with _connect(made) as raw:
            raw.sendall(_post(_event(4_000)))
    eventually(lambda: made.ids().count("e4000") == 1, "taken")
    assert b'"repeated":1' in _whole(made, _post(_event(4_000), b"Connection: close"))
