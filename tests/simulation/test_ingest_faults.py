"""Goal: whatever fails between a shipper and the log, each event is there, and once after repeated ids are dropped.

Method: from a seed, shippers whose connections break before or after the ack, a log that refuses, denies what it took
and comes and goes, gateways that crash and drain; then the log is compared with what was offered.
"""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from ingest_world import PROJECT, START_MS, Counts, HandClock, ShakyLog, impression, message

from headrace.contract.config import IngestConfig
from headrace.contract.events import PUNCTUATION, decode_batch
from headrace.contract.topics import Topics
from headrace.ingest.batcher import Outcome
from headrace.ingest.forward_protocol import Message
from headrace.ingest.gateway import Gateway, Peer


class Shipper:
    """Sends chunks in a window, forgets what is acked, sends the rest again on its next connection."""

    def __init__(self, name: str, random: Random, chunks: list[Message]) -> None:
        self._name, self._random = name, random
        self._todo = deque(chunks)
        self._sent: dict[str, Message] = {}
        self.connect()

    def connect(self) -> None:
        """Begin a connection: what is unacked goes first, acks of the old one are lost."""
        self._todo.extendleft(reversed(self._sent.values()))
        self._sent = {}
        self._peer = Peer(self._name)

    def step(self, gateway: Gateway) -> None:
        if self._random.random() < 0.05:
            self.connect()
        if self._todo and len(self._sent) < 4:
            chunk, peer = self._todo.popleft(), self._peer
            name = str(chunk.chunk)
            self._sent[name] = chunk

            def acked(_outcome: Outcome) -> None:
                if self._peer is peer and self._random.random() > 0.1:
                    self._sent.pop(name, None)

            gateway.offer(chunk, 100, peer, acked)
        elif not self._todo and self._sent and self._random.random() < 0.2:
            self.connect()

    @property
    def done(self) -> bool:
        return not self._todo and not self._sent


def _chunks(random: Random, shipper: int) -> tuple[list[Message], dict[str, int]]:
    """Return chunks of events with and without ids, and how often each event must be found, by request id."""
    chunks, wanted = [], {}
    for number in range(30):
        first = shipper * 10_000 + number * 10
        records = [impression(n) for n in range(first, first + random.randint(1, 5))]
        for record in records:
            wanted[record["request_id"]] = 1
            if random.random() < 0.5:
                del record["event_id"]
        if random.random() < 0.2:
            records.append(impression(first + 9, item_id="bad"))
        chunks.append(message("shop.impression", records, f"s{shipper}-{number}"))
    return chunks, wanted


@pytest.mark.parametrize("seed", range(60))
def test_faults_lose_nothing_and_double_nothing(seed: int) -> None:
    random = Random(seed)
    log, clock = ShakyLog(random, fault=0.1), HandClock()
    shippers, wanted = [], {}
    for number in range(3):
        chunks, events = _chunks(random, number)
        shippers.append(Shipper(f"10.0.0.{number}", random, chunks))
        wanted |= events

    def gateway() -> Gateway:
        return Gateway(PROJECT, IngestConfig(), Topics(), 4, log, Counts(), clock, "g1")

    current = gateway()
    for step in range(20_000):
        clock.ms += random.randint(1, 10)
        log.away = (step // 200) % 5 == 4
        for shipper in shippers:
            shipper.step(current)
        current.tick()
        if random.random() < 0.01:
            # kill -9: what the gateway held is gone, what is in the log is not; its receipts reach nobody.
            current = gateway()
            for shipper in shippers:
                shipper.connect()
        if all(shipper.done for shipper in shippers):
            break
    assert all(shipper.done for shipper in shippers)
    once = {row["event_id"]: row for row in log.rows()}
    found: dict[str, int] = dict.fromkeys(wanted, 0)
    for row in once.values():
        found[row["request_id"]] += 1
    assert {r: n for r, n in found.items() if n == 0} == {}, "lost"
    assert {r: n for r, n in found.items() if n > 1} == {}, "twice"
    assert {letter.reason for letter in log.letters()} <= {"bad_type"}
    counts = current.counts
    assert counts["read"] == counts["appended"] + counts["dead_lettered"] + counts["repeated"]


@pytest.mark.parametrize("seed", range(30))
def test_a_promise_is_kept_by_every_event_that_was_held_when_it_was_made(seed: int) -> None:
    random = Random(seed)
    log, clock = ShakyLog(random, fault=0.1), HandClock()
    gateway = Gateway(PROJECT, IngestConfig(punctuate_ms=10), Topics(), 4, log, Counts(), clock, "g1")
    number = 0
    for _ in range(300):
        clock.ms += random.randint(1, 10)
        if random.random() < 0.5:
            number += 1
            record = impression(number, event_time_ms=clock.ms)
            gateway.offer(message("shop.impression", [record], f"c{number}"), 100, Peer("a"), None)
        gateway.tick()
    seen: set[str] = set()
    promised = [START_MS] * 4
    rows = {row["event_id"]: row for row in log.rows()}
    assert len(rows) > 50
    promises = {at: (partition, promise.time_ms) for at, partition, promise in log.promises()}
    for at, (partition, value, headers) in enumerate(log.records["events"]):
        if headers["kind"] == PUNCTUATION:
            assert promises[at][1] >= promised[partition]
            promised[partition] = promises[at][1]
            continue
        for row in decode_batch(value).to_pylist():
            # Again after a denied receipt it may come late; the first time it may not.
            if row["event_id"] not in seen:
                assert row["event_time_ms"] >= promised[partition]
            seen.add(row["event_id"])
