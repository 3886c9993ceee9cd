"""History through the stream's own join and aggregator, under a clock that is the events' own. Pure.

Events come in order of time. Of each partition they become records as a gateway would have written them:

1. Events up to a point of the aggregator's grid are taken together, at most about `TAKEN_EVENTS`. What is settled
   before an impression's time it brings as served (`shared_counters`).
2. Of each partition rows of one type are one record. Where an impression follows feedback of the same partition key, a
   new record begins: only then does their order matter, to what the partition counts itself and to what waits.
3. Every minute at most comes punctuation, before the first event after it.

What a live stream adds to this is only delay: an aggregate is in the log some milliseconds after its point of the grid.

Every record has an offset that no other has, in any partition: the samples of all partitions have one order. The same
events give the same samples at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import (
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
from headrace.stream.history.shared_counters import EPOCH, GATEWAY, SharedCounters
from headrace.stream.history.sorted_events import Span
from headrace.stream.join.join import JoinState
from headrace.stream.join.payload import Spill

TOLD_MS = 60_000
"""Most time between two punctuations of a partition that has events."""
TAKEN_EVENTS = 50_000

Int64s = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.int8]


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
        self, project: Project, config: Config, *, first_offset: int, spill: Callable[[int], Spill] | None = None
    ) -> None:
        self._first, self._following = first_offset, 0
        self._grid_ms = config.aggregate.grid_ms
        # Early feedback waits by the watermark: a tenth of its time is how exact that is.
        self._told_every_ms = min(TOLD_MS, max(self._grid_ms, config.join.early_feedback_ms // 10))
        self._partitions = [
            _Partition(
                JoinState(
                    project,
                    config.join,
                    silent_ms=config.ingest.silent_ms,
                    partition=p,
                    spill=None if spill is None else spill(p),
                )
            )
            for p in range(config.log.partitions)
        ]
        shared = SharedCounters(project, config)
        self._shared = shared if shared.counters else None
        self._kinds = ["", *(feedback.name for feedback in project.feedback)]

    @property
    def repeats(self) -> int:
        """How many events so far had an id that came before."""
        return sum(each.join.totals.repeated_in_log for each in self._partitions)

    @property
    def unmatched(self) -> dict[str, int]:
        """How many feedback events so far met no impression, by task."""
        found: dict[str, int] = {}
        for each in self._partitions:
            for task, counts in zip(each.join.project.tasks, each.join.totals.tasks, strict=True):
                found[task.name] = found.get(task.name, 0) + counts.orphans + counts.pending
        return found

    def take(self, span: Span) -> Iterator[pa.Table]:
        """Take events, and yield what samples they resolve, in order of their positions."""
        owner_N = np.empty(len(span.kind_N), np.int64)
        for kind, batch in enumerate(span.batches):
            ours_N = span.kind_N == kind
            owner_R = (hash64_texts(batch["key"]) % np.uint64(len(self._partitions))).astype(np.int64)
            owner_N[ours_N] = owner_R[span.row_N[ours_N]]
        # The point of the grid at or after each event: one that lies on it is not before it.
        tick_N = -(-span.time_N // self._grid_ms)
        begin = 0
        while begin < len(tick_N):
            last = min(begin + TAKEN_EVENTS, len(tick_N)) - 1
            end = int(np.searchsorted(tick_N, tick_N[last], "right"))
            ticks_ms = (int(tick_N[begin]) - 1) * self._grid_ms, self._settled_by(int(tick_N[last]), span.end_ms)
            yield from self._take(span, slice(begin, end), owner_N[begin:end], ticks_ms)
            begin = end

    def _settled_by(self, tick: int, end_ms: int) -> int:
        """Return the last point of the grid that no later event lies before: the tick, unless the next span has rows of
        it."""
        return min(tick, end_ms // self._grid_ms) * self._grid_ms

    def end(self, at_ms: int) -> Iterator[pa.Table]:
        """Let time pass up to the end, and yield what it resolves."""
        for number in range(len(self._partitions)):
            self._punctuate(number, at_ms)
        yield from self._joined()

    def _take(self, span: Span, here: slice, owner_N: Int64s, ticks_ms: tuple[int, int]) -> Iterator[pa.Table]:
        kind_N, time_N = span.kind_N[here], span.time_N[here]
        # Each type's rows of this time, in order.
        batches = [batch.take(pa.array(span.row_N[here][kind_N == kind])) for kind, batch in enumerate(span.batches)]
        row_N = np.empty(len(kind_N), np.int64)
        for kind in range(len(batches)):
            row_N[kind_N == kind] = np.arange(batches[kind].num_rows)
        if self._shared is not None:
            records = []
            for number in range(len(self._partitions)):
                for kind, batch in enumerate(batches):
                    rows_N = row_N[(owner_N == number) & (kind_N == kind)]
                    if len(rows_N):
                        records.append((number, self._headers(kind), encode_batch(batch.take(pa.array(rows_N)))))
            settled = self._shared.settle(records, *ticks_ms)
            batches[0] = self._shared.with_values(batches[0], settled)
        keys = [batch["key"].to_pylist() for batch in batches]
        for number in np.unique(owner_N).tolist():
            ours = np.flatnonzero(owner_N == number)
            self._append(number, batches, keys, kind_N[ours], row_N[ours], time_N[ours])
        yield from self._joined()

    def _append(
        self,
        number: int,
        batches: list[pa.RecordBatch],
        keys: list[list[str]],
        kind_N: Kinds,
        row_N: Int64s,
        time_N: Int64s,
    ) -> None:
        """Make records of a partition's events."""
        rows: list[list[int]] = [[] for _ in batches]
        answered: set[str] = set()

        def flush() -> None:
            for kind, some in enumerate(rows):
                if some:
                    value = encode_batch(batches[kind].take(pa.array(some, pa.int64())))
                    self._add(number, self._headers(kind), value)
                    some.clear()
            answered.clear()

        due_ms = self._partitions[number].told_ms + self._told_every_ms
        for kind, row, time_ms in zip(kind_N.tolist(), row_N.tolist(), time_N.tolist(), strict=True):
            if time_ms > due_ms:
                flush()
                self._punctuate(number, time_ms - 1)
                due_ms = time_ms - 1 + self._told_every_ms
            key = keys[kind][row]
            if kind:
                answered.add(key)
            elif key in answered:
                flush()
            rows[kind].append(row)
        flush()

    def _punctuate(self, number: int, time_ms: int) -> None:
        """Tell a partition's join how far time is."""
        partition = self._partitions[number]
        if time_ms > partition.told_ms:
            partition.told_ms = time_ms
            self._add(number, {"kind": PUNCTUATION}, encode_punctuation(Punctuation(GATEWAY, EPOCH, time_ms)))

    def _joined(self) -> Iterator[pa.Table]:
        """Let each join take its records; yield the samples in order."""
        found: list[pa.Table] = []
        for number, partition in enumerate(self._partitions):
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

    def _headers(self, kind: int) -> dict[str, str]:
        return {"kind": FEEDBACK, "type": self._kinds[kind]} if kind else {"kind": IMPRESSION}

    def _add(self, number: int, headers: dict[str, str], value: bytes) -> None:
        record = Record(GATEWAY, number, self._following, None, value, headers, 0)
        self._following += 1
        self._partitions[number].records.append(record)
