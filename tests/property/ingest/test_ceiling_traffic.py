"""Goal: whoever sends what, nobody who sends good events is held back, and every event is somewhere.

Method: the gateway without sockets on a log in memory, seeded traffic of many origins and tags. Shippers keep what is
refused and offer it again. Checked from outside: their own books against the log's rows and dead letters.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from ingest_world import Counts, HandClock, ShakyLog, dependencies, impression, message

from headrace.contract.config import IngestConfig
from headrace.ingest.dead_letters.origins import NETWORKS_MAX, ORIGINS_MAX
from headrace.ingest.gateway.gateway import Gateway, Peer

CONFIG = IngestConfig(
    dead_letter_events_min=50, dead_letter_probe_ms=2_000, dead_letter_window_ms=12_000, grace_ms=0, batch_ms=5
)
TAGS = ("shop.impression", "shop.click", "syslog")
CHUNK = 5
STEPS = 1_200


class Shipper:
    """Sends chunks of one tag, of which a share is bad; keeps them until they are acked."""

    def __init__(self, world: World, number: int, *, bad: float, moves: bool = False) -> None:
        self.world, self.number, self.bad, self.moves = world, number, bad, moves
        self.address = f"10.{number}.0.1"
        self.tag = world.random.choice(TAGS[:2]) if bad < 1 else world.random.choice(TAGS)
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self.offered: set[str] = set()
        self.refusals = 0

    def step(self) -> None:
        random = self.world.random
        if not self.kept or (random.random() < 0.8 and len(self.kept) < 10):
            self.make()
        self.offer(random.choice(sorted(self.kept)))

    def offer(self, chunk: str) -> None:
        random = self.world.random
        origin = f"172.16.{random.randrange(250)}.{random.randrange(250)}" if self.moves else self.address
        acked = self.world.acked(self, chunk)
        taken = self.world.gateway.offer(
            message(self.tag, self.kept[chunk], chunk),
            100,
            Peer(origin),
            acked,
            refusable=True,
        )
        if taken:
            return
        self.refusals += 1
        self.world.refused[self.world.gateway.ceiling.name(self.tag)] += CHUNK

    def make(self) -> None:
        records = []
        for _ in range(CHUNK):
            self.world.made += 1
            record = impression(self.world.made)
            if self.world.random.random() < self.bad:
                record["item_id"] = "seven"
            self.offered.add(record["event_id"])
            records.append(record)
        self.kept[f"{self.number}-{self.world.made}"] = records


class World:
    def __init__(self, seed: int) -> None:
        self.random, self.clock, self.counts = Random(seed), HandClock(), Counts()
        self.log = ShakyLog(self.random)
        self.gateway = Gateway(dependencies(self.log, self.counts, self.clock, config=CONFIG), "g")
        self.made = 0
        self.refused = Counter[str]()
        good = [Shipper(self, n, bad=self.random.choice((0.0, 0.1))) for n in range(8)]
        bad = [Shipper(self, n, bad=self.random.choice((0.9, 1.0))) for n in range(8, 14)]
        moving = [Shipper(self, n, bad=1.0, moves=True) for n in range(14, 17)]
        self.good, self.bad, self.moving = good, bad, moving

    def acked(self, shipper: Shipper, chunk: str) -> Any:
        return lambda _outcome: shipper.kept.pop(chunk, None)

    def run(self) -> None:
        for _ in range(STEPS):
            everybody = [*self.good, *self.bad * 2, *self.moving * 3]
            self.random.choice(everybody).step()
            self.clock.ms += self.random.randint(1, 20)
            if self.random.random() < 0.5:
                self.gateway.tick()
            # Two tables of declared tags, and that of all others.
            assert self.gateway.ceiling.size <= 3 * (ORIGINS_MAX + NETWORKS_MAX + 1)
        for shipper in self.good:
            for chunk in list(shipper.kept):
                shipper.offer(chunk)
        for _ in range(50):
            self.clock.ms += 5
            self.gateway.tick()

    def check(self) -> None:
        rows = Counter(row["event_id"] for row in self.log.rows())
        letters = Counter(letter.event_id for letter in self.log.letters())
        for shipper in (*self.good, *self.bad, *self.moving):
            kept = {record["event_id"] for records in shipper.kept.values() for record in records}
            for event_id in shipper.offered:
                places = [event_id in kept, rows[event_id] == 1, letters[event_id] == 1]
                assert sum(places) == 1, f"{event_id} is in {places}"
        assert not (rows | letters).keys() - {i for s in (*self.good, *self.bad, *self.moving) for i in s.offered}
        totals = self.counts.totals
        assert {tag: totals[f"events_refused_total:{tag}"] for tag in self.refused} == self.refused
        dead = sum(n for name, n in totals.items() if name.startswith("events_dead_lettered_total:"))
        assert (dead, totals["events_appended_total"]) == (letters.total(), rows.total())
        for shipper in self.good:
            assert shipper.refusals == 0 and not shipper.kept, f"{shipper.address}, bad {shipper.bad}, was held back"


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 60))])
def test_who_sends_good_events_passes_and_every_event_is_somewhere(seed: int) -> None:
    world = World(seed)
    world.run()
    world.check()
    assert sum(shipper.refusals for shipper in (*world.bad, *world.moving)) > 50, "the ceiling was reached"
