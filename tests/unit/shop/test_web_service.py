"""The shop's loop.

Goal: each visit is logged once with deterministic ids, feedback follows its delay, a kill is made up for under the same
ids, and serving's absence stops nothing. Method: the shop against a list as the log and a port nobody hears.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.contract.errors import Overloaded
from headrace.contract.project import Project
from headrace.examples.shop import traffic, web_service
from headrace.examples.shop.shop import PROJECT
from headrace.process.background import Background


class _Clock:
    def now_ms(self) -> int:
        return int(time.time() * 1_000)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Metrics:
    def add(self, name: str, amount: float = 1.0, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float) -> None: ...


ROWS = traffic.synthetic(PROJECT.impression.fields, rows=120)
VISITS = list(ROWS.visits())
FEEDBACK = {(v.row, given.name): given for v in VISITS for given in v.feedback}
"""All that the visitors say, by row and name."""


def open_shop(
    path: Path,
    logged: list[tuple[str, dict[str, Any]]],
    until: int,
    project: Project = PROJECT,
    background: Background | None = None,
) -> None:
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
        shop = web_service.Shop(
            project=project,
            traffic=ROWS,
            rate=1_000.0,
            log=log,
            metrics=_Metrics(),
            clock=_Clock(),
            progress=path,
            host="127.0.0.1",
            port=port,
            stop=stop,
            background=background or Background(),
        )
        shop.run()


def test_every_visit_and_its_feedback_is_logged_once(tmp_path: Path):
    logged: list[tuple[str, dict[str, Any]]] = []
    open_shop(tmp_path / "shop.json", logged, len(ROWS) + len(FEEDBACK))
    ids = [record["event_id"] for _, record in logged]
    assert len(ids) == len(set(ids)) == len(ROWS) + len(FEEDBACK)
    shown = {r["request_id"]: r["event_time_ms"] for tag, r in logged if tag == PROJECT.impression.tag}
    names = {feedback.tag: feedback.name for feedback in PROJECT.feedback}
    said = set()
    for tag, record in logged:
        assert "version" not in record
        if tag in names:
            row = int(record["request_id"].rsplit("-", 1)[1])
            said.add((row, names[tag]))
            assert record["event_time_ms"] >= shown[record["request_id"]] + FEEDBACK[row, names[tag]].delay_ms
            assert record["event_id"] == f"{record['request_id']}/{names[tag]}"
    assert said == set(FEEDBACK)


def test_feedback_carries_what_its_type_declares_and_the_counters_need(tmp_path: Path):
    """A field that the log lacked would be null in every counter, and nobody would be told."""
    for visit in VISITS[:40]:
        for given in visit.feedback:
            declared = next(feedback for feedback in PROJECT.feedback if feedback.name == given.name)
            record = web_service.feedback_record(PROJECT, visit, given, "r")
            envelope = {"event_id", "request_id", "place", *({"value"} & set(given.facts))}
            assert set(record) - envelope == {PROJECT.impression.key, *declared.fields}


def test_a_project_without_dwells_is_told_of_clicks_alone(tmp_path: Path):
    logged: list[tuple[str, dict[str, Any]]] = []
    project = msgspec.structs.replace(PROJECT, feedback=PROJECT.feedback[:1])
    clicks = int(ROWS.clicked_N.sum())
    open_shop(tmp_path / "shop.json", logged, len(ROWS) + clicks, project)
    assert {tag for tag, _ in logged} == {PROJECT.impression.tag, PROJECT.feedback[0].tag}


def test_a_stopped_shop_goes_on_and_repeats_only_equal_ids(tmp_path: Path):
    logged: list[tuple[str, dict[str, Any]]] = []
    # By then the first rows' visitors have left; the longest dwells are still to come.
    open_shop(tmp_path / "shop.json", logged, len(ROWS) + len(FEEDBACK) - 30)
    first = len(logged)
    again: list[tuple[str, dict[str, Any]]] = []
    row = web_service.load_progress(tmp_path / "shop.json").row
    open_shop(tmp_path / "shop.json", again, len(ROWS) - row + sum(at >= row for at, _ in FEEDBACK))
    ids = {record["event_id"] for _, record in logged + again}
    assert first >= len(ROWS) and row > 0
    assert len(ids) == len(ROWS) + len(FEEDBACK)


class _FullSpool:
    """A sender that has no room for the first three events."""

    def __init__(self) -> None:
        self.refused, self.kept = 0, list[dict[str, Any]]()

    def emit(self, tag: str, record: dict[str, Any]) -> bool:
        if self.refused < 3:
            self.refused += 1
            raise Overloaded("the spool is full")
        self.kept.append(record)
        return True


def test_a_full_spool_slows_the_shop_and_loses_nothing():
    sender, stop = _FullSpool(), threading.Event()
    log = web_service.waiting_log(sender, stop, wait_s=0.001)
    assert log("shop.impression", {"request_id": "r"})
    assert (sender.refused, sender.kept) == (3, [{"request_id": "r"}])
    stop.set()
    assert not web_service.waiting_log(_FullSpool(), stop)("shop.impression", {}), "a shop that stops does not wait"


def test_a_thread_that_dies_ends_the_shop(tmp_path: Path):
    def dies() -> None:
        raise MemoryError("no memory")

    background = Background()
    background.thread("freshness", dies).join()
    with pytest.raises(MemoryError):
        open_shop(tmp_path / "shop.json", [], 1, background=background)
