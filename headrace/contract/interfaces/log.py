"""What the pipeline needs of a log: append with a receipt, read by offset. Kafka and memory implement it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec


class Record(msgspec.Struct, frozen=True):
    """One record as it lies in the log."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, str]
    timestamp_ms: int


class TopicSpec(msgspec.Struct, frozen=True):
    """A topic as `ensure_topics` creates it. `retention_ms` -1 keeps for ever; it is ignored when compacted."""

    name: str
    partitions: int
    compacted: bool = False
    retention_ms: int = -1


Delivered = Callable[[Exception | None, int], None]
"""Called once per record with (None, offset) when all replicas have it, or (error, -1)."""


class Producer(Protocol):
    """Appends in call order per partition, idempotent, acks=all. Not thread-safe unless the backend says so."""

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
        """Queue one record. Raises `Overloaded` when the local queue is full; nothing was queued then."""

    def poll(self, timeout_s: float) -> None:
        """Run delivery callbacks that are due, waiting at most `timeout_s`."""

    def flush(self, timeout_s: float) -> int:
        """Wait for receipts; return how many records still have none after `timeout_s`."""

    def close(self) -> None:
        """Flush briefly and let go."""


class Reader(Protocol):
    """Reads assigned partitions by offset; owns no group and commits nothing: positions travel with the data."""

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets (each the next one to read); replaces the former assignment."""

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, in order within a partition; empty after `timeout_s` without any.

        Raises `Unavailable` on a broker that stays away, `InvariantBroken` when an assigned offset was deleted
        by retention (reading on would skip events in silence).
        """

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of each partition."""

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the offset that the next record will get."""

    def close(self) -> None:
        """Let go."""


class Admin(Protocol):
    """Creates topics; never deletes one."""

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; raise `ConfigRejected` where a topic exists with another partition count."""


def read_topic(reader: Reader, topic: str, *, key: bytes | None = None, silent_s: float = 1.0) -> list[bytes]:
    """Return the values of a topic of one partition up to its present end, in order, of one key where one is given.

    Markers of transactions take offsets too, so the end is also where nothing comes for `silent_s`.
    """
    at, end = reader.begin_offsets(topic)[0], reader.end_offsets(topic)[0]
    reader.assign({(topic, 0): at})
    values: list[bytes] = []
    while at < end:
        records = reader.poll(1_000, silent_s)
        if not records:
            break
        at = records[-1].offset + 1
        values += [r.value for r in records if r.value is not None and r.offset < end and key in (None, r.key)]
    return values
