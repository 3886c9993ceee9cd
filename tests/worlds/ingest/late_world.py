"""A day without Kafka for one sender, a live one beside it, gateways that restart, and settlers that are killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from random import Random
from typing import Any

from ingest_world import PROJECT, START_MS, Counts, dependencies, impression, message
from letters_world import TOPICS, Dying, DyingProducer, DyingWriter, Killed

from headrace.backends.clock import VirtualClock
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog
from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.errors import Unavailable
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.lake import LakeState, StoredIds
from headrace.contract.interfaces.log import Record, read_range
from headrace.contract.project import Project
from headrace.ingest.dead_letters.settler import Clients, Settler
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.log_start import read_start
from headrace.stream.join.join import JoinState

P = 2
HOUR_MS = 3_600_000
JOIN = JoinConfig(repeat_horizon_ms=HOUR_MS)
CONFIG = IngestConfig(grace_ms=0)
STEP_S = 900.0
"""Gateways turn so seldom that a day is 96 turns."""


_PARTITIONS_MAX = 3


class State:
    """One version of a lake that holds everything up to an offset."""

    def __init__(self, offset: int, retained_before_ms: int = 0, following: int = 0) -> None:
        self.version, self.retained_before_ms = 1, retained_before_ms
        self.next_offsets = dict.fromkeys(range(_PARTITIONS_MAX), following)
        self.positions = Positions(1, {partition: Position(offset, 0) for partition in range(_PARTITIONS_MAX)})


class Ids:
    """A lake that has these ids, or is away."""

    def __init__(self, ids: set[str], state: State | None, *, away: bool = False) -> None:
        self.ids, self.newest, self.away = ids, state, away
        self.asked: list[tuple[str, int, int]] = []

    def state(self, version: int | None = None) -> LakeState | None:
        if self.away:
            raise Unavailable("away")
        return self.newest

    def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
        self.asked.append((column, begin_ms, end_ms))
        return frozenset(ids) & self.ids


class LateWorld:
    """One log, one gateway at a time, and what the senders know."""

    def __init__(self, seed: int, *, stored: StoredIds | None = None) -> None:
        self.random = Random(seed)
        self.clock = VirtualClock(START_MS)
        self.log = MemoryLog(self.clock.now_ms)
        self.log.admin().ensure_topics(TOPICS.specs(P))
        self.epochs = WriterEpochs()
        self.stored = stored
        self.counts = Counts()
        self.acked: set[str] = set()
        self.wanted: dict[str, bool] = {}
        """Impressions of all senders, and whether their sample is positive."""
        self.clicks = 0
        self._numbers = 0
        self.restart()

    def restart(self) -> None:
        """Kill the gateway and begin another one, which remembers nothing."""
        self.late = LateEvents(JOIN.repeat_horizon_ms)
        reader = self.log.reader()
        self.gateway = Gateway(
            dependencies(
                self.log.producer(),
                self.counts,
                self.clock,
                config=CONFIG,
                topics=TOPICS,
                partitions=P,
                late=self.late,
                start=read_start(reader, TOPICS.events, "g"),
            ),
            "g",
        )
        self.turn()

    def turn(self) -> None:
        """Let the gateway cut, send, take receipts and promise."""
        while not self.gateway.drained():
            self.gateway.tick()
        self.gateway.tick()
        self.gateway.tick()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with a live event every turn."""
        end = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end:
            self.clock.advance(min(STEP_S, end - self.clock.monotonic()))
            for chunk in self.visit():
                self.send(chunk)
            self.turn()

    def visit(self) -> list[tuple[str, str, list[dict[str, Any]]]]:
        """Let somebody see something now, and perhaps click: (chunk id, tag, records), events with their own times."""
        self._numbers += 1
        number, now_ms = self._numbers, self.clock.now_ms()
        seen = impression(number, event_time_ms=now_ms - 20, version="v1")
        self.wanted[f"r{number}"] = clicked = self.random.random() < 0.5
        chunks = [(f"c{number}", "shop.impression", [seen])]
        if clicked:
            self.clicks += 1
            click = {"event_id": f"e{number}", "request_id": f"r{number}", "user_id": number % 7, "item_id": number}
            chunks.append((f"k{number}", "shop.click", [{**click, "event_time_ms": now_ms - 10}]))
        return chunks

    def send(self, chunk: tuple[str, str, list[dict[str, Any]]]) -> None:
        """Hand a chunk over once, to the gateway that is there."""
        name, tag, records = chunk
        made = message(tag, records, name, self.clock.now_ms() // 1000)
        self.gateway.offer(made, 100, Peer("10.0.0.1"), lambda _: self.acked.add(name), refusable=True)

    def forget(self) -> None:
        """Let retention take all of `events` but each partition's newest record."""
        for _ in range(3):
            self.clock.advance(1.0)
            self.turn()
        for partition, end in self.log.reader().end_offsets(TOPICS.events).items():
            self.log.trim(TOPICS.events, partition, end - 1)

    # -- settlers

    def settler(self, clock: Clock | None = None, project: Project = PROJECT) -> Settler:
        return Settler(
            project,
            CONFIG,
            TOPICS,
            P,
            open_clients=self.clients,
            metrics=self.counts,
            clock=clock or self.clock,
            late=self.late,
        )

    def clients(self, dying: Dying | None = None) -> Clients:
        if dying is None:
            writer = FencedMemory(self.log, TOPICS.retries, "retries", self.epochs)
            return Clients(self.log.producer(), self.log.reader(), writer, self.stored)
        producer = DyingProducer(self.log.producer(), dying)
        return Clients(producer, self.log.reader(), DyingWriter(self.log, self.epochs, dying), self.stored)

    def settle_with_kills(self, kills: int) -> None:
        """Let settlers work that are killed at some effect, and at last one that is not."""
        for _ in range(kills):
            dying = Dying(self.random.randint(1, 60), self.random)
            try:
                self.settler().turn(self.clients(dying))
            except Killed:
                self.clock.advance(self.random.choice([0.0, 3.0, 40.0]))
            except Unavailable:
                pass
        self.clock.advance(60.0)
        settler, clients = self.settler(), self.clients()
        while settler.turn(clients):
            self.clock.advance(5.0)

    # -- checks

    def records(self) -> list[Record]:
        return list(read_range(self.log.reader(), TOPICS.events))

    def join(self, cut: int = 1) -> tuple[list[JoinState], list[dict[str, Any]]]:
        """Join the whole log, `cut` records at a time; return the states and the samples."""
        states, samples = [], []
        for partition in range(P):
            state = JoinState(PROJECT, JOIN, silent_ms=CONFIG.silent_ms, partition=partition)
            records = [record for record in self.records() if record.partition == partition]
            for at in range(0, len(records), cut):
                emitted = state.take_all(records[at : at + cut])
                if emitted is not None:
                    samples += emitted.batch.to_pylist()
            states.append(state)
        return states, samples


def wrong(world: LateWorld, samples: list[dict[str, Any]]) -> list[str]:
    """Return which impressions are not one sample with the right label."""
    told: dict[str, list[float]] = {}
    for sample in samples:
        told.setdefault(sample["request_id"], []).append(sample["label"])
    due = {name: [float(clicked)] for name, clicked in world.wanted.items()}
    found = [f"{name}: {told.get(name)}" for name, labels in due.items() if told.get(name) != labels]
    return found + sorted(told.keys() - world.wanted.keys())


def outcome(states: list[JoinState]) -> Counter[str]:
    """Return the totals of all partitions."""
    names = ("impressions", "feedback", "repeated_in_log", "too_late", "bad_records")
    return Counter({name: sum(getattr(state.totals, name) for state in states) for name in names})
