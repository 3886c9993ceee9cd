"""Gateways that crash, stop, join and fail while they re-key a foreign topic: nothing is lost, nothing counts twice.

Goal: whatever the seed does, every record's event lies in `events` or the dead letters, under one id, and the group's
positions end behind the last record. Method: the gateway and the source as they are, over a log that fails on purpose;
planted bugs must be caught.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from ingest_world import Counts, HandClock, ShakyLog, dependencies

from headrace.backends.log.group_memory import MemoryGroup, MemoryGroups
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import IngestConfig, SourceConfig
from headrace.contract.interfaces.group import Claim, Group
from headrace.contract.interfaces.log import TopicSpec
from headrace.ingest.dead_letters.ceiling import Ceiling
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.sources.kafka_source import KafkaSource, Run

SOURCE = SourceConfig(topic="weblogs", tag="shop.impression", in_flight_max=40)
USUAL = IngestConfig()
MIXED = SourceConfig(topic="weblogs", tag="shop.impression", tag_field="tag", in_flight_max=40)
LOW = IngestConfig(dead_letter_events_min=20, dead_letter_probe_ms=500, dead_letter_window_ms=3_000)
FAULT = 0.2


class Process:
    """One gateway process: its source, its producer's queue, its place in the group."""

    def __init__(self, world: World, number: int) -> None:
        self.log = ShakyLog(world.random, fault=FAULT)
        self.counts = Counts()
        deps = dependencies(self.log, self.counts, world.clock, partitions=2, config=world.ceiling)
        self.gateway = Gateway(deps, f"g{number}")
        self.clock, self.is_paused = world.clock, False
        self.source = world.make(world.source, None, self.counts, world.clock)
        self.group = world.groups.join()

    def offer(self, *what: Any, **how: Any) -> bool:
        return self.gateway.offer(*what, **how)

    def mapped(self, *what: Any) -> Any:
        return self.gateway.mapped(*what)

    def refuses(self, *what: Any) -> str:
        return self.gateway.refuses(*what)

    def is_open(self) -> bool:
        return not self.is_paused

    def turn(self) -> None:
        self.source.turn(self, self.group, self.clock.monotonic())  # type: ignore[arg-type]
        self.gateway.tick()


class World:
    """A foreign topic of three partitions and the processes that read it."""

    def __init__(
        self,
        seed: int,
        make: Callable[..., KafkaSource],
        *,
        source: SourceConfig = SOURCE,
        ceiling: IngestConfig = USUAL,
        bad: float = 0.1,
    ) -> None:
        self.random, self.clock, self.make = Random(seed), HandClock(), make
        self.source, self.ceiling, self.bad = source, ceiling, bad
        self.foreign = MemoryLog(self.clock.now_ms)
        self.foreign.admin().ensure_topics([TopicSpec("weblogs", 3)])
        self.groups = MemoryGroups(self.foreign, "weblogs")
        self.all: list[Process] = []
        self.alive: list[Process] = []
        self.written = 0
        self.start()

    def start(self) -> None:
        self.alive.append(Process(self, len(self.all)))
        self.all.append(self.alive[-1])

    def write(self) -> None:
        for _ in range(self.random.randint(1, 30)):
            record: dict[str, Any] = {"request_id": f"r{self.written}", "user_id": 1, "item_id": self.written}
            if self.source.tag_field and self.random.random() < 0.5:
                record["tag"] = "shop.click"
            if self.random.random() < (self.bad if "tag" in record or not self.source.tag_field else 0.1):
                record["user_id"] = None
            value = json.dumps(record).encode() if self.random.random() < 0.95 else b"{%d" % self.written
            self.foreign.append("weblogs", self.random.randrange(3), value, None, {})
            self.written += 1

    def step(self) -> None:
        self.clock.ms += self.random.randint(1, 60)
        what, one = self.random.random(), self.random.choice(self.alive)
        if what < 0.25:
            self.write()
        elif what < 0.30:
            one.group.commit()
        elif what < 0.33:
            self.alive.remove(one)
            self.groups.crash(one.group)
            if not self.alive:
                self.start()
        elif what < 0.36 and len(self.alive) < 3:
            self.start()
        elif what < 0.38 and len(self.alive) > 1:
            self.alive.remove(one)
            one.group.close(0)
        elif what < 0.40:
            one.is_paused = not one.is_paused
        else:
            one.turn()

    def settle(self) -> None:
        """Let everything that lives finish."""
        for process in self.alive:
            process.is_paused = False
        for _ in range(4_000):
            self.clock.ms += 50
            for process in self.alive:
                process.turn()
                process.group.commit()
            ends = [len(part) for part in self.foreign.partitions("weblogs")]
            if [self.groups.committed.get(p, 0) for p in range(3)] == ends:
                return
        raise AssertionError(f"positions {self.groups.committed} do not reach the ends {ends}")

    def check(self) -> None:
        """Hold what was appended against what was written."""
        ids: dict[int, set[str]] = {}
        for process in self.all:
            for row in process.log.rows():
                ids.setdefault(row["item_id"], set()).add(row["event_id"])
        letters = [letter for process in self.all for letter in process.log.letters()]
        values = [r.value or b"" for part in self.foreign.partitions("weblogs") for r in part]
        bad = {value for value in values if b"request_id" not in value}
        keyless = sum(b"null" in value for value in values if value not in bad)
        assert all(len(found) == 1 for found in ids.values()), "an event has two ids"
        assert len({event_id for found in ids.values() for event_id in found}) == len(ids), "two events share an id"
        assert len(ids) == len(values) - len(bad) - keyless, "lost"
        assert {x.raw for x in letters if x.reason == "bad_chunk"} == bad
        assert len({x.event_id for x in letters if x.reason == "no_partition_key"}) == keyless
        for process in self.alive:
            assert process.source._positions.in_flight == 0


def run(seed: int, make: Callable[..., KafkaSource] = KafkaSource, **kind: Any) -> World:
    """Run one seed to its end."""
    world = World(seed, make, **kind)
    for _ in range(300):
        world.step()
    world.write()
    world.settle()
    world.check()
    return world


@pytest.mark.parametrize("seed", [*range(30), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(30, 60))])
def test_crashes_and_rebalances_change_nothing(seed: int) -> None:
    run(seed)


@pytest.mark.parametrize("source", [SOURCE, MIXED], ids=["one-tag", "mixed"])
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 60))])
def test_crashes_and_rebalances_change_nothing_while_a_tag_is_beyond_the_ceiling(
    seed: int, source: SourceConfig
) -> None:
    world = run(seed, source=source, ceiling=LOW, bad=0.9)
    refused = sum(n for p in world.all for name, n in p.counts.totals.items() if name.startswith("events_refused"))
    assert refused > 0


class Eager(KafkaSource):
    """A planted bug: positions move when records are offered, not when they are settled."""

    def _offer(self, server: Any, group: Group, claim: Claim, records: Any) -> None:
        super()._offer(server, group, claim, records)
        group.settle(claim, records[-1].offset + 1)


class Hasty(KafkaSource):
    """A planted bug: a run that is settled moves the position past an earlier one that is not."""

    def _acked(self, group: Group, claim: Claim, run: Run, outcome: Outcome) -> None:
        super()._acked(group, claim, run, outcome)
        if run.open == 0:
            group.settle(claim, run.end)


@pytest.mark.parametrize("bug", [Eager, Hasty])
def test_planted_bugs_are_found(bug: type[KafkaSource]) -> None:
    for seed in range(60):
        try:
            run(seed, bug)
        except AssertionError:
            return
    pytest.fail("60 seeds found nothing")


def test_a_member_that_lost_a_partition_moves_no_position() -> None:
    log = MemoryLog()
    log.admin().ensure_topics([TopicSpec("weblogs", 1)])
    log.append("weblogs", 0, b"x", None, {})
    groups = MemoryGroups(log, "weblogs")
    first: MemoryGroup = groups.join()
    (record,) = first.take(5)
    groups.crash(first)
    second = groups.join()
    first.settle(record.claim, 1)
    first.commit()
    assert groups.committed == {} and [one.offset for one in second.take(5)] == [0]


def test_what_the_ceiling_refuses_is_offered_again_until_it_is_taken() -> None:
    world = World(1, KafkaSource)
    (process,) = world.alive
    config = IngestConfig(dead_letter_share_max=0.5, dead_letter_events_min=20, dead_letter_probe_ms=1_000)
    process.gateway.ceiling = Ceiling(config, ["shop.impression"])
    process.source._config = SourceConfig(topic="weblogs", tag="shop.impression", in_flight_max=1_000)
    for number in range(200):
        user = 1 if number >= 150 else None
        value = {"request_id": f"r{number}", "user_id": user, "item_id": number}
        world.foreign.append("weblogs", number % 3, json.dumps(value).encode(), None, {})
        if number % 10 == 0:
            process.turn()
            world.clock.ms += 60
    world.settle()
    world.check()
    assert process.counts.totals["events_refused_total:shop.impression"] > 0
    letters = {(x.event_id, x.reason) for x in process.log.letters()}
    assert len(letters) == 150 and len({row["item_id"] for row in process.log.rows()}) == 50


def impression_of(user: int | None, number: int, **more: Any) -> bytes:
    return json.dumps({"request_id": f"r{number}", "user_id": user, "item_id": number, **more}).encode()


def undisturbed(world: World) -> Process:
    """Return the world's process, over a log that fails no more."""
    (process,) = world.alive
    process.log = process.gateway._queue._producer = process.gateway._producer = ShakyLog(Random(0))
    return process


def test_a_shut_tag_stops_no_other_tag_of_its_partition() -> None:
    world = World(1, KafkaSource, source=MIXED, ceiling=msgspec.structs.replace(LOW, dead_letter_probe_ms=60_000))
    process = undisturbed(world)
    for number in range(400):
        bad = number % 2 == 0
        more = {"tag": "shop.click"} if bad else {}
        world.foreign.append("weblogs", 0, impression_of(None if bad else 1, number, **more), None, {})
    for _ in range(300):
        world.clock.ms += 10
        process.turn()
        assert process.source._positions.in_flight <= MIXED.in_flight_max
    assert len(process.log.rows()) == 200, "all of the good tag, long before the next probe"
    process.group.commit()
    assert world.groups.committed[0] >= 400 - MIXED.in_flight_max
    letters = {x.event_id for x in process.log.letters()}
    assert len(letters) >= 200 - MIXED.in_flight_max, "what nobody may hold any longer is a dead letter, not lost"
    assert process.counts.totals["events_refused_total:shop.click"] > 0


def test_a_partition_that_is_held_back_stops_no_other_one_and_takes_no_memory() -> None:
    world = World(1, KafkaSource, ceiling=msgspec.structs.replace(LOW, dead_letter_probe_ms=5_000))
    process = undisturbed(world)
    for number in range(600):
        bad = number % 6 != 0
        world.foreign.append("weblogs", int(bad), impression_of(None if bad else 1, number), None, {})
    for _ in range(200):
        world.clock.ms += 10
        process.turn()
        assert process.source._positions.in_flight <= 2 * SOURCE.in_flight_max
    assert len(process.log.rows()) == 100 and process.source._positions.held_back() > 0
    process.group.commit()
    assert world.groups.committed[0] == 100 and world.groups.committed[1] < 500
    world.settle()
    world.check()
