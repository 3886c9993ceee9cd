"""The join: impressions and feedback of one partition to samples. Pure: a function of the partition's order.

1. A record that was taken already (offset at or below the state's) is ignored.
2. Rows whose event id was seen within the horizon are dropped (`repeated_in_log`).
3. An impression is featurized from what precedes it, then waits for each task's feedback until
   max(its time, the watermark when it was read) + the task's window.
4. Feedback in time makes a positive at once; feedback that comes first waits for its impression.
5. Punctuation moves the watermark; what has expired by then becomes negative, in the order (expiry, offset, row, task).
   A task with the eager policy says negative when the impression comes; its positive is a correction.

Samples that one record resolves get ranks 0, 1, 2 ...; (offset, rank) is a sample's position. Records may be taken
several at once: features and samples are then made together, which changes nothing but the time it takes.

Legend: N rows of a record, L labels, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import JoinConfig
from headrace.contract.errors import EventRejected, Overloaded
from headrace.contract.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    EXTERNAL,
    EXTERNAL_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    decode_batch,
    decode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.hashing import hash_text
from headrace.contract.log import Record
from headrace.contract.positions import START, Position
from headrace.contract.project import Project
from headrace.contract.sample import list_column, sample_schema
from headrace.stream.aggregates import Aggregates
from headrace.stream.counting import CountingTable
from headrace.stream.early import EarlyFeedback
from headrace.stream.external import ExternalMemory
from headrace.stream.features.counters import amounts, feeds
from headrace.stream.features.featurize import featurize
from headrace.stream.matching import (
    CODE,
    CORRECTION,
    ID,
    NEGATIVE,
    SEQ,
    TASK,
    TIME,
    Tables,
    take_feedback,
    take_impressions,
)
from headrace.stream.memory import Memory
from headrace.stream.payload import Payload, Spill
from headrace.stream.pending import Pending
from headrace.stream.rings import I64s, U64s, hash_texts, with_numbers
from headrace.stream.watermark import Watermark

# Columns of a sample that the label decides; all others are the impression's and kept while it waits.
LABEL_COLUMNS = ("partition", "offset", "rank", "task", "label", "weight", "feedback_id", "feedback_time_ms")

# One byte of memory a resolved request: a bit a task.
TASKS_MAX = 8


@dataclass(slots=True)
class TaskCounts:
    """Totals of one task since the log began; impressions = positives + negatives + waiting."""

    impressions: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0


@dataclass(slots=True)
class Totals:
    """Rows by what became of them, since the log began."""

    impressions: int = 0
    feedback: int = 0
    repeated_in_log: int = 0
    bad_records: int = 0
    tasks: list[TaskCounts] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Emitted:
    """The samples that records resolved: positions > `after` and <= `last`."""

    batch: pa.RecordBatch
    after: Position
    last: Position


class _Gathered:
    """What several records gave so far: rows to featurize and labels to emit, in order."""

    def __init__(self) -> None:
        self.impressions: list[pa.RecordBatch] = []
        self.labels: list[I64s] = []
        self.offsets: list[I64s] = []
        self.released: list[I64s] = []
        """Sequence numbers of impressions whose eager negative has become the last word."""
        self.ids: list[pa.Array] = []
        self.ids_rows = 0

    def label(self, labels_L5: I64s, offset: int, ids: pa.Array | None) -> None:
        """Add the labels of one record, whose feedback ids are `ids`."""
        rows_L = labels_L5[:, ID]
        if ids is not None:
            rows_L[rows_L >= 0] += self.ids_rows
            self.ids.append(ids)
            self.ids_rows += len(ids)
        self.labels.append(labels_L5)
        self.offsets.append(np.full(len(labels_L5), offset, np.int64))


class JoinState:
    """The whole state of one partition; `take` and `take_all` are its only ways on."""

    def __init__(
        self, project: Project, config: JoinConfig, *, silent_ms: int, partition: int, spill: Spill | None = None
    ) -> None:
        self.project, self.config, self.partition = project, config, partition
        self.spec = project.features
        self.digest = self.spec.digest()
        self.schema = sample_schema(project)
        self._impression_schema = impression_schema(project)
        self._feedback_schemas = {f.name: feedback_schema(project, f) for f in project.feedback}
        kept = [f for f in self.schema if f.name not in LABEL_COLUMNS]
        self.source_schema = pa.schema(kept)
        self.offset = -1
        self.last = START
        self.watermark = Watermark(silent_ms)
        self._rows = Totals()
        tasks, key = project.tasks[:TASKS_MAX], project.impression.key
        self._task_names = pa.array([task.name for task in tasks], pa.string())
        self._windows_T = np.array([task.window_ms for task in tasks], np.int64)
        self._eager_T = np.array([task.policy == "eager" for task in tasks], np.uint8)
        self._weights_T = np.array([task.correction_weight for task in tasks], np.float32)
        self.locals = [CountingTable(c) for c in self.spec.counters if c.key == key]
        self.aggregates = Aggregates([c for c in self.spec.counters if c.key != key])
        self.external = ExternalMemory(project.crawls)
        self.seen = Memory(config.repeat_horizon_ms)
        self.resolved = Memory(config.resolved_ms)
        self.pending = Pending(self._windows_T.tolist())
        tasks_K = [sum(1 << i for i, t in enumerate(tasks) if t.feedback == f.name) for f in project.feedback]
        self.early = EarlyFeedback(np.array(tasks_K, np.uint8), config.early_feedback_ms)
        self.payload = Payload(f"p{partition}", spill=spill, memory_bytes=config.payload_bytes)

    @property
    def totals(self) -> Totals:
        """What became of all rows so far."""
        tasks = [TaskCounts(*counts) for counts in self.pending.arrays.counts_T9.tolist()]
        return replace(self._rows, tasks=tasks)

    def row_totals(self) -> list[int]:
        """Return the totals that no task has, for a snapshot."""
        rows = self._rows
        return [rows.impressions, rows.feedback, rows.repeated_in_log, rows.bad_records]

    def load_totals(self, totals: Sequence[int]) -> None:
        """Take over what `row_totals` gave."""
        impressions, feedback, repeated_in_log, bad_records = totals
        self._rows = Totals(impressions, feedback, repeated_in_log, bad_records)

    def take(self, record: Record) -> Emitted | None:
        """Apply one record of the partition and return the samples that it resolved, if any; see `take_all`."""
        return self.take_all((record,))

    def take_all(self, records: Sequence[Record]) -> Emitted | None:
        """Apply records of the partition in order and return the samples that they resolved, if any.

        A record at or below `offset` is ignored. One that can't be decoded is counted (`bad_records`) and changes
        nothing else: the same every time the log is read.

        Raises `Overloaded` when more than `join.pending_max` impressions wait; the state is of no use then.
        """
        gathered = _Gathered()
        for record in records:
            if record.offset <= self.offset or record.value is None:
                continue
            try:
                self._take(record, record.value, gathered)
            except (EventRejected, msgspec.DecodeError):
                self._rows.bad_records += 1
            self.offset = record.offset
        if gathered.impressions:
            self._keep(gathered.impressions)
        emitted = self._emit(gathered) if gathered.labels else None
        for seq_L in gathered.released:
            self.payload.release(seq_L)
        self.early.forget_ids()
        return emitted

    def _take(self, record: Record, value: bytes, gathered: _Gathered) -> None:
        kind, name = record.headers.get("kind", ""), record.headers.get("type", "")
        if kind == PUNCTUATION:
            self._take_time(self.watermark.take(decode_punctuation(value)), record.offset, gathered)
        elif kind == IMPRESSION:
            self._take_impressions(_checked(decode_batch(value, self._impression_schema)), record.offset, gathered)
        elif kind == FEEDBACK and name in self._feedback_schemas:
            self._take_feedback(name, _checked(decode_batch(value, self._feedback_schemas[name])), record, gathered)
        elif kind == AGGREGATE:
            self.aggregates.take(decode_batch(value, AGGREGATE_SCHEMA))
        elif kind == EXTERNAL:
            self.external.take(decode_batch(value, EXTERNAL_SCHEMA))

    def _tables(self) -> Tables:
        return Tables(
            self.seen.arrays,
            self.resolved.arrays,
            self.pending.arrays,
            self.early.arrays,
            self._windows_T,
            self._eager_T,
        )

    # Time

    def _take_time(self, watermark_ms: int, offset: int, gathered: _Gathered) -> None:
        seq_L, task_L = self.pending.expired(watermark_ms)
        if len(seq_L):
            self.resolved.reserve(len(seq_L))
            self.pending.close(seq_L, task_L, self.resolved.arrays)
            told_L = self._eager_T[task_L] == 1
            if told_L.any():
                gathered.released.append(seq_L[told_L])
                seq_L, task_L = seq_L[~told_L], task_L[~told_L]
            labels_L5 = np.full((len(seq_L), 5), -1, np.int64)
            labels_L5[:, SEQ], labels_L5[:, TASK], labels_L5[:, CODE] = seq_L, task_L, NEGATIVE
            if len(seq_L):
                gathered.label(labels_L5, offset, None)
        self.pending.let_go()
        self.early.advance(watermark_ms, self.pending.arrays.counts_T9)
        self.seen.advance(watermark_ms)
        self.resolved.advance(watermark_ms)
        self.aggregates.advance(watermark_ms)
        for counter in self.locals:
            counter.advance(watermark_ms)

    # Impressions

    def _take_impressions(self, batch: pa.RecordBatch, offset: int, gathered: _Gathered) -> None:
        rows, tasks = batch.num_rows, len(self._windows_T)
        for table in (self.seen, self.pending):
            table.reserve(rows)
        self.resolved.reserve(rows)
        fresh_N, labels_L5 = np.empty(rows, np.int32), np.empty((2 * rows * tasks, 5), np.int64)
        fresh, labels = take_impressions(
            self._tables(), *_keys(batch, IMPRESSION), _numbers(batch, 4), self.watermark.time_ms, fresh_N, labels_L5
        )
        self._rows.repeated_in_log += rows - fresh
        self._rows.impressions += fresh
        if not fresh:
            return
        if len(self.pending) > self.config.pending_max:
            raise Overloaded(
                f"partition {self.partition}: {len(self.pending)} impressions wait for feedback and "
                f"join.pending_max allows {self.config.pending_max}; the watermark is {self.watermark.time_ms} ms. If "
                "it stands still, look for a gateway that stopped punctuating; if it moves, raise join.pending_max."
            )
        fresh_N = fresh_N[:fresh]
        kept = batch if fresh == rows else batch.take(pa.array(fresh_N))
        gathered.impressions.append(self._counted(kept, offset, fresh_N))
        if labels:
            gathered.label(labels_L5[:labels], offset, None)

    def _counted(self, batch: pa.RecordBatch, offset: int, record_rows_N: npt.NDArray[Any]) -> pa.RecordBatch:
        """Return the batch with its counters, as served or else as known here and now, and count it, row after row."""
        times_N = _numbers(batch, 4)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        keys_N2 = hash_texts(batch.column(3), 0)
        for table in self.locals:
            ours = feeds(table.counter, IMPRESSION)
            amounts_FN = np.array([amounts(feed, batch) for feed in ours], np.int64).reshape(len(ours), batch.num_rows)
            values_NE = table.take(keys_N2, times_N, ours, amounts_FN, read=True)
            columns |= _as_columns(table.counter.columns(), values_NE, batch)
        for counter in self.aggregates.counters.values():
            values_NE = self.aggregates.values(counter, batch.column(counter.key), times_N)
            columns |= _as_columns(counter.columns(), values_NE, batch)
        columns |= self.external.columns(columns, times_N)
        columns["impression_offset"] = pa.array(np.full(batch.num_rows, offset, dtype=np.int64))
        columns["impression_row"] = pa.array(record_rows_N)
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    def _keep(self, batches: list[pa.RecordBatch]) -> None:
        """Featurize impressions and keep what their samples will hold."""
        batch = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        slots_NF, numeric_ND = featurize(columns, self.spec)
        columns["slots"] = list_column(slots_NF, pa.int64())
        columns["numeric"] = list_column(numeric_ND, pa.float32())
        columns["spec"] = pa.repeat(pa.scalar(self.digest, pa.string()), batch.num_rows)
        kept = pa.RecordBatch.from_arrays([columns[f.name] for f in self.source_schema], schema=self.source_schema)
        self.payload.append(
            self.pending.following - batch.num_rows, kept, len(self._windows_T) + int(self._eager_T.sum())
        )

    # Feedback

    def _take_feedback(self, name: str, batch: pa.RecordBatch, record: Record, gathered: _Gathered) -> None:
        rows, tasks = batch.num_rows, len(self._windows_T)
        for table in (self.seen, self.early):
            table.reserve(rows)
        self.resolved.reserve(rows)
        fresh_N, early_N = np.empty(rows, np.int32), np.empty(rows, np.int64)
        labels_L5 = np.empty((rows * tasks, 5), np.int64)
        kind = list(self._feedback_schemas).index(name)
        times_N = _numbers(batch, 4)
        fresh, labels = take_feedback(
            self._tables(), kind, *_keys(batch, f"{FEEDBACK}\x00{name}"), times_N, self.watermark.time_ms,
            self.config.pending_max, fresh_N, labels_L5, early_N,
        )  # fmt: skip
        self._rows.repeated_in_log += rows - fresh
        self._rows.feedback += fresh
        self._count_feedback(name, batch if fresh == rows else batch.take(pa.array(fresh_N[:fresh])))
        for row in np.flatnonzero(early_N >= 0).tolist():
            self.early.ids[int(early_N[row])] = batch.column(0)[row].as_py()
        if labels:
            gathered.label(labels_L5[:labels], record.offset, batch.column(0))

    def _count_feedback(self, name: str, batch: pa.RecordBatch) -> None:
        counted = [(table, ours) for table in self.locals if (ours := feeds(table.counter, name))]
        if not counted:
            return
        keys_N2, times_N = hash_texts(batch.column(3), 0), _numbers(batch, 4)
        for table, ours in counted:
            amounts_FN = np.array([amounts(feed, batch) for feed in ours], np.int64)
            table.take(keys_N2, times_N, ours, amounts_FN, read=False)

    # Samples

    def _emit(self, gathered: _Gathered) -> Emitted:
        """Return the samples in order, ranked within the record that resolved them."""
        labels_L5, offset_L = np.concatenate(gathered.labels), np.concatenate(gathered.offsets)
        count = len(labels_L5)
        first_L = np.flatnonzero(np.concatenate([[True], offset_L[1:] != offset_L[:-1]]))
        rank_L = np.arange(count) - np.repeat(first_L, np.diff(np.concatenate([first_L, [count]])))
        kept = self.payload.take(labels_L5[:, SEQ])
        columns = {name: kept.column(i) for i, name in enumerate(self.source_schema.names)}
        positive_L, one = labels_L5[:, CODE] != NEGATIVE, np.float32(1.0)
        columns |= {
            "partition": pa.array(np.full(count, self.partition, dtype=np.int32)),
            "offset": pa.array(offset_L),
            "rank": pa.array(rank_L.astype(np.int32)),
            "task": self._task_names.take(pa.array(labels_L5[:, TASK])),
            "label": pa.array(positive_L.astype(np.float32)),
            "weight": pa.array(np.where(labels_L5[:, CODE] == CORRECTION, self._weights_T[labels_L5[:, TASK]], one)),
            "feedback_id": self._feedback_ids(labels_L5[:, ID], gathered.ids),
            "feedback_time_ms": pa.array(labels_L5[:, TIME], mask=~positive_L),
        }
        after, self.last = self.last, Position(int(offset_L[-1]), int(rank_L[-1]))
        batch = pa.RecordBatch.from_arrays([columns[f.name] for f in self.schema], schema=self.schema)
        return Emitted(batch, after, self.last)

    def _feedback_ids(self, id_L: I64s, ids: list[pa.Array]) -> pa.Array:
        early_L = np.flatnonzero(id_L <= -2)
        known = pa.concat_arrays(ids) if ids else pa.array([], pa.string())
        row_L = id_L.copy()
        if len(early_L):
            texts = [self.early.ids[-2 - seq] for seq in id_L[early_L].tolist()]
            row_L[early_L] = len(known) + np.arange(len(early_L))
            known = pa.concat_arrays([known, pa.array(texts, pa.string())])
        return known.take(pa.array(row_L, mask=row_L < 0))


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    for i in range(5):
        if batch.column(i).null_count:
            raise EventRejected("bad_batch", f"column {batch.schema.names[i]!r} has nulls")
    return batch


def _keys(batch: pa.RecordBatch, salt: str) -> tuple[U64s, U64s]:
    """Return the keys of the event ids and of what they answer: (request, place)."""
    return hash_texts(batch.column(0), hash_text(salt)), with_numbers(
        hash_texts(batch.column(1), 0), _numbers(batch, 2)
    )


def _numbers(batch: pa.RecordBatch, column: int) -> I64s:
    numbers_N: I64s = batch.column(column).to_numpy()
    return numbers_N


def _as_columns(names: tuple[str, ...], known_NE: npt.NDArray[Any], batch: pa.RecordBatch) -> dict[str, pa.Array]:
    columns = {}
    for i, name in enumerate(names):
        served = batch.column(name)
        known = pa.array(known_NE[:, i].astype(np.float32))
        columns[name] = known if served.null_count == batch.num_rows else pc.coalesce(served, known)
    return columns
