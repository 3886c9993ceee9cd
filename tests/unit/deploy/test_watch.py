"""Goal: a stage that runs and does not work is restarted, and one that waits for a broker is not.

Method: a supervisor and probes in memory, and a clock turned by hand.
"""

from __future__ import annotations

import msgspec
import pytest

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.deploy.local.restarts import Crashes
from headrace.deploy.local.supervise import Process
from headrace.deploy.local.watch import RED_LOOKS, SILENT_S, Watch


class World:
    """A stage `train`, and `kafka`, which has no probes."""

    def __init__(self) -> None:
        self.now_s, self.pid, self.killed = 0.0, 10, list[str]()
        self.answer: tuple[int, bytes] = (200, b"alive\n")
        self.crashes, self.state = Crashes(), "running"
        self.metrics = MemoryMetrics()
        self.watch = Watch(self, {"train": "http://t"}, self.ask, self.metrics, lambda: self.now_s)

    def processes(self) -> list[Process]:
        train = Process("train", self.state, self.pid, 1, 1, "log", 5, crashes=msgspec.structs.replace(self.crashes))
        return [train, Process("kafka", "running", 3, 1, 1, "log", 5)]

    def kill(self, name: str) -> None:
        self.killed.append(name)

    def ask(self, url: str) -> tuple[int, bytes]:
        assert url == "http://t/healthz"
        return self.answer

    def look(self, times: int = 1, step_s: float = 2.0) -> None:
        for _ in range(times):
            self.watch.look()
            self.now_s += step_s

    def counted(self, name: str) -> float:
        return self.metrics.counters[name, "train"]  # type: ignore[index]


@pytest.fixture
def world() -> World:
    return World()


def test_a_red_healthz_restarts_the_stage_and_one_red_look_does_not(world: World) -> None:
    world.look(3)
    world.answer = (503, b"loop: no sign for 250 s\n")
    world.look(RED_LOOKS - 1)
    world.answer = (200, b"")
    world.look()
    assert not world.killed
    world.answer = (503, b"loop: no sign for 250 s\n")
    world.look(RED_LOOKS)
    assert world.killed == ["train"]
    assert world.counted("unhealthy_restarts_total") == 1


def test_a_stage_that_answers_no_more_is_restarted(world: World) -> None:
    world.look()
    world.answer = (0, b"timed out")
    world.look(int(SILENT_S / 2))
    assert not world.killed
    world.look(3)
    assert set(world.killed) == {"train"}


def test_time_in_which_the_watch_itself_stood_still_is_no_silence(world: World) -> None:
    world.look()
    world.answer = (0, b"timed out")
    for _ in range(3):
        world.look()
        world.now_s += 3_600.0
    assert not world.killed
    world.look(int(SILENT_S / 2))
    assert set(world.killed) == {"train"}


def test_a_stage_that_starts_for_long_is_left_alone(world: World) -> None:
    world.answer = (0, b"connection refused")
    world.look(1_000)
    assert not world.killed


def test_a_new_process_begins_with_a_clean_record(world: World) -> None:
    world.answer = (503, b"red")
    world.look(RED_LOOKS - 1)
    world.pid = 11
    world.look(RED_LOOKS - 1)
    assert not world.killed


def test_crashes_and_the_next_start_are_metrics(world: World) -> None:
    world.look()
    assert world.counted("process_crashes_total") == 0
    world.crashes, world.state, world.pid = Crashes(total=3, in_row=3, next_start_s=2.0), "backoff", 0
    world.look(2)
    gauges = world.metrics.gauges
    assert world.counted("process_crashes_total") == 3, "each crash counts once"
    assert gauges["process_crashes_in_row", "train"] == 3
    assert gauges["next_start_seconds", "train"] == 2.0
    assert gauges["process_up", "train"] == 0 and gauges["process_up", "kafka"] == 1
    world.crashes, world.state, world.pid = Crashes(total=1), "running", 12
    world.look()
    assert world.counted("process_crashes_total") == 4, "a supervisor that was started anew counts from 0"
    assert gauges["next_start_seconds", "train"] == 0.0
