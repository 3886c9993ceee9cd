"""The shop's loop.

Goal: each visit is logged once with deterministic ids, clicks follow their delay, a kill is made up for under the
same ids, and serving's absence stops nothing. Method: the shop against a list as the log and a port nobody hears.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

from headrace.examples.shop import run, traffic
from headrace.examples.shop.shop import PROJECT


class _Clock:
    def now_ms(self) -> int:
        return int(time.time() * 1_000)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Metrics:
    def add(self, name: str, amount: float = 1.0, *, reason: str = "") -> None: ...

    def set(self, name: str, value: float, *, reason: str = "") -> None: ...

    def observe(self, name: str, value: float) -> None: ...


ROWS = traffic.synthetic(PROJECT.impression.fields, rows=120)


def open_shop(path: Path, logged: list[tuple[str, dict[str, Any]]], until: int) -> None:
    """Run the shop until `until` events are logged."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        stop = threading.Event()

        def log(tag: str, record: dict[str, Any]) -> bool:
            logged.append((tag, record))
            if len(logged) >= until:
                stop.set()
            return True

        port = unheard.getsockname()[1]
        shop = run.Shop(PROJECT, ROWS, 1_000.0, log, _Metrics(), _Clock(), path, "127.0.0.1", port, stop)
        shop.run()


def test_every_visit_and_click_is_logged_once(tmp_path: Path):
    logged: list[tuple[str, dict[str, Any]]] = []
    clicks = int(ROWS.clicked_N.sum())
    open_shop(tmp_path / "shop.json", logged, len(ROWS) + clicks)
    ids = [record["event_id"] for _, record in logged]
    assert len(ids) == len(set(ids)) == len(ROWS) + clicks
    shown = {r["request_id"]: r["event_time_ms"] for tag, r in logged if tag == PROJECT.impression.tag}
    for tag, record in logged:
        assert "version" not in record
        if tag == PROJECT.feedback[0].tag:
            row = int(record["request_id"].rsplit("-", 1)[1])
            assert record["event_time_ms"] >= shown[record["request_id"]] + ROWS.delay_ms_N[row]


def test_a_stopped_shop_goes_on_and_repeats_only_equal_ids(tmp_path: Path):
    logged: list[tuple[str, dict[str, Any]]] = []
    open_shop(tmp_path / "shop.json", logged, 60)
    first = len(logged)
    clicks = int(ROWS.clicked_N.sum())
    again: list[tuple[str, dict[str, Any]]] = []
    row = run.load_progress(tmp_path / "shop.json").row
    open_shop(tmp_path / "shop.json", again, len(ROWS) - row + int(ROWS.clicked_N[row:].sum()))
    ids = {record["event_id"] for _, record in logged + again}
    assert first >= 60 and row > 0
    assert len(ids) == len(ROWS) + clicks
