"""Goal: the archive has what lay in `events`, and says what it has not. Method: the archive's writer on a log in memory
and a real Delta table, a virtual clock; what it stored is compared with the topic record by record."""

from __future__ import annotations

import asyncio
import logging
import math
from pathlib import Path
from random import Random

import pytest
from archive_world import EVENTS, HOUR_MS, TOPICS, append, in_archive, in_topic, in_turn, new_archive, new_log, round_of

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ArchiveConfig
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.archive import Offsets
from headrace.contract.interfaces.log import VerbatimRecord
from headrace.process import waits
from headrace.stream.sink.archive import EventArchive

PARTITIONS, START_MS = 2, 1_795_564_800_000


class World:
    """One log, one archive, and processes that archive."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.random = folder, VirtualClock(START_MS), Random(7)
        self.log, self.metrics = new_log(self.clock, PARTITIONS), MemoryMetrics()
        self.stage = self.start()

    def archive(self) -> DeltaArchive:
        return new_archive(self.folder, self.clock, PARTITIONS, events_id=self.log.admin().topic_id(EVENTS))

    def start(self, config: ArchiveConfig | None = None, archive: DeltaArchive | None = None) -> EventArchive:
        """Return another process."""
        self.stage = EventArchive(
            *(config or ArchiveConfig(), EVENTS, archive or self.archive(), self.metrics, self.clock),
            open_reader=lambda: self.log.reader(verbatim=True),
            partitions=lambda: range(PARTITIONS),
            kept_ms=7 * 24 * HOUR_MS,
        )
        return self.stage

    def fill(self, records: int, partition: int = 0) -> None:
        for _ in range(records):
            append(self.log, partition, self.random)

    def archive_all(self) -> None:
        """Do rounds until nothing waits."""

        async def work() -> None:
            for _ in range(100):
                self.clock.advance(self.stage.config.commit_ms / 1_000)
                await round_of(self.stage)
                if not self.stage.is_busy or self.stage._refused:
                    return
            raise AssertionError("the archive does not come to its end")

        asyncio.run(work())

    def stored(self) -> dict[int, list[VerbatimRecord]]:
        return in_archive(self.archive())


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(waits, "in_thread", in_turn)
    caplog.set_level(logging.WARNING, "headrace.archive")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_records_are_archived_as_they_lay_over_hours_and_restarts(world: World):
    for _ in range(4):
        world.fill(30)
        world.fill(9, partition=1)
        world.archive_all()
        world.clock.advance(1_500)
        world.start()
    assert world.stored() == in_topic(world.log)
    assert world.metrics.counters["archived_records_total", ""] == 4 * 39


def test_where_nothing_came_nothing_is_written(world: World):
    world.archive_all()
    assert world.archive().state() is None
    world.fill(3)
    world.archive_all()
    version = world.archive().opened().version()
    for _ in range(3):
        world.archive_all()
    assert world.archive().opened().version() == version


def test_markers_of_transactions_take_offsets_and_leave_no_row(world: World):
    world.fill(2)
    world.log.mark(EVENTS, 0)
    world.fill(2)
    world.log.mark(EVENTS, 0)
    world.archive_all()
    world.fill(1)
    world.start()
    world.archive_all()
    assert world.stored()[0] == in_topic(world.log)[0]
    assert [record.offset for record in world.stored()[0]] == [0, 1, 3, 4, 6]


def test_a_commit_takes_so_many_bytes_and_the_next_goes_on_at_once(world: World):
    world.start(ArchiveConfig(commit_bytes=1_048_576))
    for _ in range(40):
        world.log.append(EVENTS, 0, b"v" * 100_000, None, {})
    asyncio.run(_one_round(world))
    assert world.archive().state().whole[0] == (0, 11)
    assert world.metrics.gauges["archive_lag_records", ""] == 29
    world.archive_all()
    assert world.stored()[0] == in_topic(world.log)[0]


async def _one_round(world: World) -> None:
    await round_of(world.stage)
    world.clock.advance(1)
    world.stage.look_behind()


def test_what_the_topic_forgot_before_is_told_and_known(world: World, caplog: pytest.LogCaptureFixture):
    world.fill(10)
    world.fill(5, partition=1)
    world.archive_all()
    world.fill(10)
    world.log.trim(EVENTS, 0, 15)
    world.archive_all()
    state = world.archive().state()
    assert state.whole == {0: (15, 20), 1: (0, 5)}
    assert state.lost == {0: (10, 15)}
    assert world.metrics.counters["gap_total", EVENTS] == 1
    assert "offsets 10 to before 15" in caplog.text
    assert world.stored()[0] == in_topic(world.log)[0]


def test_a_gap_before_an_empty_topic_is_told_once(world: World):
    world.fill(10)
    world.archive_all()
    world.fill(10)
    world.log.trim(EVENTS, 0, 20)
    for _ in range(3):
        world.archive_all()
    assert world.metrics.counters["gap_total", EVENTS] == 1
    world.fill(1)
    world.archive_all()
    assert world.archive().state().lost == {0: (10, 20)}


def test_an_archive_that_begins_late_has_lost_nothing(world: World):
    world.fill(10)
    world.log.trim(EVENTS, 0, 4)
    world.archive_all()
    assert world.archive().state() == (0 + 1, {0: (4, 10)}, {})
    assert ("gap_total", EVENTS) not in world.metrics.counters


@pytest.mark.parametrize("is_new_process", [False, True])
@pytest.mark.parametrize("written", [0, 1, 5, 9])
def test_a_topic_that_lost_its_end_is_not_put_behind_what_is_archived(
    world: World, written: int, is_new_process: bool, caplog: pytest.LogCaptureFixture
):
    world.fill(10)
    world.fill(4, partition=1)
    world.archive_all()
    before = world.stored()
    world.log.cut(EVENTS, 0, 7)
    world.clock.advance(5)
    world.fill(written)
    world.fill(4, partition=1)
    if is_new_process:
        world.start()
    world.archive_all()
    world.archive_all()
    assert world.stored()[0] == before[0]
    assert world.stored()[1] == in_topic(world.log)[1]
    # As many records as were lost, and the same end: nothing new is there to be read.
    is_hidden = written == 3
    assert world.metrics.gauges["archive_stopped", ""] == (0 if is_hidden else 1)
    assert "has lost the topic's end" in caplog.text


def test_a_topic_made_anew_is_not_archived_behind_the_old_one(world: World, caplog: pytest.LogCaptureFixture):
    world.fill(10)
    world.archive_all()
    before = world.stored()
    world.log.delete(EVENTS)
    world.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
    world.fill(20)
    world.start()
    world.archive_all()
    world.clock.advance(100)
    world.stage.look_behind()
    assert world.metrics.gauges["archive_stopped", ""] == PARTITIONS
    assert "made anew" in caplog.text
    old = new_archive(world.folder, world.clock, PARTITIONS)
    assert in_archive(old) == before


def test_generations_lie_side_by_side(world: World):
    world.fill(10)
    world.archive_all()
    second = new_archive(world.folder, world.clock, PARTITIONS, generation=2)
    record = in_topic(world.log)[0][0]
    second.append([record], {0: Offsets(0, 1)}, {})
    assert in_archive(second) == {0: [record]}
    assert world.stored()[0] == in_topic(world.log)[0]


def test_two_that_hold_one_partition_store_nothing_twice(world: World):
    first, second = world.archive(), world.archive()
    world.fill(6)
    records = in_topic(world.log)[0]
    first.append(records[:4], {0: Offsets(0, 4)}, {})
    with pytest.raises(Unavailable, match=r"ends at offset 4; .* follows 0"):
        second.append(records[:5], {0: Offsets(0, 5)}, {})
    second.append(records[4:], {0: Offsets(4, 6)}, {})
    assert world.stored()[0] == records


def test_the_second_of_two_commits_at_once_is_refused(world: World, monkeypatch: pytest.MonkeyPatch):
    world.fill(6)
    records = in_topic(world.log)[0]
    first, second = world.archive(), world.archive()
    first.append(records[:2], {0: Offsets(0, 2)}, {})
    told = DeltaArchive._written

    def written(self, table, rows):
        if self is second:
            first.append(records[2:4], {0: Offsets(2, 4)}, {})
        return told(self, table, rows)

    monkeypatch.setattr(DeltaArchive, "_written", written)
    with pytest.raises(Unavailable, match="did not take a commit"):
        second.append(records[2:5], {0: Offsets(2, 5)}, {})
    assert world.stored()[0] == records[:4]


def test_a_store_that_is_away_is_asked_again_and_the_age_grows(world: World, caplog: pytest.LogCaptureFixture):
    archive = world.archive()
    away = True

    def append_(records, taken, lost):
        if away:
            raise Unavailable("the store is away")
        return DeltaArchive.append(archive, records, taken, lost)

    archive.append = append_  # type: ignore[method-assign]
    world.start(archive=archive)
    assert math.isnan(world.stage._lag)
    world.fill(10)
    for _ in range(3):
        asyncio.run(_one_round(world))
        world.clock.advance(60)
    world.stage.look_behind()
    assert world.metrics.gauges["archive_behind_ms", ""] == 183_000
    world.clock.advance(84 * 3_600)
    world.stage.look_behind()
    assert "84.1 h behind" in caplog.text
    away = False
    world.archive_all()
    assert world.stored()[0] == in_topic(world.log)[0]


def test_what_nobody_expected_ends_the_process(world: World):
    archive = world.archive()
    archive.append = lambda *_: 1 / 0  # type: ignore[method-assign]
    world.start(archive=archive)
    world.fill(1)
    with pytest.raises(ZeroDivisionError):
        world.archive_all()
