"""Chunks that wait to be batched, by declared type, and how a batch of them is cut into Kafka records. Pure.

A batch is due when its oldest chunk has waited `batch_ms`, or rows or bytes reach their bound. All types fall due
together, impressions first, so that a click does not overtake the impression that it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.formats.events import encode_batch
from headrace.ingest.decode.fluent_chunk import Layout
from headrace.ingest.decode.msgpack_scan import I64s
from headrace.kernels.hashes import hash64_texts


class Outcome(msgspec.Struct, frozen=True):
    """What became of a message's events, all of them durable."""

    appended: int
    dead_lettered: int
    repeated: int


Acked = Callable[[Outcome], None]


class OpenChunk:
    """A chunk that is not acked yet. `waiting` counts its events and the chunks it follows that have no outcome."""

    __slots__ = (
        "acks",
        "appended",
        "dead",
        "followers",
        "key",
        "number",
        "origin",
        "repeated",
        "size",
        "tag",
        "waiting",
    )

    def __init__(self, number: int, key: bytes, tag: str, origin: str, size: int) -> None:
        self.number = number
        self.key = key
        self.tag = tag
        self.origin = origin
        self.size = size
        self.waiting = self.appended = self.dead = self.repeated = 0
        self.acks: list[Acked] = []
        """Called with the outcome once the chunk is settled."""
        self.followers: list[OpenChunk] = []
        """Chunks that repeat events of this one: they are settled when it is."""

    def outcome(self) -> Outcome:
        """Return what became of its events."""
        return Outcome(self.appended, self.dead, self.repeated)


class Waiting(msgspec.Struct):
    """Chunks of one type, in order, as parallel lists; entries are not decoded yet."""

    layout: Layout
    since_s: float
    bodies: list[bytes] = []
    starts: list[I64s] = []
    chunks: list[OpenChunk] = []
    prefixes: list[str] = []
    """A chunk each: how the ids begin of events that bring none."""
    rows: int = 0
    body_bytes: int = 0

    def add(self, body: bytes, starts: I64s, chunk: OpenChunk, prefix: str) -> None:
        """Add a chunk."""
        self.bodies.append(body)
        self.starts.append(starts)
        self.chunks.append(chunk)
        self.prefixes.append(prefix)
        self.rows += len(starts)
        self.body_bytes += len(body)


class Cut(msgspec.Struct, frozen=True):
    """The content of one Kafka record: rows of one type and partition."""

    partition: int
    value: bytes
    rows: int
    oldest_ms: int | None
    """Of the events that are newer than the partition's last promise; None where there are none."""
    earliest_ms: int
    """Of all events."""
    chunk_rows: dict[int, int]
    """Rows by the chunk's place in the batch."""


class Batcher:
    """Holds chunks until they are due."""

    def __init__(self, layouts: list[Layout], *, batch_ms: int, batch_rows: int, batch_bytes: int) -> None:
        self._layouts = sorted(layouts, key=lambda m: (m.declared.kind != "impression", m.declared.name))
        self._waiting: dict[str, Waiting] = {}
        self._batch_s = batch_ms / 1000
        self._rows_max = batch_rows
        self._bytes_max = batch_bytes

    def of(self, layout: Layout, monotonic_s: float) -> Waiting:
        """Return the batch that a new chunk of a type joins."""
        waiting = self._waiting.get(layout.declared.name)
        if waiting is None:
            waiting = self._waiting[layout.declared.name] = Waiting(layout, monotonic_s)
        return waiting

    def due(self, monotonic_s: float) -> bool:
        """Say whether a batch must go now."""
        return any(
            monotonic_s - waiting.since_s >= self._batch_s
            or waiting.rows >= self._rows_max
            or waiting.body_bytes >= self._bytes_max
            for waiting in self._waiting.values()
        )

    def take(self) -> list[Waiting]:
        """Return all that waits, impressions first, and hold nothing any more."""
        waiting, self._waiting = self._waiting, {}
        return [waiting[m.declared.name] for m in self._layouts if m.declared.name in waiting]


def cut(
    batch: pa.RecordBatch, chunk_N: I64s, promised: Sequence[int], *, rows_max: int, bytes_max: int
) -> Iterator[Cut | int]:
    """Yield records of at most `rows_max` rows for each partition in `batch`, halved until they fit `bytes_max`.

    `chunk_N` says which chunk a row came from, `promised` has the last promise to each partition. Yields the row's
    number instead where one row alone is too large.
    """
    partitions = len(promised)
    parts_N = hash64_texts(batch.column("key")) % np.uint64(partitions)
    order = np.argsort(parts_N, kind="stable")
    bounds = np.searchsorted(parts_N[order], np.arange(partitions + 1, dtype=np.uint64))
    for partition in range(partitions):
        rows = order[bounds[partition] : bounds[partition + 1]]
        for at in range(0, len(rows), rows_max):
            yield from _fit(batch, chunk_N, partition, promised[partition], rows[at : at + rows_max], bytes_max)


def _fit(
    batch: pa.RecordBatch, chunk_N: I64s, partition: int, promised_ms: int, rows: npt.NDArray[np.int64], bytes_max: int
) -> Iterator[Cut | int]:
    whole = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
    value = encode_batch(whole)
    if len(value) <= bytes_max:
        times = whole.column("event_time_ms").to_numpy()
        newer = times[times > promised_ms]
        oldest = int(newer.min()) if len(newer) else None
        chunks, counts = np.unique(chunk_N[rows], return_counts=True)
        by_chunk = dict(zip(chunks.tolist(), counts.tolist(), strict=True))
        yield Cut(partition, value, len(rows), oldest, int(times.min()), by_chunk)
    elif len(rows) == 1:
        yield int(rows[0])
    else:
        middle = len(rows) // 2
        yield from _fit(batch, chunk_N, partition, promised_ms, rows[:middle], bytes_max)
        yield from _fit(batch, chunk_N, partition, promised_ms, rows[middle:], bytes_max)


def merge(ordinary: pa.RecordBatch, left: I64s, checked: pa.RecordBatch, rows: I64s) -> tuple[pa.RecordBatch, I64s]:
    """Return the batch with the rows `left` of it taken from `checked`, which has `rows` of them; and row numbers."""
    fast = np.delete(np.arange(ordinary.num_rows), left)
    all_rows = np.concatenate([fast, rows])
    order = np.argsort(all_rows, kind="stable")
    table = pa.Table.from_batches([ordinary.take(pa.array(fast)), checked])
    merged = table.take(pa.array(order)).combine_chunks()
    batches = merged.to_batches()
    return batches[0] if batches else checked.slice(0, 0), all_rows[order]
