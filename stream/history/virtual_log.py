"""History through the stream's own join and aggregator, under a clock that is the events' own. Pure.

Events come in order of time. Of each partition they become records as a gateway would have written them, and a clock
ticks between them:

1. Rows that follow one another in a partition and are of one type are one record.
2. Before the first event beyond a point of the grid comes punctuation up to that point: the aggregator settles its
   counters as of then, and what it settles is in every partition before the event.
3. Of each partition the join takes its records many at a time, which changes nothing but the time it takes.

What a live stream adds to this is only delay: an aggregate is in the log some milliseconds after its point of the grid.

Every record has an offset that no other has, in any partition: the samples of all partitions have one order. The same
events give the same samples at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    Punctuation,
    encode_batch,
    encode_punctuation,
)
from headrace.contract.formats.positions import orders
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.kernels.hashes import hash64_texts
from headrace.stream.aggregate.core import AggregatorState, Settled
from headrace.stream.history.sorted_events import Span
from headrace.stream.join.join import JoinState
from headrace.stream.join.payload import Spill

TOPIC = "history"
ALONE_MS = 60_000
"""Between two ticks where no counter needs all partitions."""
TAKEN_EVENTS = 50_000
"""So many events are joined together: samples come out after them."""
EPOCH = 1
GATEWAY = "history"

Int64s = npt.NDArray[np.int64]


@dataclass
class _Partition:
    join: JoinState
    records: list[Record] = field(default_factory=list)
    told_ms: int = -1
    """The time up to which it was punctuated."""


class VirtualLog:
    """Joins one history.

    Args:
        first_offset: the first record's.
        spill: makes what keeps a partition's waiting impressions beyond `join.payload_bytes`.
    """

    def __init__(
        self,
        project: Project,
        config: Config,
        *,
        first_offset: int,
        spill: Callable[[int], Spill] | None = None,
    ) -> None:
        self._project, self._first, self._following = project, first_offset, 0
        silent_ms = config.ingest.silent_ms
        self._partitions = [
            _Partition(
                JoinState(
                    project,
                    config.join,
                    silent_ms=silent_ms,
                    partition=p,
                    spill=None if spill is None else spill(p),
                )
            )
            for p in range(config.log.partitions)
        ]
        key, counters = project.impression.key, project.features.counters
        self._shared: AggregatorState | None = None
        self._tick_ms = ALONE_MS
        if any(not counter.is_local(key) for counter in counters):
            self._tick_ms = config.aggregate.grid_ms
            self._shared = AggregatorState(
                project,
                config.log.partitions,
                grid_ms=config.aggregate.grid_ms,
                silent_ms=silent_ms,
                horizon_ms=config.join.repeat_horizon_ms,
            )
        self._kinds = ["", *(feedback.name for feedback in project.feedback)]
        self._reached_ms = -1
        """The tick up to which all was punctuated that must be."""
        self._waiting = 0

    @property
    def repeats(self) -> int:
        """How many events so far had an id that came before."""
        return sum(each.join.totals.repeated_in_log for each in self._partitions)

    def take(self, span: Span) -> Iterator[pa.Table]:
        """Take events, and yield what samples they resolve, in order of their positions."""
        partition_N = np.empty(len(span.kind_N), np.int64)
        for kind, batch in enumerate(span.batches):
            ours_N = span.kind_N == kind
            owner_R = (hash64_texts(batch["key"]) % np.uint64(len(self._partitions))).astype(np.int64)
            partition_N[ours_N] = owner_R[span.row_N[ours_N]]
        # The tick at or after each event: an event at a point of the grid lies before its punctuation.
        tick_N = -(-span.time_N // self._tick_ms)
        begins = np.flatnonzero(np.r_[True, tick_N[1:] != tick_N[:-1]]) if len(tick_N) else np.zeros(0, np.int64)
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(tick_N)], strict=True):
            self._reach((int(tick_N[begin]) - 1) * self._tick_ms)
            here = slice(begin, end)
            self._append(span, span.kind_N[here], span.row_N[here], partition_N[here])
            self._waiting += end - begin
            if self._waiting >= TAKEN_EVENTS:
                yield from self._joined()

    def end(self, at_ms: int) -> Iterator[pa.Table]:
        """Let time pass up to the end, and yield what it resolves."""
        last_ms = max(at_ms, self._reached_ms)
        for number in range(len(self._partitions)):
            self._punctuate(number, last_ms)
        yield from self._joined()

    def _reach(self, tick_ms: int) -> None:
        """Settle counters up to a tick."""
        if tick_ms <= self._reached_ms:
            return
        self._reached_ms = tick_ms
        if self._shared is None:
            return
        settled: list[Settled] = []
        value = encode_punctuation(Punctuation(GATEWAY, EPOCH, tick_ms))
        for partition in range(len(self._partitions)):
            record = self._record(partition, PUNCTUATION, value)
            settled += self._shared.take(record)
        shared = [each for each in settled if each.is_shared]
        if not shared:
            return
        columns = [
            pa.array([each.counter for each in shared], pa.string()),
            pa.array([each.key for each in shared], pa.string()),
            pa.array([each.as_of_ms for each in shared], pa.int64()),
            pa.array([EPOCH] * len(shared), pa.int64()),
            pa.array([each.counts for each in shared], pa.list_(pa.float32())),
        ]
        values = encode_batch(pa.RecordBatch.from_arrays(columns, schema=AGGREGATE_SCHEMA))
        for number, partition in enumerate(self._partitions):
            partition.records.append(self._record(number, AGGREGATE, values))

    def _punctuate(self, number: int, time_ms: int) -> None:
        """Tell a partition's join how far time is."""
        partition = self._partitions[number]
        if time_ms > partition.told_ms:
            partition.told_ms = time_ms
            value = encode_punctuation(Punctuation(GATEWAY, EPOCH, time_ms))
            partition.records.append(self._record(number, PUNCTUATION, value))

    def _append(self, span: Span, kind_N: npt.NDArray[np.int8], row_N: Int64s, partition_N: Int64s) -> None:
        """Give the events between two ticks to their partitions: as records, cut where the type changes."""
        for number in np.unique(partition_N).tolist():
            self._punctuate(number, self._reached_ms)
            ours = np.flatnonzero(partition_N == number)
            kinds, rows = kind_N[ours], row_N[ours]
            cuts = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(ours)]
            for begin, end in pairwise(cuts):
                kind = int(kinds[begin])
                some = span.batches[kind].take(pa.array(rows[begin:end]))
                record = self._record(number, FEEDBACK if kind else IMPRESSION, encode_batch(some), self._kinds[kind])
                self._partitions[number].records.append(record)
                if self._shared is not None:
                    self._shared.take(record)

    def _joined(self) -> Iterator[pa.Table]:
        """Let each join take its records; yield the samples in order."""
        self._waiting = 0
        found: list[pa.Table] = []
        for number, partition in enumerate(self._partitions):
            self._punctuate(number, self._reached_ms)
            records, partition.records = partition.records, []
            emitted = partition.join.take_all(records)
            if partition.join.totals.bad_records:
                raise InvariantBroken(f"the join can't read a record of imported history, partition {number}.")
            if emitted is not None:
                found.append(pa.Table.from_batches([emitted.batch]))
        if not found:
            return
        rows = pa.concat_tables(found).combine_chunks()
        for name in ("offset", "impression_offset"):
            at = rows.schema.get_field_index(name)
            shifted = pa.array(rows[name].to_numpy() + self._first)
            rows = rows.set_column(at, rows.schema.field(at), shifted)
        order_N = np.argsort(orders(rows["offset"].to_numpy(), rows["rank"].to_numpy()))
        yield rows.take(pa.array(order_N)).combine_chunks()

    def _record(self, partition: int, kind: str, value: bytes, name: str = "") -> Record:
        headers = {"kind": kind} | ({"type": name} if name else {})
        offset, self._following = self._following, self._following + 1
        return Record(TOPIC, partition, offset, None, value, headers, 0)
