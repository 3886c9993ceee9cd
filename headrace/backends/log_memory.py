"""A log in memory that passes the same suite as Kafka: for simulation, unit tests and replay."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.log import Delivered, Record, TopicSpec


class MemoryLog:
    """All topics of one broker. Share it between producers and readers; thread-safe."""

    def __init__(self) -> None:
        self.topics: dict[str, list[list[Record]]] = {}
        self._changed = threading.Condition()

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; see `contract.log.Admin`."""
        for topic in topics:
            found = self.topics.setdefault(topic.name, [[] for _ in range(topic.partitions)])
            if len(found) != topic.partitions:
                raise ConfigRejected(f"topic {topic.name!r} has {len(found)} partitions, not {topic.partitions}.")

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Mapping[str, str]
    ) -> int:
        """Append one record and return its offset."""
        with self._changed:
            records = self.topics[topic][partition]
            records.append(Record(topic, partition, len(records), key, value, dict(headers), 0))
            self._changed.notify_all()
            return len(records) - 1

    def producer(self) -> MemoryProducer:
        """Return a new producer."""
        return MemoryProducer(self)

    def reader(self) -> MemoryReader:
        """Return a new reader."""
        return MemoryReader(self)

    def wait(self, timeout_s: float) -> None:
        """Wait for an append, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)


class MemoryProducer:
    """Appends at once; receipts run at the next `poll` or `flush`, as Kafka's do."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._due: list[tuple[Delivered, int]] = []

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
        """Append one record."""
        offset = self._log.append(topic, partition, key, value, headers or {})
        if delivered is not None:
            self._due.append((delivered, offset))

    def poll(self, timeout_s: float) -> None:
        """Run receipts that are due."""
        due, self._due = self._due, []
        for delivered, offset in due:
            delivered(None, offset)

    def flush(self, timeout_s: float) -> int:
        """Run receipts; none is ever outstanding."""
        self.poll(timeout_s)
        return 0

    def close(self) -> None:
        """Run receipts."""
        self.poll(0)


class MemoryReader:
    """Reads assigned partitions by offset."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._next: dict[tuple[str, int], int] = {}

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets."""
        self._next = dict(offsets)

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, partition by partition."""
        found = self._take(records_max)
        if not found and timeout_s > 0:
            self._log.wait(timeout_s)
            found = self._take(records_max)
        return found

    def _take(self, records_max: int) -> list[Record]:
        found: list[Record] = []
        for (topic, partition), offset in self._next.items():
            records = self._log.topics[topic][partition]
            if offset > len(records):
                raise InvariantBroken(f"{topic}/{partition} ends at {len(records)}, before offset {offset}.")
            taken = records[offset : offset + records_max - len(found)]
            found.extend(taken)
            self._next[topic, partition] = offset + len(taken)
        return found

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return 0 for each partition: nothing is ever deleted."""
        return dict.fromkeys(range(len(self._log.topics[topic])), 0)

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the offset that the next record will get."""
        return {p: len(records) for p, records in enumerate(self._log.topics[topic])}

    def close(self) -> None:
        """Nothing to let go."""
