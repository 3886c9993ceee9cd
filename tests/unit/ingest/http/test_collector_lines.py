"""Goal: lines of an access log that come over HTTP are events, all of a request or none, each line read once.

Method: a running collector with a mapping; the mapper counts the messages that it reads.
"""

from __future__ import annotations

import httpx
import pytest
from access_log_world import CLF, project
from collector_world import Site, site

from headrace.ingest.decode.message import Message
from headrace.ingest.sources.access_log_events import Mapped, Mapper


def send(made: Site, *requests: str, key: str = "") -> httpx.Response:
    lines = [f'203.0.113.9 - - [{CLF}] "{request}" 200 51 "-" "curl"' for request in requests]
    events = [{"tag": "nginx.access", "time": "2026-03-01T12:34:56Z", "log": line} for line in lines]
    return httpx.post(f"{made.url}/v1/events", json=events, headers={"Idempotency-Key": key} if key else {})


def test_each_line_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Mapper.map_message

    def counted(self: Mapper, message: Message) -> Mapped:
        read.append(message.tag)
        return real(self, message)

    monkeypatch.setattr(Mapper, "map_message", counted)
    with site(project=project()) as made:
        answer = send(made, "GET /item/7?uid=3&rid=r1 HTTP/1.1", "GET /favicon.ico HTTP/1.1")
        assert answer.json() == {"appended": 1, "dead_lettered": 0, "repeated": 0}
        assert read == ["nginx.access"]
        assert made.metrics.total("lines_skipped_total") == 1


def test_lines_beyond_the_ceiling_are_refused_whole_and_their_tag_is_named_once() -> None:
    with site(project=project(), dead_letter_events_min=20, dead_letter_probe_ms=60_000) as made:
        assert send(made, *["GET /item/7?uid=none&rid=r1 HTTP/1.1"] * 30).json()["dead_lettered"] == 30
        answer = send(made, "GET /item/7?uid=3&rid=r2 HTTP/1.1", "GET /favicon.ico HTTP/1.1")
        assert answer.status_code == 503 and answer.json()["error"].count("nginx.access") == 1
        assert made.ids() == [] and made.metrics.total("lines_skipped_total") == 0, "refused lines are not skipped ones"
