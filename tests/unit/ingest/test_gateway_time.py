"""Goal: no wrong clock moves or holds the watermark, and no old event holds the promises.

Method: a gateway whose wall clock is set while the monotonic one and the broker's go on; its log goes through the join.
"""

from __future__ import annotations

from random import Random

import pytest
from ingest_world import PROJECT, START_MS, Counts, ShakyLog, dependencies, impression, message

from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.formats.events import PUNCTUATION, Punctuation, encode_punctuation
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.log_start import LogStart, read_start
from headrace.ingest.gateway.steady_time import SPREAD_MS, SteadyTime
from headrace.stream.join.join import JoinState

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
WINDOW_MS = PROJECT.tasks[0].window_ms
EVENTS = Topics().events


class SteppedClock:
    """The wall clock is `off_ms` beside the truth; the monotonic one never is."""

    def __init__(self) -> None:
        self.true_ms, self.off_ms = START_MS, 0

    def now_ms(self) -> int:
        return self.true_ms + self.off_ms

    def monotonic(self) -> float:
        return (self.true_ms - START_MS + 5_000) / 1000

    def sleep(self, seconds: float) -> None:
        self.true_ms += int(seconds * 1000)


class World:
    """One gateway, a broker with the true time, the join of the one partition."""

    def __init__(self, off_ms: int = 0) -> None:
        self.clock, self.log = SteppedClock(), ShakyLog(Random(0))
        self.clock.off_ms = off_ms
        self.join = JoinState(PROJECT, JoinConfig(), silent_ms=10_000, partition=0)
        self.labels: dict[str, float] = {}
        self.broker_ms = 0
        self.start = LogStart()
        self.restart()

    def restart(self) -> None:
        """Begin an epoch, as after a crash."""
        more = {"start": self.start, "broker_ms": lambda: self.broker_ms, "partitions": 1}
        self.gateway = Gateway(dependencies(self.log, Counts(), self.clock, **more), "g1")

    def pass_time(self, ms: int, step_ms: int = 20) -> None:
        for _ in range(ms // step_ms):
            self.clock.true_ms += step_ms
            self.gateway.tick()
            self.log.poll(0)
            records = self.log.records[EVENTS]
            for offset in range(self.join.offset + 1, len(records)):
                _, value, headers = records[offset]
                record = Record(EVENTS, 0, offset, None, value, headers, self.clock.true_ms)
                self.broker_ms = self.clock.true_ms
                self.start = self.start.after(record, "g1")
                emitted = self.join.take(record)
                if emitted is not None:
                    rows = emitted.batch.select(["event_id", "label"]).to_pylist()
                    self.labels |= {row["event_id"]: row["label"] for row in rows}

    def show(self, number: int, **more: object) -> None:
        record = impression(number, event_time_ms=self.clock.true_ms, **more)
        self.gateway.offer(message("shop.impression", [record]), 0, Peer("a"), None)

    def behind_ms(self) -> int:
        return self.clock.true_ms - self.join.watermark.time_ms


@pytest.mark.parametrize("off_ms", [DAY_MS, -HOUR_MS, 20_000, -DAY_MS])
@pytest.mark.parametrize("for_ms", [200, 60_000])
def test_a_clock_that_steps_neither_runs_the_watermark_ahead_nor_holds_it(off_ms: int, for_ms: int) -> None:
    world = World()
    world.pass_time(5_000)
    world.clock.off_ms = off_ms
    for _ in range(for_ms // 200):
        world.pass_time(200)
        assert -100 <= world.behind_ms() <= 1_000
    world.clock.off_ms = 0
    world.show(1)
    world.pass_time(WINDOW_MS - 1_000)
    assert world.labels == {}
    world.pass_time(2_000)
    assert world.labels == {"e1": 0.0}
    assert world.gateway.counts["dead_lettered"] == 0


@pytest.mark.parametrize("off_ms", [DAY_MS, -HOUR_MS])
def test_a_clock_that_is_wrong_at_the_start_changes_nothing(off_ms: int) -> None:
    world = World(off_ms)
    world.pass_time(5_000)
    world.show(1)
    world.pass_time(WINDOW_MS - 1_000)
    assert world.labels == {}
    world.clock.off_ms = 0
    world.pass_time(2_000)
    assert world.labels == {"e1": 0.0}
    assert world.behind_ms() <= 1_000


def test_a_restart_with_a_clock_an_hour_back_is_a_newer_epoch() -> None:
    world = World()
    world.pass_time(5_000)
    before = world.gateway.epoch
    world.clock.off_ms = -HOUR_MS
    world.restart()
    world.pass_time(5_000)
    assert world.gateway.epoch == before + 1
    assert world.behind_ms() <= 1_000


@pytest.mark.parametrize("age_ms", [HOUR_MS, 15 * 365 * DAY_MS])
def test_events_that_are_late_already_hold_no_promise(age_ms: int) -> None:
    world = World()
    world.pass_time(5_000)
    for number in range(500):
        record = impression(number, event_time_ms=world.clock.true_ms - age_ms)
        world.gateway.offer(message("shop.impression", [record] * 3), 0, Peer("a"), None)
        world.pass_time(20)
        assert world.behind_ms() <= 1_000
    # Nor do they after a restart: the log tells what was promised.
    world.restart()
    for number in range(500):
        record = impression(1_000 + number, event_time_ms=world.clock.true_ms - age_ms)
        world.gateway.offer(message("shop.impression", [record]), 0, Peer("a"), None)
        world.pass_time(20)
    assert world.behind_ms() <= 1_000


def test_a_new_event_beside_an_old_one_holds_the_promise() -> None:
    world = World()
    world.pass_time(5_000)
    held = world.clock.true_ms - 5
    world.log.away = True
    records = [impression(1, event_time_ms=1_000_000_000_000), impression(2, event_time_ms=held)]
    world.gateway.offer(message("shop.impression", records), 0, Peer("a"), None)
    world.pass_time(10_000)
    world.log.away = False
    world.log.poll(0)
    assert max(promise.time_ms for _, _, promise in world.log.promises()) <= held


def test_times_in_another_unit_are_refused_by_name_with_the_remedy() -> None:
    world = World()
    times = {1: START_MS // 1000, 2: START_MS * 1000, 3: 900_000_000_000, 4: 946_684_800_000}
    records = [impression(number, event_time_ms=time_ms) for number, time_ms in times.items()]
    world.gateway.offer(message("shop.impression", records), 0, Peer("a"), None)
    world.pass_time(100)
    letters = {letter.event_id: letter for letter in world.log.letters()}
    assert letters.pop("e4").reason == "too_late", "a time of 2000 is possible, and has to be looked up"
    told = {name: (one.reason, one.detail.rpartition("; ")[2]) for name, one in letters.items()}
    assert told == {
        "e1": ("past", "it reads as seconds: multiply event_time_ms by 1,000"),
        "e2": ("future", "it reads as microseconds: divide event_time_ms by 1,000"),
        "e3": ("past", "mend it, or set ingest.past to an earlier day"),
    }
    assert world.log.rows() == []


def test_ids_of_events_without_one_are_new_in_every_process() -> None:
    ids = []
    for instance in ("aa", "bb"):
        log, clock = ShakyLog(Random(0)), SteppedClock()
        gateway = Gateway(dependencies(log, Counts(), clock, instance=instance), "g1")
        gateway.offer(message("shop.impression", [impression(1) | {"event_id": None}]), 0, Peer("a"), None)
        gateway.drained()
        log.poll(0)
        ids += [row["event_id"] for row in log.rows()]
    assert ids == ["g1/1/aa/1/0", "g1/1/bb/1/0"]


def test_time_follows_the_wall_clock_only_while_the_broker_agrees() -> None:
    time = SteadyTime()
    assert time.now_ms(50_000, 1.0) == 50_000
    # Before the broker has spoken, a step is not followed.
    assert time.now_ms(50_000 + DAY_MS, 2.0) == 51_000
    time.heard(52_000, 3.0)
    assert time.now_ms(52_500, 3.0) == 52_500
    assert time.now_ms(52_500 + SPREAD_MS + 1_000, 4.0) == 53_500
    assert time.apart_ms == SPREAD_MS + 500
    assert time.now_ms(54_500, 5.0) == 54_500
    # A broker's clock that steps is not followed either.
    time.heard(55_000 + DAY_MS, 6.0)
    assert time.now_ms(55_500, 6.0) == 55_500
    assert time.now_ms(56_500 - HOUR_MS, 7.0) == 56_500


def test_a_gateway_takes_its_epoch_from_the_log() -> None:
    log = MemoryLog(lambda: START_MS)
    log.admin().ensure_topics(Topics().specs(2))
    producer, reader = log.producer(), log.reader()

    def write(partition: int, gateway: str, epoch: object, time_ms: int = 0, *, by_record: bool = False) -> None:
        value = encode_punctuation(Punctuation(gateway, 1, time_ms, by_record=by_record))
        headers = {"kind": PUNCTUATION, "gateway": gateway, "epoch": str(epoch)}
        producer.send(EVENTS, partition, value, headers=headers)

    assert read_start(reader, EVENTS, "a") == LogStart(1, {})
    write(0, "a", 7, 100)
    write(0, "a", 7, 200)
    write(1, "b", 9, 300)
    write(1, "a", "x", 400)
    assert read_start(reader, EVENTS, "a") == LogStart(10, {0: 200})
    # Far behind what others wrote who are no gateways.
    for _ in range(3_000):
        producer.send(EVENTS, 0, b"", headers={"kind": "external", "epoch": "99"})
    write(1, "a", 11, START_MS + DAY_MS, by_record=True)
    assert read_start(reader, EVENTS, "a") == LogStart(12, {0: 200, 1: START_MS})


def test_a_promise_beyond_its_records_time_counts_up_to_it() -> None:
    join = JoinState(PROJECT, JoinConfig(), silent_ms=10_000, partition=0)
    said = [Punctuation("g", 1, START_MS + DAY_MS, by_record=True), Punctuation("g", 1, START_MS + DAY_MS)]
    reached = []
    for offset, promise in enumerate(said):
        record = Record(EVENTS, 0, offset, None, encode_punctuation(promise), {"kind": PUNCTUATION}, START_MS)
        join.take(record)
        reached.append(join.watermark.time_ms)
    # What release 0.1 wrote is taken as it is: its logs give what they gave.
    assert reached == [START_MS, START_MS + DAY_MS]


def test_the_past_is_a_day_in_utc() -> None:
    assert IngestConfig().past_ms == 946_684_800_000
