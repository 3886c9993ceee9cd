"""Goal: lag and age come from the log itself, so that a stage that stands still shows. Method: a log in memory."""

from __future__ import annotations

import math

import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.log import TopicSpec
from headrace.stream.shell import log_ends
from headrace.stream.shell.log_ends import KNOWN_S, STILL_LOOKS_MAX, LogEnds

T = "samples"


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock(1_000)
        self.log = MemoryLog(self.clock.now_ms)
        self.log.admin().ensure_topics([TopicSpec(T, 2)])
        self.taken: dict[int, int | None] = {0: 0, 1: 0}
        self.reader = self.log.reader()
        self.ends = LogEnds(T, self.log.reader, lambda: self.taken)

    def append(self, partition: int) -> None:
        self.log.append(T, partition, b"", None, {})
        self.clock.advance(1.0)

    def look(self) -> tuple[float, int | None]:
        self.ends.read(self.reader)
        self.ends.look()
        return self.ends.lag(self.taken), self.ends.oldest_ms


def test_what_nobody_takes_is_counted_and_has_an_age() -> None:
    world = World()
    assert world.look() == (0, None)
    world.append(1)
    world.append(1)
    world.append(0)
    assert world.look() == (3, 1_000)
    world.taken[1] = 1
    assert world.look() == (2, 3_000), "partition 1 moves, partition 0 stands before its first record"
    world.taken = {0: 1, 1: 2}
    assert world.look() == (0, None)


def test_a_partition_from_which_no_record_came_yet_is_counted_from_the_topics_first() -> None:
    world = World()
    world.taken = {0: None, 1: 0}
    world.append(0)
    world.append(0)
    assert world.look()[0] == 2
    world.log.trim(T, 0, 1)
    for _ in range(STILL_LOOKS_MAX + 1):
        assert world.look()[0] == 1
    with pytest.raises(Unavailable, match=r"samples/0 has been at offset 1 for 305 s and the log goes on to 2"):
        world.look()


def test_a_partition_that_stands_still_before_a_record_stops_the_stage_after_a_bound() -> None:
    world = World()
    world.look()
    world.append(0)
    for _ in range(STILL_LOOKS_MAX):
        world.look()
    with pytest.raises(Unavailable, match=r"samples/0 has been at offset 0 for 305 s and the log goes on to 1"):
        world.look()
    world.taken[0] = 1
    assert world.look() == (0, None)


def test_the_marker_of_a_transaction_is_nothing_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_ends, "READ_S", 0.0)  # else every look waits for the record that never comes
    world = World()
    world.look()
    world.log.mark(T, 0)
    for _ in range(STILL_LOOKS_MAX + 2):
        assert world.look()[1] is None


def test_a_reader_that_cannot_be_opened_stops_the_stage() -> None:
    def refuses() -> None:
        raise MemoryError("malloc")

    ends = LogEnds(T, refuses, dict)
    ends._run()
    with pytest.raises(MemoryError):
        ends.look()


def test_what_no_look_has_told_lately_is_not_known_and_never_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    now_s = [100.0]
    monkeypatch.setattr(log_ends, "awake_s", lambda: now_s[0])
    assert math.isnan(world.ends.lag(world.taken))
    world.append(0)
    assert world.look()[0] == 1
    now_s[0] += KNOWN_S
    assert world.ends.lag(world.taken) == 1
    now_s[0] += 0.1
    assert math.isnan(world.ends.lag(world.taken)), "the broker has not answered since"
    assert world.look()[0] == 1
