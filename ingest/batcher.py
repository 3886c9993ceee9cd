"""Rows that wait for company, by declared type, and how a batch of them is cut into Kafka records. Pure.

A batch is due when its oldest row has waited `batch_ms`, or rows or bytes reach their bound. All types fall due
together, impressions first, so that a click does not overtake the impression that it answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.events import encode_batch
from headrace.contract.hashing import partition_of
from headrace.ingest.validate import Declared


class Owner:
    """A chunk that is not acked yet. `waiting` counts its events (and chunks it leans on) without an outcome."""

    __slots__ = ("acks", "ids", "key", "leaning", "origin", "size", "tag", "waiting")

    def __init__(self, key: bytes, tag: str, origin: str, size: int) -> None:
        self.key = key
        self.tag = tag
        self.origin = origin
        self.size = size
        self.waiting = 0
        self.ids: list[bytes] = []
        self.acks: list[Any] = []
        """Whom to tell; the shell's own objects."""
        self.leaning: list[Owner] = []
        """Chunks that repeat events of this one: they are settled when it is."""


class Rows(msgspec.Struct):
    """Rows of one type, as parallel lists."""

    declared: Declared
    records: list[Any] = []
    times_ns: list[int | None] = []
    ids: list[str] = []
    owners: list[Owner] = []
    bytes: int = 0
    oldest_ms: int | None = None
    since_s: float = 0.0


class Cut(msgspec.Struct, frozen=True):
    """One Kafka record to be: rows of one type and partition."""

    partition: int
    value: bytes
    rows: int
    oldest_ms: int
    owners: Counter[Owner]


class Batcher:
    """Holds rows until they are due."""

    def __init__(self, types: list[Declared], *, batch_ms: int, batch_rows: int, batch_bytes: int) -> None:
        self._types = sorted(types, key=lambda d: (d.kind != "impression", d.name))
        self._waiting: dict[str, Rows] = {}
        self._batch_s = batch_ms / 1000
        self._rows_max = batch_rows
        self._bytes_max = batch_bytes

    def rows_of(self, declared: Declared, monotonic_s: float) -> Rows:
        """Return the list that a new row of `declared` joins."""
        rows = self._waiting.get(declared.name)
        if rows is None:
            rows = self._waiting[declared.name] = Rows(declared, since_s=monotonic_s)
        return rows

    def due(self, monotonic_s: float) -> bool:
        """Say whether a batch must go now."""
        return any(
            monotonic_s - rows.since_s >= self._batch_s
            or len(rows.records) >= self._rows_max
            or rows.bytes >= self._bytes_max
            for rows in self._waiting.values()
        )

    def oldest_ms(self) -> int | None:
        """Return the event time of the oldest row that waits."""
        return min((r.oldest_ms for r in self._waiting.values() if r.oldest_ms is not None), default=None)

    def take(self) -> list[Rows]:
        """Return all that waits, impressions first, each at most `batch_rows` long, and hold nothing."""
        waiting, self._waiting = self._waiting, {}
        taken = []
        for declared in self._types:
            rows = waiting.get(declared.name)
            if rows is None:
                continue
            for at in range(0, len(rows.records), self._rows_max):
                part = slice(at, at + self._rows_max)
                taken.append(Rows(declared, rows.records[part], rows.times_ns[part], rows.ids[part], rows.owners[part]))
        return taken


def cut(batch: pa.RecordBatch, owners: list[Owner], partitions: int, bytes_max: int) -> Iterator[Cut | int]:
    """Yield a record for each partition in `batch`, halved until it fits `bytes_max`.

    Yields the row's number instead where one row alone is larger than that.
    """
    known: dict[str, int] = {}
    parts = np.empty(batch.num_rows, np.int64)
    for at, key in enumerate(batch.column("key").to_pylist()):
        part = known.get(key)
        if part is None:
            part = known[key] = partition_of(key, partitions)
        parts[at] = part
    for partition in np.unique(parts):
        rows = np.flatnonzero(parts == partition)
        yield from _fit(batch, owners, int(partition), rows, bytes_max)


def _fit(
    batch: pa.RecordBatch, owners: list[Owner], partition: int, rows: np.ndarray[Any, Any], bytes_max: int
) -> Iterator[Cut | int]:
    whole = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
    value = encode_batch(whole)
    if len(value) <= bytes_max:
        oldest = int(whole.column("event_time_ms").to_numpy().min())
        yield Cut(partition, value, len(rows), oldest, Counter([owners[row] for row in rows]))
    elif len(rows) == 1:
        yield int(rows[0])
    else:
        middle = len(rows) // 2
        yield from _fit(batch, owners, partition, rows[:middle], bytes_max)
        yield from _fit(batch, owners, partition, rows[middle:], bytes_max)
