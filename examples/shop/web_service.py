"""The demo shop's web service: it asks for scores, shows, logs what it showed, and logs what the visitor did.

For each visit, in event-time order at `rate` a second:

1. Ask serving to rank. Without an answer the page is shown all the same, and logged without a version.
2. Log the impression, stamped now, with the answer's version and the token of what was served.
3. After the visitor's delay, log the click, if there is one, and the dwell when the visitor leaves the video.

Event ids come from the run's id and the row number. `progress` keeps the lowest row that is not done yet: after a
kill -9 the shop goes on from there, and what it says again has the same ids, which the pipeline drops.
"""

from __future__ import annotations

import heapq
import http.client
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace.contract.errors import Overloaded
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.contract.project import FeedbackType, Project
from headrace.examples.shop.freshness import Freshness
from headrace.examples.shop.traffic import Given, Traffic, Visit
from headrace.process.background import Background
from headrace.process.kept_connection import KeptConnection
from headrace.sender import Sender

logger = logging.getLogger("headrace.shop")

Log = Callable[[str, dict[str, Any]], bool]
"""Gives one event (tag, record) to the shipper, which keeps it on disk until the gateway has it. False: not taken."""

CANDIDATE = ("video_id", "author_id", "duration_ms", "video_type", "upload_type", "music_id", "tag")
"""Fields of what is shown; all others belong to the request and its user."""

THREADS = 4
TURN_S = 0.005
SAVE_S = 0.5
# 0.5 s: a page that waits longer for its order is shown without one.
ANSWER_S = 0.5
AWAY_S = 0.2


class Answer(msgspec.Struct, frozen=True):
    """What the shop reads of `POST /v1/rank`'s answer."""

    version: str = ""
    scores: list[float] = []
    served: list[str] = []


class Progress(msgspec.Struct, frozen=True):
    """Where to go on: every row below `row` of `run` is done, its feedback included."""

    run: str
    row: int = 0


@dataclass
class Ranker:
    """Asks serving over one kept-alive connection; one a thread."""

    host: str
    port: int
    metrics: Metrics
    _away_until: float = 0.0

    def __post_init__(self) -> None:
        self._connection = KeptConnection(self.host, self.port, ANSWER_S)

    def ask(self, request_id: str, visit: Visit) -> Answer | None:
        """Return the answer, or None where serving is away, refuses, or is slower than `ANSWER_S`."""
        if time.monotonic() < self._away_until:
            return None
        candidate = {name: visit.fields[name] for name in CANDIDATE if name in visit.fields}
        context = {name: value for name, value in visit.fields.items() if name not in candidate}
        body = msgspec.json.encode({"request_id": request_id, "context": context, "candidates": [candidate]})
        begin = time.perf_counter()
        try:
            status, data = self._connection.post("/v1/rank", body, {"Content-Type": "application/json"})
            if status != 200:
                raise http.client.HTTPException(f"status {status}")
            answer = msgspec.json.decode(data, type=Answer)
        except (OSError, http.client.HTTPException, msgspec.DecodeError):
            self.metrics.add("errors_total", kind="rank")
            self.close()
            self._away_until = time.monotonic() + AWAY_S
            return None
        self.metrics.add("requests_total")
        self.metrics.observe("request_seconds", time.perf_counter() - begin)
        return answer

    def close(self) -> None:
        """Let the connection go; the next `ask` opens another."""
        self._connection.close()


@dataclass(kw_only=True)
class Shop:
    """One shop's state between turns. `log` is called by the thread of `run` alone."""

    project: Project
    traffic: Traffic
    rate: float
    log: Log
    metrics: Metrics
    clock: Clock
    progress: Path
    host: str
    port: int
    stop: threading.Event
    freshness: Freshness | None = None
    background: Background = field(default_factory=Background)
    shown: queue.Queue[tuple[Visit, Answer | None]] = field(default_factory=lambda: queue.Queue(256))
    asked: queue.Queue[Visit | None] = field(default_factory=lambda: queue.Queue(64))
    coming: list[tuple[int, int, str, dict[str, Any]]] = field(default_factory=list)
    """Feedback to come, a heap by (due time in ms, row, name)."""
    open_rows: dict[int, int] = field(default_factory=dict)
    """How many events are still to be logged of each row that is not done; one whose event was not taken stays here,
    and the next start shows it again."""
    run_id: str = ""
    next_row: int = 0

    def run(self) -> None:
        """Serve visits until `stop` is set; after the last row say so and idle."""
        saved = load_progress(self.progress)
        self.run_id, self.next_row = saved.run, saved.row
        logger.info("run %s from row %d of %s at %g/s", saved.run, saved.row, self.traffic.label, self.rate)
        threads = [self.background.thread(f"ask-{i}", self._ask) for i in range(THREADS)]
        visits, due, saved_at, said = self.traffic.visits(saved.row), time.monotonic(), 0.0, False
        while not self.stop.is_set():
            self.background.check()
            due = self._admit(visits, due)
            self._show()
            self._answer()
            if time.monotonic() - saved_at > SAVE_S:
                save_progress(self.progress, Progress(self.run_id, self._done_below()))
                saved_at = time.monotonic()
            if not said and self.next_row >= len(self.traffic) and not self.open_rows:
                logger.info("all %d rows are shown; idle. `headrace clean` begins afresh", len(self.traffic))
                said = True
        save_progress(self.progress, Progress(self.run_id, self._done_below()))
        for _ in threads:
            self._offer(None)

    def _admit(self, visits: Iterator[Visit], due: float) -> float:
        """Queue the visits that are due and return when the next one is; a delay is not made up for by a burst."""
        now = time.monotonic()
        due = max(due, now - 20 * TURN_S)
        while due <= now and not self.asked.full():
            visit = next(visits, None)
            if visit is None:
                return now
            self.open_rows[visit.row] = 1
            self.next_row = visit.row + 1
            self.asked.put(visit)
            due += 1 / self.rate
        return due

    def _ask(self) -> None:
        ranker = Ranker(self.host, self.port, self.metrics)
        while (visit := self.asked.get()) is not None:
            self.shown.put((visit, ranker.ask(self._request_id(visit.row), visit)))
        ranker.close()

    def _show(self) -> None:
        """Log what was shown, and remember its feedback. Waits at most `TURN_S`."""
        try:
            item = self.shown.get(timeout=TURN_S)
            while True:
                self._impression(*item)
                item = self.shown.get_nowait()
        except queue.Empty:
            return

    def _impression(self, visit: Visit, answer: Answer | None) -> None:
        now_ms, request_id = self.clock.now_ms(), self._request_id(visit.row)
        envelope = {"event_id": request_id, "request_id": request_id, "place": 0, "event_time_ms": now_ms}
        record: dict[str, Any] = {**envelope, **visit.fields}
        if answer is not None:
            record["version"] = answer.version
            if self.freshness is not None:
                self.freshness.answered(answer.version)
            record |= {"served": answer.served[0]} if answer.served else {}
        if not self.log(self.project.impression.tag, record):
            return
        self.metrics.add("events_appended_total", kind="impression")
        declared = {feedback.name for feedback in self.project.feedback}
        for given in (given for given in visit.feedback if given.name in declared):
            self.open_rows[visit.row] += 1
            record = feedback_record(self.project, visit, given, request_id)
            heapq.heappush(self.coming, (now_ms + given.delay_ms, visit.row, given.name, record))
        self._logged(visit.row)

    def _answer(self) -> None:
        while self.coming and self.coming[0][0] <= self.clock.now_ms():
            _, row, name, record = heapq.heappop(self.coming)
            if not self.log(_declared(self.project, name).tag, {**record, "event_time_ms": self.clock.now_ms()}):
                continue
            if self.freshness is not None and any(task.feedback == name for task in self.project.tasks):
                self.freshness.clicked(record["event_id"])
            self.metrics.add("events_appended_total", kind="feedback")
            self._logged(row)

    def _logged(self, row: int) -> None:
        """Take one event of a row as done."""
        self.open_rows[row] -= 1
        if not self.open_rows[row]:
            del self.open_rows[row]

    def _offer(self, visit: Visit | None) -> None:
        try:
            self.asked.put(visit, timeout=ANSWER_S)
        except queue.Full:
            return

    def _done_below(self) -> int:
        return min(self.open_rows, default=self.next_row)

    def _request_id(self, row: int) -> str:
        return f"{self.run_id}-{row}"


def waiting_log(sender: Sender, stop: threading.Event, *, wait_s: float = 1.0) -> Log:
    """Return a log that waits while the spool is full, until `stop`: the shop slows down and loses no event."""

    def log(tag: str, record: dict[str, Any]) -> bool:
        while True:
            try:
                return sender.emit(tag, record)
            except Overloaded as error:
                logger.warning("%s", error)
                if stop.wait(wait_s):
                    return False

    return log


def feedback_record(project: Project, visit: Visit, given: Given, request_id: str) -> dict[str, Any]:
    """Return one feedback without its time: its facts, and the impression's fields that its type repeats."""
    names = {project.impression.key, *_declared(project, given.name).fields}
    told = {name: visit.fields[name] for name in names if name in visit.fields} | given.facts
    return {**told, "event_id": f"{request_id}/{given.name}", "request_id": request_id, "place": 0}


def _declared(project: Project, name: str) -> FeedbackType:
    return next(feedback for feedback in project.feedback if feedback.name == name)


def load_progress(path: Path) -> Progress:
    """Return the saved progress, or a new run where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        fresh = Progress(uuid.uuid4().hex[:12])
        save_progress(path, fresh)
        return fresh


def save_progress(path: Path, progress: Progress) -> None:
    """Replace the file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(progress))
    draft.replace(path)
