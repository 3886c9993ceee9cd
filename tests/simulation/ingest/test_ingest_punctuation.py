"""Goal: no impression expires before its click, whatever becomes of the gateways that speak for the time.

Method: from a seed, services that log impressions and clicks in order into a spool; gateway processes that die, stall
and come back; a broker away for a day; a gateway that alone cannot reach it; a host that is cut off; an event dated
2099. Virtual time. The log that results goes through the real watermark and the real join, partition by partition.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from ingest_world import NOT_LATE, PROJECT, Counts, HandClock, dependencies, message
from shipping_world import CLICK_TAG, IMPRESSION_TAG, NO_FAULTS, PARTITIONS, Broker, Line

from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.ingest.gateway import punctuate
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.stream.join.join import JoinState

SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 20))]
WINDOW_MS = PROJECT.tasks[0].window_ms
CONFIG = IngestConfig()
JOIN = JoinConfig(repeat_horizon_ms=2 * 86_400_000)
"""Nothing here is too late to be told from a repeat: test_late_events.py has what is."""
SILENT_MS = CONFIG.silent_ms
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
DELIVERY_MS = 300_000
"""After so long without a receipt a record fails, as the Kafka client has it."""
FAR_MS = 4_070_908_800_000
"""1 January 2099."""


class Cable(Line):
    """A producer whose way to the broker can be cut for itself alone, and whose records fail after `DELIVERY_MS`."""

    def __init__(self, world: World, random: Random) -> None:
        super().__init__(world.broker, random, NO_FAULTS)
        self._world, self.cut_until = world, 0
        self._away_since: int | None = None

    def poll(self, timeout_s: float) -> None:
        now = self._world.clock.ms
        if not self._world.broker.away and now >= self.cut_until:
            self._away_since = None
            super().poll(timeout_s)
            return
        self._away_since = now if self._away_since is None else self._away_since
        if now - self._away_since > DELIVERY_MS:
            failed, self._queue = self._queue, deque()
            for *_, delivered in failed:
                if delivered is not None:
                    delivered(RuntimeError("timed out"), -1)


class Process:
    """One gateway from its start to its end."""

    def __init__(self, world: World, name: str) -> None:
        self.name, self.cable = name, Cable(world, world.random)
        self.stalled_until, self.alive = 0, True
        self.gateway = Gateway(
            dependencies(
                self.cable,
                Counts(),
                world.clock,
                project=PROJECT,
                config=CONFIG,
                partitions=PARTITIONS,
                start=world.broker.start(name),
                late=NOT_LATE,
            ),
            name,
        )


@dataclass
class Service:
    """A web service and its shipper: one spool in order, one connection, a few chunks on their way."""

    world: World
    origin: str
    spool: deque[tuple[str, list[dict[str, Any]], str]] = field(default_factory=deque)
    sent: dict[str, tuple[str, list[dict[str, Any]], str]] = field(default_factory=dict)
    process: Process | None = None
    window: int = 64
    cut_until: int = 0
    retry_at: int = 0

    def step(self) -> None:
        now = self.world.clock.ms
        if self.process is not None and (not self.process.alive or now < self.cut_until):
            self.spool.extendleft(reversed(self.sent.values()))
            self.sent, self.process = {}, None
            # headrace.sender's longest back-off is 2 s.
            self.retry_at = max(now, self.cut_until) + self.world.random.randint(50, 2_000)
        if self.process is None:
            running = [p for p in self.world.processes if p.alive]
            if now < self.retry_at:
                return
            if not running:
                self.retry_at = now + self.world.random.randint(50, 2_000)
                return
            self.process, self.peer = self.world.random.choice(running), Peer(self.origin)
        process = self.process
        while self.spool and len(self.sent) < self.window and now >= process.stalled_until:
            tag, records, name = chunk = self.spool.popleft()
            self.sent[name] = chunk
            process.gateway.offer(message(tag, records, name), 100, self.peer, self._acked(name, process))

    def _acked(self, name: str, process: Process) -> Callable[..., None]:
        def acked(*_outcome: object) -> None:
            if self.process is process:
                self.sent.pop(name, None)

        return acked


class World:
    """Services, gateways, a broker and what happens to them; `labels` says what the join made of each impression."""

    def __init__(self, seed: int, gateways: int = 3, window: int = 64) -> None:
        self.random, self.clock, self.broker = Random(seed), HandClock(), Broker()
        self.processes = [Process(self, f"g{n}") for n in range(gateways)]
        self.services = [Service(self, f"10.0.0.{n}", window=window) for n in range(3)]
        self.due: list[tuple[int, int, Service, str, dict[str, Any]]] = []
        self.restarts: list[tuple[int, str]] = []
        self.clicks: dict[str, tuple[Service, int, int]] = {}
        """By request id: who logged it, when the impression and when the click happened."""
        self._number = 0

    def kill(self, process: Process, away_ms: int | None) -> None:
        """End a process; one of its name starts `away_ms` later, None: never."""
        process.alive = False
        self.processes.remove(process)
        if away_ms is not None:
            self.restarts.append((self.clock.ms + away_ms, process.name))

    def pass_time(self, ms: int, every_ms: int = 250, step_ms: int = 40) -> None:
        """Let `ms` pass in steps; each service logs an impression about every `every_ms`, most are clicked."""
        until = self.clock.ms + ms
        while self.clock.ms < until:
            before = self.clock.ms
            self.clock.ms += self.random.randint(1, 2 * step_ms)
            for service in self.services:
                if self.random.random() < (self.clock.ms - before) / every_ms:
                    self._visit(service, self.random.randint(before, self.clock.ms))
            self._turn()

    def calm(self) -> None:
        """Let the backlogs be read, the last windows end, and the promises catch up."""
        for _ in range(2_000):
            self.pass_time(100, every_ms=1 << 60)
            if not any(s.spool or s.sent for s in self.services) and not self.due:
                break
        self.pass_time(3 * WINDOW_MS, every_ms=1 << 60)

    def _visit(self, service: Service, at_ms: int) -> None:
        self._number += 1
        request, user = f"r{self._number}", self.random.randrange(9)
        record = {"event_id": f"i{request}", "request_id": request, "user_id": user, "item_id": 1}
        self.due.append((at_ms, 2 * self._number, service, IMPRESSION_TAG, record))
        if self.random.random() < 0.8:
            click_ms = at_ms + self.random.randint(50, WINDOW_MS - 2_000)
            click = {"event_id": f"c{request}", "request_id": request, "user_id": user, "item_id": 1}
            self.due.append((click_ms, 2 * self._number + 1, service, CLICK_TAG, click))
            self.clicks[request] = (service, at_ms, click_ms)

    def _turn(self) -> None:
        now = self.clock.ms
        self.due.sort(key=lambda item: item[:2])
        while self.due and self.due[0][0] <= now:
            at_ms, number, service, tag, record = self.due.pop(0)
            service.spool.append((tag, [{"event_time_ms": at_ms} | record], f"{service.origin}/{number}"))
        for at, name in [r for r in self.restarts if r[0] <= now]:
            self.restarts.remove((at, name))
            self.processes.append(Process(self, name))
        actors: list[Any] = [*self.services, *self.processes]
        self.random.shuffle(actors)
        for actor in actors:
            if isinstance(actor, Service):
                actor.step()
            elif now >= actor.stalled_until:
                actor.gateway.tick()

    def joined(self) -> list[JoinState]:
        """Read the log from its beginning; keeps the labels by request id."""
        joins = [JoinState(PROJECT, JOIN, silent_ms=SILENT_MS, partition=p) for p in range(PARTITIONS)]
        self.labels: dict[str, float] = {}
        offsets = [0] * PARTITIONS
        for topic, partition, value, headers in self.broker.records:
            if topic != Topics().events:
                continue
            emitted = joins[partition].take(Record(topic, partition, offsets[partition], None, value, headers, 0))
            offsets[partition] += 1
            if emitted is not None:
                names, labels = (emitted.batch.column(c).to_pylist() for c in ("request_id", "label"))
                self.labels |= dict(zip(names, labels, strict=True))
        return joins

    def late(self) -> list[str]:
        """Return the impressions that became negative though they were clicked in time; checks that time goes on."""
        joins = self.joined()
        for join in joins:
            assert join.watermark.time_ms > self.clock.ms - 2_000, "time stands still"
            assert join.totals.tasks[0].waiting == 0, "an impression waits for ever"
        assert set(self.clicks) <= set(self.labels), "lost"
        return [request for request in self.clicks if self.labels[request] == 0.0]


def started(seed: int, **more: int) -> World:
    """Return a world in which every gateway has spoken."""
    world = World(seed, **more)
    world.pass_time(5_000)
    return world


@pytest.mark.parametrize("seed", SEEDS)
def test_gateways_that_die_and_come_back_expire_nothing(seed: int) -> None:
    world = started(seed)
    for _ in range(4):
        world.kill(world.random.choice(world.processes), world.random.randint(500, 6_000))
        world.pass_time(world.random.randint(500, 6_000))
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gateway_that_dies_for_good_holds_the_watermark_no_longer_than_silent_ms(seed: int) -> None:
    world = started(seed)
    world.kill(world.random.choice(world.processes), None)
    world.pass_time(SILENT_MS // 2)
    died_at = world.clock.ms - SILENT_MS // 2
    assert all(join.watermark.time_ms <= died_at for join in world.joined())
    world.pass_time(SILENT_MS)
    assert all(join.watermark.time_ms > world.clock.ms - 2_000 for join in world.joined())
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stall_shorter_than_silent_ms_expires_nothing(seed: int) -> None:
    world = started(seed, gateways=1 + seed % 3)
    for _ in range(3):
        stalled = world.random.choice(world.processes)
        stalled.stalled_until = world.clock.ms + world.random.randint(1_000, SILENT_MS - CONFIG.grace_ms - 500)
        world.pass_time(world.random.randint(SILENT_MS, 2 * SILENT_MS))
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_all_gateways_stalled_for_long_expire_nothing(seed: int) -> None:
    world = started(seed, gateways=1 + seed % 3)
    until = world.clock.ms + world.random.choice((30_000, 10 * MINUTE_MS, HOUR_MS))
    for process in world.processes:
        process.stalled_until = until + world.random.randint(0, 1_000)
    world.pass_time(10_000)
    world.pass_time(until - world.clock.ms, every_ms=20_000, step_ms=1_000)
    world.pass_time(5_000)
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("away_ms", [8_000, 2 * MINUTE_MS, HOUR_MS, DAY_MS])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_broker_away_expires_nothing(seed: int, away_ms: int) -> None:
    world = started(seed, gateways=1 + seed % 3)
    world.broker.away = True
    world.pass_time(min(away_ms, 12_000))
    if away_ms > 12_000:
        world.pass_time(away_ms - 12_000, every_ms=away_ms // 60, step_ms=max(40, away_ms // 2_000))
    world.broker.away = False
    world.pass_time(10_000)
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_all_gateways_away_for_a_day_expire_nothing(seed: int) -> None:
    world = started(seed)
    for process in list(world.processes):
        world.kill(process, DAY_MS + world.random.randint(0, 1_000))
    world.pass_time(12_000)
    world.pass_time(DAY_MS - 12_000, every_ms=DAY_MS // 60, step_ms=30_000)
    world.pass_time(10_000)
    world.calm()
    assert world.late() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_host_cut_off_is_read_afterwards_without_early_expiry(seed: int) -> None:
    world = started(seed)
    begin = world.clock.ms
    cut = world.services[0]
    cut.cut_until = begin + HOUR_MS // 2
    world.pass_time(HOUR_MS // 2, every_ms=HOUR_MS // 120, step_ms=450)
    world.pass_time(10_000)
    world.calm()
    # What happened before the cut and was clicked in it cannot wait: the others' time went on, as it must.
    torn = [r for r, (service, at, _) in world.clicks.items() if service is cut and at <= begin]
    assert set(world.late()) <= set(torn)
    assert sum(service is cut for service, _, _ in world.clicks.values()) > len(torn) + 20


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gateway_with_a_buffer_from_an_hour_ago_tears_only_what_it_held(seed: int) -> None:
    world = started(seed)
    alone, begin = world.processes[0], world.clock.ms
    alone.cable.cut_until = begin + HOUR_MS
    world.pass_time(12_000)
    world.pass_time(HOUR_MS - 12_000, every_ms=HOUR_MS // 100, step_ms=450)
    behind = [service for service in world.services if service.process is alone]
    world.pass_time(10_000)
    world.calm()
    torn = [r for r, (service, at, _) in world.clicks.items() if service in behind and at <= begin + 1_000]
    assert set(world.late()) <= set(torn)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_event_dated_2099_is_a_dead_letter_and_moves_no_time(seed: int) -> None:
    world = started(seed)
    record = {"event_id": "far", "request_id": "far", "user_id": 1, "item_id": 1, "event_time_ms": FAR_MS}
    world.services[0].spool.append((IMPRESSION_TAG, [record], "far"))
    world.pass_time(10_000)
    world.calm()
    assert world.broker.reasons == {"future": 1}
    assert world.late() == []
    assert all(join.watermark.time_ms <= world.clock.ms for join in world.joined())


def _broker_away_for_seconds(seed: int) -> list[str]:
    world = started(seed, gateways=1, window=4)
    world.broker.away = True
    world.pass_time(WINDOW_MS - 2_000)
    world.broker.away = False
    world.pass_time(10_000)
    world.calm()
    return world.late()


def test_a_gateway_that_promises_at_once_after_an_outage_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(_broker_away_for_seconds(seed) for seed in range(4))
    monkeypatch.setattr(punctuate, "SILENT_S", float("inf"))
    assert all(_broker_away_for_seconds(seed) for seed in range(4))
