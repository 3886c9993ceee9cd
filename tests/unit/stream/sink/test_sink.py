"""Goal: a lake that falls behind is told before the topic forgets. Method: the sink on a folder, a virtual clock."""

from __future__ import annotations

import asyncio
import logging
import math
from pathlib import Path

import pytest
from trainer_world import TOPICS, samples, send

from headrace.backends.clock import VirtualClock
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import Config
from headrace.stream.sink.stage import SinkStage

HOUR_S = 3_600


def test_what_is_not_stored_is_told_by_its_age_and_alarms_at_half_of_what_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    clock, metrics = VirtualClock(0), MemoryMetrics()
    memory = MemoryLog(clock.now_ms)
    memory.admin().ensure_topics(TOPICS.specs(1))
    after = send(memory, samples(1, 0, 6), after=(-1, -1))
    clock.advance(HOUR_S)
    send(memory, samples(1, 0, 6, offset=6), after=after)
    reader = memory.reader()
    reader.assign({(TOPICS.samples, 0): 0})
    records = reader.poll(10, 0.0)
    stage = SinkStage(Config(), DeltaLake(str(tmp_path / "lake"), partitions=1), metrics, clock)

    def behind_ms() -> float:
        stage.look_behind()
        return metrics.gauges["behind_ms", ""]

    async def work() -> None:
        await stage.begin(0)
        assert behind_ms() == 0
        await stage.take(records[0])
        assert behind_ms() == HOUR_S * 1_000
        await stage.take(records[1])
        clock.advance(HOUR_S)
        assert behind_ms() == 2 * HOUR_S * 1_000  # since the first of them
        clock.advance(82 * HOUR_S)
        assert (behind_ms(), caplog.records) == (84 * HOUR_S * 1_000, [])  # half of seven days, and not more
        clock.advance(1)
        behind_ms()
        behind_ms()
        assert ["84.0 h behind" in r.getMessage() for r in caplog.records] == [True]  # once a minute
        await stage.finish()
        assert behind_ms() == 0
        clock.advance(HOUR_S)
        stage.drop({0})
        assert behind_ms() == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())


@pytest.mark.parametrize(("kept_ms", "alarms"), [(2 * HOUR_S * 1_000, True), (20 * HOUR_S * 1_000, False), (-1, False)])
def test_the_alarm_goes_by_what_the_broker_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept_ms: int, alarms: bool
):
    clock = VirtualClock(0)
    memory = MemoryLog(clock.now_ms)
    memory.admin().ensure_topics(TOPICS.specs(1))
    send(memory, samples(1, 0, 6), after=(-1, -1))
    lake = DeltaLake(str(tmp_path / "lake"), partitions=1)
    stage = SinkStage(Config(), lake, MemoryMetrics(), clock, kept_ms=kept_ms)
    reader = memory.reader()
    reader.assign({(TOPICS.samples, 0): 0})

    async def work() -> None:
        await stage.begin(0)
        await stage.take(reader.poll(10, 0.0)[0])
        clock.advance(2 * HOUR_S)
        stage.look_behind()

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())
    assert bool(caplog.messages) == alarms


def test_an_age_that_nobody_knows_is_not_none(tmp_path: Path):
    """What the sink holds has an age; whether something waits in a log that tells no ends, nobody knows."""

    class Silent:
        def lag(self) -> float:
            return math.nan

        def oldest_unread_ms(self) -> int | None:
            return None

    clock, metrics = VirtualClock(5_000), MemoryMetrics()
    stage = SinkStage(Config(), DeltaLake(str(tmp_path / "lake"), partitions=1), metrics, clock)
    stage.engine = Silent()  # type: ignore[assignment]
    stage.look_behind()
    assert math.isnan(metrics.gauges["behind_ms", ""])
    stage._since_ms[0] = 2_000
    stage.look_behind()
    assert metrics.gauges["behind_ms", ""] == 3_000
