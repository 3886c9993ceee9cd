"""Goal: serving's memory knows when it has read all counters that there were, and never by silence.
Method: the log in memory, with a marker behind the last record, and a reader that is slow to give it."""

from __future__ import annotations

import threading

import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog, MemoryReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.log import TopicSpec
from headrace.serving.features import FeatureMemory


class Slow(MemoryReader):
    """Gives nothing in the first polls; ends the loop after the last of `polls`."""

    def __init__(self, log: MemoryLog, memory: FeatureMemory, stop: threading.Event, polls: int) -> None:
        super().__init__(log)
        self.memory, self.stop, self.left = memory, stop, polls
        self.seen: list[bool] = []

    def poll(self, records_max: int, timeout_s: float):
        self.seen.append(self.memory.is_caught_up)
        self.left -= 1
        if self.left == 0:
            self.stop.set()
        return super().poll(records_max, 0.0) if self.left < 3 else []


def test_silence_is_not_the_end_and_a_marker_is_no_record_to_wait_for():
    log = MemoryLog(lambda: 0)
    log.admin().ensure_topics([TopicSpec("features", 1)])
    log.append("features", 0, b'{"as_of_ms": 7, "epoch": 1, "buckets": {}}', b"clicks/1", {})
    log.mark("features", 0)
    memory, stop = FeatureMemory(), threading.Event()
    reader = Slow(log, memory, stop, polls=6)
    memory.follow(reader, "features", stop, clock=VirtualClock(), metrics=MemoryMetrics())
    assert reader.seen == [False, False, False, False, True, True]
    assert memory.watermark_ms == 7


class Hasty(threading.Event):
    """Nobody waits for it."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


class Timed(MemoryReader):
    """Every poll takes 0.5 s of the virtual clock. `plan` says of each whether the broker answers, and how far."""

    def __init__(self, log: MemoryLog, memory: FeatureMemory, clock: VirtualClock, plan: str) -> None:
        super().__init__(log)
        self.memory, self.clock, self.plan = memory, clock, list(plan)
        self.stop, self.seen, self.log = Hasty(), [], log

    def poll(self, records_max: int, timeout_s: float):
        self.clock.advance(0.5)
        self.seen.append(self.memory.state(self.clock.monotonic(), 2.0)[0])
        now = self.plan.pop(0)
        if not self.plan:
            self.stop.set()
        if now == "a":
            raise Unavailable("no broker")
        self.log.append("features", 0, b'{"as_of_ms": 7, "epoch": 1, "buckets": {}}', b"clicks/1", {})
        return super().poll(10, 0.0) if now == "r" else []


@pytest.mark.parametrize(
    ("plan", "seen"),
    [
        ("rrrrrrrr", "rccccccc"),
        ("nnnrrrrr", "rrrrbccc"),  # it waits, and knows that it is current when it has asked again
        ("aaaaaaaa", "rrrrruuu"),  # 2 s without a broker, from the first failure on
        ("rraaaaaarrrrr", "rccccccssbccc"),  # it was read once: it is stale, and current again
        ("rrrnnnnnnnrrrr", "rcccccbbbbbbcc"),  # the broker answers, the process does not keep up
    ],
)
def test_it_knows_how_far_it_is(plan: str, seen: str):
    log, clock, memory = MemoryLog(lambda: 0), VirtualClock(), FeatureMemory()
    log.admin().ensure_topics([TopicSpec("features", 1)])
    log.append("features", 0, b'{"as_of_ms": 7, "epoch": 1, "buckets": {}}', b"clicks/1", {})
    reader = Timed(log, memory, clock, plan)
    memory.follow(reader, "features", reader.stop, clock=clock, metrics=MemoryMetrics())
    assert "".join(reader.seen) == seen


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"\xff", b"{}"), (b"item/3", b"{"), (b"item/3", b"\xff"), (b"external/x", b"{}"), (b"external/", b""),
        (b"item/1", b'{"as_of_ms": 9, "epoch": 9, "buckets": {"x": [1]}}'), (None, b"{}"), (b"", b"[]"),
    ],
)  # fmt: skip
def test_a_foreign_record_is_counted_skipped_and_changes_nothing(key: bytes | None, value: bytes):
    log, clock, memory, metrics = MemoryLog(lambda: 0), VirtualClock(), FeatureMemory(), MemoryMetrics()
    log.admin().ensure_topics([TopicSpec("features", 1)])
    log.append("features", 0, value, key, {})
    log.append("features", 0, b'{"as_of_ms": 7, "epoch": 1, "buckets": {}}', b"clicks/1", {})
    reader = Timed(log, memory, clock, "rr")
    memory.follow(reader, "features", reader.stop, clock=clock, metrics=metrics)
    assert memory.watermark_ms == 7 and metrics.counters["records_unreadable_total", "features foreign"] == 1
