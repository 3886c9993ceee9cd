"""Goal: a bad deploy is stopped at the gateway's door with a clear alert, nothing is lost, and good tags go on.

Method: a real server on loopback sockets with the watch as its companion, a log in memory, shippers that keep what is
not acked and send it again.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gateway_world import Running, ended, eventually, frame, read_value
from ingest_world import Counts, impression

from headrace.ingest.dead_letters.ceiling_watch import CeilingWatch
from headrace.sender import Sender

LIMITS: dict[str, Any] = {"dead_letter_events_min": 40, "dead_letter_probe_ms": 400}
GOOD = {"request_id": "r", "user_id": 1, "item_id": 1}
BAD = {**GOOD, "item_id": "seven"}


class Probe:
    """What /readyz would say."""

    def __init__(self) -> None:
        self.told: list[tuple[bool, str]] = [(True, "")]
        self.metrics = Counts()
        self.watch = CeilingWatch(self.metrics, lambda is_ready, why: self.told.append((is_ready, why)))

    @property
    def last(self) -> tuple[bool, str]:
        return self.told[-1]


def send(sock: socket.socket, tag: str, records: list[Any], chunk: str) -> None:
    sock.sendall(frame(records, chunk, tag))


def shut(gateway: Running, tag: str, record: dict[str, Any]) -> None:
    """Send bad events until the ceiling is reached; they are taken, as dead letters."""
    with gateway.connect() as sock:
        send(sock, tag, [record] * 41, "first")
        assert read_value(sock) == {"ack": "first"}


def ship(gateway: Running, tag: str, records: list[Any], chunk: str) -> int:
    """Send a chunk as shippers do, on a new connection until it is acked; return how many times it took."""
    for times in range(1, 100):
        with gateway.connect() as sock:
            send(sock, tag, records, chunk)
            if read_value(sock) == {"ack": chunk}:
                return times
    raise AssertionError("never acked")


def test_a_bad_deploy_is_stopped_told_and_taken_again_once_it_is_corrected(caplog: pytest.LogCaptureFixture) -> None:
    probe = Probe()
    with (
        caplog.at_level(logging.INFO),
        Running(companions=[probe.watch], **LIMITS | {"dead_letter_probe_ms": 60_000}) as gateway,
    ):
        shut(gateway, "shop.click", BAD)
        eventually(lambda: not probe.last[0], "red")
        why = probe.last[1]
        assert "100% of the events of tag shop.click are refused, most as bad_type" in why
        assert "headrace dead-letters list --reason bad_type" in why and why in caplog.text
        assert probe.metrics.totals["dead_letter_ceiling_shut"] == 1
        with gateway.connect() as sock:
            send(sock, "shop.click", [BAD] * 5, "bad")
            send(sock, "shop.impression", [impression(1)], "good")
            assert read_value(sock) == {"ack": "good"}, "what came along is taken and acked"
            assert ended(sock), "and the shipper is told by the end of the connection, not left waiting"
        assert gateway.refused("dead_letter_ceiling") == 1
        assert gateway.counts.totals["events_refused_total:shop.click"] == 5
        assert len(gateway.log.letters()) == 41
    probe = Probe()
    with Running(companions=[probe.watch], **LIMITS) as gateway:
        shut(gateway, "shop.click", BAD)
        eventually(lambda: not probe.last[0], "red")
        assert ship(gateway, "shop.click", [GOOD], "corrected") >= 1
        eventually(lambda: probe.last == (True, ""), "green again by itself")
        assert ship(gateway, "shop.click", [BAD], "late") == 1, "and what shippers still hold is taken"
        assert len(gateway.log.letters()) == 42 and len(gateway.log.rows()) == 1
        assert probe.metrics.totals["dead_letter_ceiling_shut"] == 0


def test_one_misconfigured_shipper_stops_neither_good_events_nor_the_load_balancer() -> None:
    probe = Probe()
    with Running(companions=[probe.watch], **LIMITS | {"dead_letter_probe_ms": 60_000}) as gateway:
        shut(gateway, "syslog", {"line": "hello"})
        eventually(lambda: "such as syslog" in probe.last[1], "told")
        assert probe.last[0], "ready: the pipeline misses nothing"
        with gateway.connect() as sock:
            send(sock, "kern", [{"line": "again"}], "bad")
            send(sock, "shop.impression", [impression(1)], "good")
            assert read_value(sock) == {"ack": "good"}
        assert gateway.counts.totals["events_refused_total:undeclared"] == 1


def test_what_asks_for_no_ack_is_taken_all_the_same() -> None:
    with Running(**LIMITS | {"dead_letter_probe_ms": 60_000}) as gateway:
        shut(gateway, "shop.click", BAD)
        with gateway.connect() as sock:
            sock.sendall(frame([BAD], None, "shop.click"))
            eventually(lambda: len(gateway.log.letters()) == 42, "its sender has forgotten it: refusing would lose it")


def test_a_chunk_that_was_taken_is_acked_again_though_its_tag_is_shut() -> None:
    with Running(**LIMITS | {"dead_letter_probe_ms": 60_000}) as gateway:
        # One frame for both: made twice, it is another chunk once a second has passed between them.
        first = frame([BAD] * 41, "first", "shop.click")
        for _ in range(2):
            with gateway.connect() as sock:
                sock.sendall(first)
                assert read_value(sock) == {"ack": "first"}
        assert len(gateway.log.letters()) == 41


def test_our_sender_keeps_what_is_refused_and_each_event_counts_once(tmp_path: Path) -> None:
    with Running(**LIMITS) as gateway:
        shut(gateway, "shop.click", BAD)
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path)
        for number in range(20):
            sender.emit("impression", impression(number))
            if number % 7 == 0:
                sender.emit("click", {**BAD, "event_id": f"bad{number}"})
        eventually(lambda: len(gateway.log.rows()) == 20, "good events go on beside it")
        eventually(lambda: sender.unacked == 0, "probe by probe the bad ones become dead letters")
        sender.close()
        letters = Counter(letter.event_id for letter in gateway.log.letters() if letter.event_id.startswith("bad"))
        assert letters == {"bad0": 1, "bad7": 1, "bad14": 1}
        assert gateway.ids() == sorted(f"e{number}" for number in range(20))
