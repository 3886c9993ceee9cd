"""Goal: an event id is known for its horizon and no longer than memory allows; what may be forgotten is set aside.

Method: a plain dictionary beside it; a gateway whose clock is turned by hand.
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgpack
import msgspec
import numpy as np
from ingest_world import PROJECT, START_MS, Counts, HandClock, ShakyLog, dependencies, impression, message

from headrace.contract.config import IngestConfig
from headrace.contract.hashing import partition_of
from headrace.contract.project import Project
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.repeats import EventIds


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
        config = IngestConfig(grace_ms=0, dead_letter_events_min=1, **more)
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
