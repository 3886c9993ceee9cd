"""The log in this process: same contract as Kafka's, for tests, simulations and replay."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from headrace.contract.errors import ConfigRejected, InvariantBroken, Overloaded, Unavailable
from headrace.contract.interfaces.log import Delivered, Record, TopicSpec, check_outlasts


class _Marker(Record, frozen=True):
    """An offset without a record that a reader may see."""


class MemoryLog:
    """Topics as lists of records. Thread-safe; hand it to any number of producers, readers and admins."""

    def __init__(self, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self.now_ms = now_ms
        self.changed = threading.Condition()
        self.topics: dict[str, list[list[Record]]] = {}
        self.begins: dict[tuple[str, int], int] = {}
        self.ids: dict[str, str] = {}
        self.kept_ms: dict[str, int] = {}
        """How long each topic's records are kept, as it was created or as an operator has set it since; -1 for ever."""

    def partitions(self, topic: str) -> list[list[Record]]:
        """Return the topic's partitions. Raises `Unavailable` where there is no such topic."""
        try:
            return self.topics[topic]
        except KeyError:
            raise Unavailable(f"topic {topic!r} does not exist; ensure_topics creates it.") from None

    def append(
        self, topic: str, partition: int, value: bytes | None, key: bytes | None, headers: Mapping[str, str]
    ) -> int:
        """Append one record and return its offset."""
        with self.changed:
            records = self.partitions(topic)[partition]
            offset = self.begins[topic, partition] + len(records)
            records.append(Record(topic, partition, offset, key, value, dict(headers), self.now_ms()))
            self.changed.notify_all()
            return offset

    def mark(self, topic: str, partition: int) -> None:
        """Take an offset that no reader sees, as the marker of a transaction and an aborted record do."""
        with self.changed:
            records = self.partitions(topic)[partition]
            offset = self.begins[topic, partition] + len(records)
            records.append(_Marker(topic, partition, offset, None, None, {}, self.now_ms()))
            self.changed.notify_all()

    def trim(self, topic: str, partition: int, begin: int) -> None:
        """Delete what lies before offset `begin`, as retention does."""
        with self.changed:
            first = self.begins[topic, partition]
            del self.partitions(topic)[partition][: max(0, begin - first)]
            self.begins[topic, partition] = max(first, begin)

    def cut(self, topic: str, partition: int, end: int) -> None:
        """Lose what lies at and beyond offset `end`, as a broker may whose disk failed."""
        with self.changed:
            del self.partitions(topic)[partition][max(0, end - self.begins[topic, partition]) :]

    def delete(self, topic: str) -> None:
        """Delete a topic, as an operator does; an admin makes it anew."""
        with self.changed:
            del self.topics[topic]

    def producer(self, queue_max: int = 100_000) -> MemoryProducer:
        """Return a producer on this log."""
        return MemoryProducer(self, queue_max)

    def reader(self) -> MemoryReader:
        """Return a reader on this log."""
        return MemoryReader(self)

    def admin(self) -> MemoryAdmin:
        """Return an admin on this log."""
        return MemoryAdmin(self)


class MemoryProducer:
    """Appends at once; receipts wait for `poll`, as with Kafka."""

    def __init__(self, log: MemoryLog, queue_max: int = 100_000) -> None:
        self._log = log
        self._queue_max = queue_max
        self._receipts: deque[tuple[Delivered | None, Exception | None, int]] = deque()

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
        """Append one record. Raises `Overloaded` when `queue_max` receipts wait for `poll`."""
        if len(self._receipts) >= self._queue_max:
            raise Overloaded(f"{self._queue_max} records wait for their receipts; poll, then offer this one again.")
        try:
            offset = self._log.append(topic, partition, value, key, headers or {})
        except (Unavailable, IndexError) as error:
            self._receipts.append((delivered, Unavailable(f"{topic}/{partition}: {error}"), -1))
        else:
            self._receipts.append((delivered, None, offset))

    def poll(self, timeout_s: float) -> None:
        """Run the callbacks that are due; all are, so it never waits."""
        for _ in range(len(self._receipts)):
            delivered, error, offset = self._receipts.popleft()
            if delivered is not None:
                delivered(error, offset)

    def flush(self, timeout_s: float) -> int:
        """Run all callbacks; return 0."""
        while self._receipts:
            self.poll(0.0)
        return 0

    def close(self) -> None:
        """Run all callbacks."""
        self.flush(0.0)


class MemoryReader:
    """Reads assigned partitions in turn, as Kafka's does."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._next: dict[tuple[str, int], int] = {}

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets."""
        self._next = dict(offsets)

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, in order within a partition."""
        with self._log.changed:
            taken = self._take(records_max)
            if not taken and timeout_s > 0:
                self._log.changed.wait_for(self._has_more, timeout_s)
                taken = self._take(records_max)
            return taken

    def position(self, topic: str, partition: int) -> int:
        """Return the offset that the partition is read to."""
        return self._next[topic, partition]

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of each partition."""
        with self._log.changed:
            return {p: self._log.begins[topic, p] for p in range(len(self._log.partitions(topic)))}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return the next offset of each partition."""
        with self._log.changed:
            return {p: self._log.begins[topic, p] + len(r) for p, r in enumerate(self._log.partitions(topic))}

    def close(self) -> None:
        """Stop reading and free what the reader holds."""
        self._next = {}

    def _has_more(self) -> bool:
        return any(n < self._log.begins[t, p] + len(self._log.partitions(t)[p]) for (t, p), n in self._next.items())

    def _take(self, records_max: int) -> list[Record]:
        taken: list[Record] = []
        for (topic, partition), following in self._next.items():
            records = self._log.partitions(topic)[partition]
            begin = self._log.begins[topic, partition]
            end = begin + len(records)
            if not begin <= following <= end:
                raise InvariantBroken(
                    f"{topic}/{partition}: offset {following} is wanted, the log has [{begin}, {end}). "
                    "Reading on would skip events; restore from a state that still lies in the log."
                )
            start = following - begin
            some = records[start : start + records_max - len(taken)]
            taken.extend(record for record in some if not isinstance(record, _Marker))
            self._next[topic, partition] = following + len(some)
        return taken


class MemoryAdmin:
    """Creates topics in a `MemoryLog`."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; raise `ConfigRejected` where a topic has another partition count, or is kept too
        short."""
        with self._log.changed:
            for spec in topics:
                have = self._log.topics.get(spec.name)
                if have is None:
                    self._log.begins.update({(spec.name, p): 0 for p in range(spec.partitions)})
                    self._log.topics[spec.name] = [[] for _ in range(spec.partitions)]
                    self._log.ids[spec.name] = uuid.uuid4().hex
                    self._log.kept_ms[spec.name] = -1 if spec.compacted else spec.retention_ms
                elif len(have) != spec.partitions:
                    raise ConfigRejected(
                        f"topic {spec.name!r} has {len(have)} partitions and the configuration says {spec.partitions}; "
                        "the count is fixed for a generation: raise log.generation, or set log.partitions back."
                    )
            for spec in topics:
                if spec.outlasts:
                    check_outlasts(
                        spec, self._log.kept_ms[spec.name], self._log.kept_ms.get(spec.outlasts, spec.retention_ms)
                    )

    def topic_id(self, topic: str) -> str:
        """Return the topic's id."""
        with self._log.changed:
            self._log.partitions(topic)
            return self._log.ids.get(topic, "")

    def retention_ms(self, topic: str) -> int:
        """Return for how long the topic's records are kept; -1 for ever."""
        with self._log.changed:
            self._log.partitions(topic)
            return self._log.kept_ms[topic]

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Delete what lies before these offsets."""
        self._log.partitions(topic)
        for partition, offset in offsets.items():
            self._log.trim(topic, partition, offset)
