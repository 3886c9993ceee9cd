"""What the tests of ingest share: a project, a clock that is turned by hand, a log that fails on purpose."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from random import Random
from typing import Any

import msgpack

from headrace.contract.config import IngestConfig
from headrace.contract.errors import Overloaded
from headrace.contract.formats.dead_letters import DeadLetter, decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, Punctuation, decode_batch, decode_punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Delivered
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Counter as Windowed
from headrace.contract.spec import FeatureSpec
from headrace.ingest.decode.message import Message
from headrace.ingest.forward.protocol import read_message
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.late_events import LateEvents

PROJECT = Project(
    impression=ImpressionType(
        tag="shop.impression",
        key="user_id",
        fields={"user_id": "int64", "item_id": "int64", "price": "float64", "title": "string", "new": "bool"},
    ),
    feedback=(
        FeedbackType(name="click", tag="shop.click", fields={"item_id": "int64"}),
        FeedbackType(name="order", tag="shop.order", unknown="refuse"),
    ),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(counters=(Windowed(name="user", key="user_id"),)),
).checked()
START_MS = 1_700_000_000_000
NOT_LATE = LateEvents(2**50)
"""For tests whose events are of other years than their clocks."""


def dependencies(producer: Any, metrics: Any, clock: Any, **changes: Any) -> GatewayDependencies:
    """Return what a gateway of `PROJECT` is made from, with some of it changed."""
    usual = {"project": PROJECT, "config": IngestConfig(), "topics": Topics(), "partitions": 4}
    return GatewayDependencies(producer=producer, metrics=metrics, clock=clock, **{**usual, **changes})


class HandClock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.ms = START_MS

    def now_ms(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000

    def sleep(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


class Counts:
    """Metrics as plain numbers."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        self.totals[":".join((name, *filter(None, labels.values())))] += int(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self.totals[name] = int(value)

    def observe(self, name: str, value: float) -> None:
        pass


class ShakyLog:
    """A producer whose queue fills, whose receipts come late, whose broker refuses or takes and denies it."""

    def __init__(self, random: Random, *, fault: float = 0.0) -> None:
        self._random, self._fault = random, fault
        self.records: defaultdict[str, list[tuple[int, bytes, dict[str, str]]]] = defaultdict(list)
        self._queue: deque[tuple[str, int, bytes, dict[str, str], Delivered | None]] = deque()
        self.away = False

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        if len(self._queue) >= 50 or self._random.random() < self._fault / 2:
            raise Overloaded("the local queue is full")
        self._queue.append((topic, partition, value or b"", dict(headers or {}), delivered))

    def poll(self, timeout_s: float) -> None:
        if self.away:
            return
        for _ in range(len(self._queue) if self._fault == 0 else self._random.randint(0, len(self._queue))):
            topic, partition, value, headers, delivered = self._queue.popleft()
            error = RuntimeError("timed out") if self._random.random() < self._fault else None
            if error is None or self._random.random() < 0.5:
                self.records[topic].append((partition, value, headers))
            if delivered is not None:
                delivered(error, -1 if error else len(self.records[topic]) - 1)

    def flush(self, timeout_s: float) -> int:
        self.poll(timeout_s)
        return len(self._queue)

    def close(self) -> None:
        pass

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return every appended event in order, with its partition, `kind` and, for feedback, `type`."""
        found = []
        for partition, value, headers in self.records["events"]:
            if headers["kind"] != PUNCTUATION and kind in (None, headers["kind"], headers.get("type")):
                mark = {"_partition": partition, "_kind": headers["kind"], "_type": headers.get("type")}
                found.extend(row | mark for row in decode_batch(value).to_pylist())
        return found

    def promises(self) -> list[tuple[int, int, Punctuation]]:
        """Return (place in the log, partition, punctuation)."""
        return [
            (at, partition, decode_punctuation(value))
            for at, (partition, value, headers) in enumerate(self.records["events"])
            if headers["kind"] == PUNCTUATION
        ]

    def letters(self) -> list[DeadLetter]:
        return [decode_dead_letter(value) for _, value, _ in self.records["dead-letters"]]


def message(tag: str, records: list[Any], chunk: str | None = None, at_s: int = START_MS // 1000) -> Message:
    """Return what a shipper's forward message says."""
    option = {} if chunk is None else {"chunk": chunk}
    wire = msgpack.packb([tag, [[at_s, record] for record in records], option])
    return read_message(wire, 1 << 20)


def impression(number: int, **more: Any) -> dict[str, Any]:
    """Return a good impression."""
    return {"event_id": f"e{number}", "request_id": f"r{number}", "user_id": number % 7, "item_id": number, **more}
