"""A retry of dead letters as a process that kills itself with SIGKILL at one of its effects.

    python retry_process.py BROKERS GENERATION EFFECT before|after

Effects are marks and records in the order in which they happen; EFFECT 0 lets it end by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping

from letters_world import CORRECTED, P

from headrace.backends.clock import SystemClock
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import IngestConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Delivered
from headrace.ingest.dead_letters.letters import Filter
from headrace.ingest.dead_letters.mark_leases import MarkLeases
from headrace.ingest.dead_letters.retry import Report, Retry

LEASE_MS = 6_000
"""Long enough for a batch on a machine with eight busy neighbours, short enough for a test to wait for."""


class Turn:
    """Counts effects; at its own it kills the process, before or after."""

    def __init__(self, effect: int, after: bool) -> None:
        self.left, self.after = effect, after

    def step(self, do: Callable[[], None]) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        do()
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledWriter(FencedKafka):
    """Dies at a mark."""

    def __init__(self, brokers: str, topic: str, turn: Turn) -> None:
        super().__init__(brokers, topic, f"headrace-{topic}")
        self._turn = turn

    def append(self, value: bytes) -> None:
        self._turn.step(lambda: super(KilledWriter, self).append(value))


class KilledProducer(KafkaProducer):
    """Dies at a record: `after` means that the broker has it."""

    def __init__(self, brokers: str, turn: Turn) -> None:
        super().__init__(brokers, linger_ms=0.0)
        self._turn = turn

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        def do() -> None:
            super(KilledProducer, self).send(topic, partition, value, key=key, headers=headers, delivered=delivered)
            if self._turn.left == 0:
                self.flush(20.0)

        self._turn.step(do)


def retry(brokers: str, topics: Topics, turn: Turn) -> Report:
    """Run one retry of all letters."""
    return Retry(
        CORRECTED,
        IngestConfig(),
        topics,
        P,
        producer=KilledProducer(brokers, turn),
        reader=KafkaReader(brokers),
        writer=KilledWriter(brokers, topics.retries, turn),
        clock=SystemClock(),
        metrics=MemoryMetrics(),
        run=uuid.uuid4().hex[:12],
        leases=MarkLeases(LEASE_MS),
    ).retry(Filter())


if __name__ == "__main__":
    told, generation, effect, when = sys.argv[1:]
    print(retry(told, Topics(int(generation)), Turn(int(effect), when == "after")))
