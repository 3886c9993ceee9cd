"""Goal: an event id is known for its horizon and no longer than memory allows; what may be forgotten is set aside.

Method: a plain dictionary beside it; a gateway whose clock is turned by hand.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from random import Random
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from ingest_world import PROJECT, START_MS, Counts, HandClock, ShakyLog, dependencies, impression, message

from headrace.contract.config import IngestConfig, SourceConfig
from headrace.contract.hashing import partition_of
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.contract.project import Project
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.repeats import EventIds
from headrace.ingest.sources.kafka_source import KafkaSource


def _take(ids: EventIds, numbers: list[int], chunk: int, now_ms: int = 0) -> list[int]:
    # The halves of a hash. Many second ones share their upper bits, which say where the table begins to look.
    first = np.array(numbers, np.uint64)
    chosen, chunks = np.ones(len(first), np.bool_), np.full(len(first), chunk, np.int64)
    return ids.take(first, first * np.uint64(7) + np.uint64(1), chosen, chunks, now_ms).tolist()


def test_ids_are_found_while_the_table_grows() -> None:
    random, ids = Random(1), EventIds(1_000, 100_000)
    known: dict[int, int] = {}
    for chunk in range(1, 200):
        numbers = [random.randrange(1, 400) << random.choice([0, 20, 40]) for _ in range(random.randrange(1, 300))]
        for number, found in zip(numbers, _take(ids, numbers, chunk), strict=True):
            assert found == known.get(number, 0)
            known.setdefault(number, chunk)


def test_an_id_outlives_half_the_horizon_and_half_the_memory() -> None:
    ids = EventIds(1_000, 10_000)
    assert _take(ids, [7], 1, 0) == [0]
    assert _take(ids, [7], 2, 999) == [1], "remembered by the older generation"
    assert _take(ids, [7], 3, 2_500) == [0], "forgotten"
    _take(ids, list(range(100, 5_099)), 4, 2_500)
    assert _take(ids, [7], 5, 2_500) == [3]
    _take(ids, list(range(10_000, 14_000)), 6, 2_500)
    _take(ids, list(range(20_000, 25_000)), 7, 2_500)
    assert _take(ids, [7], 8, 2_500) == [0], "no more than two generations are held"


def test_a_refused_id_is_forgotten_and_its_neighbours_are_not() -> None:
    ids = EventIds(1_000, 10_000)
    same_place = [5, 5 + (1 << 30), 5 + (1 << 31)]
    assert _take(ids, same_place, 1) == [0, 0, 0]
    ids.forget(np.uint64(5), np.uint64(5 * 7 + 1))
    assert _take(ids, [5 + (1 << 30), 5 + (1 << 31)], 2) == [1, 1]
    assert _take(ids, [5], 3) == [0]


HOUR_MS = 3_600_000


class World:
    """A gateway whose stream remembers an hour."""

    def __init__(self, project: Project = PROJECT, waiting_max: int = 100, **more: Any) -> None:
        self.log, self.clock, self.counts = ShakyLog(Random(1)), HandClock(), Counts()
        self.late = LateEvents(HOUR_MS, waiting_max)
        config = IngestConfig(**{"grace_ms": 0, "dead_letter_events_min": 1, **more})
        self.gateway = Gateway(
            dependencies(self.log, self.counts, self.clock, project=project, config=config, late=self.late), "g"
        )
        self.acks: list[Outcome] = []

    def offer(self, records: list[dict[str, Any]], chunk: str, tag: str = "shop.impression") -> bool:
        what = message(tag, records, chunk, self.clock.ms // 1000)
        return self.gateway.offer(what, 100, Peer("10.0.0.1"), self.acks.append, refusable=True)

    def settle(self) -> None:
        for _ in range(12):
            self.clock.ms += 5
            self.gateway.tick()


def test_what_is_older_than_the_streams_memory_is_set_aside_whole_and_acked() -> None:
    world = World(dead_letter_bytes=16)
    old, new = START_MS - HOUR_MS, START_MS - HOUR_MS + 700_000
    title = "long " * 100
    world.offer([impression(1, event_time_ms=old, title=title), impression(2, event_time_ms=new)], "a")
    world.settle()
    assert [row["event_id"] for row in world.log.rows()] == ["e2"]
    (letter,) = world.log.letters()
    assert (letter.reason, letter.event_type, letter.event_id, letter.event_time_ms) == (
        "too_late",
        "impression",
        "e1",
        old,
    )
    assert letter.partition == partition_of("1", 4) and not letter.raw_truncated
    assert msgpack.unpackb(letter.raw)["title"] == title, "it is taken later, so nothing is cut"
    assert world.acks == [Outcome(1, 1, 0)] and world.late.written == 1
    world.offer([impression(1, event_time_ms=old, title=title)], "b")
    world.settle()
    assert len(world.log.letters()) == 1 and world.acks[1] == Outcome(0, 0, 1), "its letter stands for it"
    assert world.log.promises()[-1][2].time_ms > START_MS, "the watermark does not wait for it"


def test_late_events_say_nothing_against_their_tag() -> None:
    world = World()
    for number in range(50):
        assert world.offer([impression(number, event_time_ms=START_MS - 2 * HOUR_MS)], f"c{number}")
        world.settle()
    assert world.gateway.ceiling.alerts(world.clock.ms) == [] and len(world.log.letters()) == 50


def _bad_ones(world: World, number: int, late_ms: int, *, good: int, bad: int) -> bool:
    """Offer good and bad events of one time; return whether they were taken."""
    records = [impression(100 * number + nth, event_time_ms=world.clock.ms - late_ms) for nth in range(good + bad)]
    taken = world.offer(records[:good] + [{**one, "item_id": "seven"} for one in records[good:]], f"c{number}")
    world.settle()
    return taken


@pytest.mark.parametrize("late_ms", [0, 10 * HOUR_MS], ids=["fresh", "late"])
def test_a_late_event_that_passed_every_check_is_good_for_the_ceiling(late_ms: int) -> None:
    world = World(waiting_max=10_000, dead_letter_events_min=20)
    assert all(_bad_ones(world, number, late_ms, good=9, bad=1) for number in range(30))
    assert world.gateway.ceiling.alerts(world.gateway.now_ms()) == [], "a tenth is bad, of half that may be"


@pytest.mark.parametrize("late_ms", [0, 10 * HOUR_MS], ids=["fresh", "late"])
def test_who_was_shut_out_passes_again_with_a_good_spool(late_ms: int) -> None:
    world = World(waiting_max=10_000)
    assert _bad_ones(world, 0, 0, good=0, bad=10) and not _bad_ones(world, 1, 0, good=0, bad=10)
    world.clock.ms += 11_000
    assert all(_bad_ones(world, number, late_ms, good=10, bad=0) for number in range(2, 9))
    assert world.gateway.ceiling.alerts(world.gateway.now_ms()) == []


def test_what_waited_until_it_was_late_is_good_once() -> None:
    world = World()
    noted: list[int] = []
    note = world.gateway.ceiling.note

    def spy(*of: Any, **what: Any) -> None:
        noted.append(what.get("appended", 0))
        note(*of, **what)

    world.gateway.ceiling.note = spy  # type: ignore[method-assign]
    world.log.away = True
    for number in range(50):
        world.log.send("other", 0, b"%d" % number)
    world.offer([impression(1)], "a")
    world.settle()
    world.clock.ms += HOUR_MS
    world.log.away = False
    world.settle()
    assert [letter.reason for letter in world.log.letters()] == ["too_late"] and noted == [1]


class Topic:
    """A group's only member, with the records of one partition."""

    def __init__(self, values: list[dict[str, Any]]) -> None:
        self.claim, self.settled, self.is_paused = Claim("t", 0, 1), 0, False
        self.left = [Fetched(self.claim, at, json.dumps(one).encode(), START_MS) for at, one in enumerate(values)]

    def take(self, records_max: int) -> list[Fetched]:
        if self.is_paused:
            return []
        taken, self.left = self.left[:records_max], self.left[records_max:]
        return taken

    def settle(self, claim: Claim, offset: int) -> None:
        self.settled = offset

    def pause(self, claims: Collection[Claim]) -> None:
        self.is_paused = self.claim in claims

    def held(self, claim: Claim) -> bool:
        return True


class Door:
    """An open admission of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.offer, self.mapped, self.refuses = gateway.offer, gateway.mapped, gateway.refuses

    def is_open(self) -> bool:
        return True


@pytest.mark.parametrize("tag_field", ["", "tag"])
def test_a_topics_late_events_wait_in_it_while_there_is_no_room(tag_field: str) -> None:
    world = World(waiting_max=3)
    world.late.wait(3, 0)
    old = START_MS - 2 * HOUR_MS
    topic: Any = Topic([{**impression(n, event_time_ms=old), "tag": "shop.impression"} for n in range(40)])
    config = SourceConfig(topic="t", tag="" if tag_field else "shop.impression", tag_field=tag_field, in_flight_max=10)
    source = KafkaSource(config, lambda: topic, world.counts, world.clock)
    door: Any = Door(world.gateway)
    for second in range(20):
        source.turn(door, topic, float(second))
        world.settle()
    assert world.log.letters() == [] and topic.settled == 0 and len(topic.left) >= 20, "nothing is taken"
    world.late.wait(0, 0)
    for second in range(20, 40):
        world.late.wait(0, world.late.written)
        source.turn(door, topic, float(second))
        world.settle()
    assert topic.settled == 40 and len(world.log.letters()) == 40, "and all of it once there is room"


def test_beyond_the_bound_late_chunks_stay_with_their_senders() -> None:
    world = World(waiting_max=3)
    old = START_MS - 2 * HOUR_MS
    world.offer([impression(n, event_time_ms=old) for n in range(3)], "a")
    world.settle()
    assert not world.offer([impression(4, event_time_ms=old)], "b")
    assert world.offer([impression(5)], "c"), "what is in time is taken"
    assert world.counts.totals["events_refused_total:shop.impression"] == 1
    world.late.wait(0, world.late.written)
    assert world.offer([impression(4, event_time_ms=old)], "b")


def test_a_record_that_waits_for_kafka_until_it_is_late_is_set_aside() -> None:
    kept = msgspec.structs.replace(
        PROJECT.impression, unknown="keep", fields={**PROJECT.impression.fields, "extra": "string"}
    )
    world = World(msgspec.structs.replace(PROJECT, impression=kept).checked())
    world.log.away = True
    # The client's own queue is full, so that the gateway keeps the record.
    for number in range(50):
        world.log.send("other", 0, b"%d" % number)
    world.offer([impression(1, hue="red")], "a")
    world.offer([{"event_id": "k", "request_id": "r1", "user_id": 1}], "b", "shop.click")
    world.settle()
    world.clock.ms += HOUR_MS
    world.log.away = False
    world.settle()
    assert world.log.rows() == []
    letters = {letter.event_id: letter for letter in world.log.letters()}
    assert {name: one.reason for name, one in letters.items()} == {"e1": "too_late", "k": "too_late"}
    record = msgpack.unpackb(letters["e1"].raw)
    assert record["hue"] == "red" and record["event_time_ms"] == START_MS
    assert sorted(map(str, world.acks)) == [str(Outcome(0, 1, 0))] * 2


def test_what_was_looked_up_is_taken_at_any_age_and_says_so() -> None:
    log, clock = ShakyLog(Random(1)), HandClock()
    for looked_up in (False, True):
        gateway = Gateway(dependencies(log, Counts(), clock, looked_up=looked_up), "g")
        age_ms = 40 * HOUR_MS if looked_up else 0
        what = message("shop.impression", [impression(1, event_time_ms=clock.ms - age_ms)])
        gateway.offer(what, 0, Peer("a"), None)
        gateway.drained()
        log.poll(0)
    assert [headers["late"] for _, _, headers in log.records["events"]] == ["set-aside", "looked-up"]
