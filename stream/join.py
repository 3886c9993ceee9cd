"""The join: impressions and feedback of one partition to samples. Pure: a function of the partition's order.

1. A record that was taken already (offset at or below the state's) is ignored.
2. Rows whose event id was seen within the horizon are dropped (`repeated_in_log`).
3. An impression is featurized from what precedes it, then waits for each task's feedback until
   max(its time, the watermark when it was read) + the task's window.
4. Feedback in time makes a positive at once; feedback that comes first waits for its impression.
5. Punctuation moves the watermark; what has expired by then becomes negative, in the order (expiry, offset, row, task).

Samples that one record resolves get ranks 0, 1, 2 ...; (offset, rank) is a sample's position.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import JoinConfig
from headrace.contract.errors import EventRejected, Overloaded
from headrace.contract.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    decode_batch,
    decode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.log import Record
from headrace.contract.positions import START, Position
from headrace.contract.project import Project
from headrace.contract.sample import list_column, sample_schema
from headrace.stream.aggregates import Aggregates
from headrace.stream.features.counters import CounterState, key_strings
from headrace.stream.features.featurize import featurize
from headrace.stream.memory import Memory, key_of
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
class Waiting:
    """One impression that waits: where its columns lie, and which tasks (bits) are open or became positive."""

    source: int
    row: int
    offset: int
    record_row: int
    event_time_ms: int
    base_ms: int
    open: int
    positive: int = 0


@dataclass(slots=True)
class Source:
    """Columns of impressions that came together, kept while `live` (impression, task) pairs are open."""

    batch: pa.RecordBatch
    live: int


@dataclass(frozen=True, slots=True)
class Emitted:
    """The samples that one record resolved: positions > `after` and <= `last`."""

    batch: pa.RecordBatch
    after: Position
    last: Position


@dataclass(slots=True)
class _Label:
    source: int
    row: int
    task: int
    label: float
    feedback_id: str | None = None
    feedback_time_ms: int | None = None


@dataclass(slots=True)
class Early:
    """Feedback that came before its impression."""

    feedback_id: str
    event_time_ms: int
    deadline_ms: int


@dataclass(slots=True)
class Totals:
    """Rows by what became of them, since the log began."""

    impressions: int = 0
    feedback: int = 0
    repeated_in_log: int = 0
    bad_records: int = 0
    tasks: list[TaskCounts] = field(default_factory=list)


class JoinState:
    """The whole state of one partition; `take` is its only way on."""

    def __init__(self, project: Project, config: JoinConfig, *, silent_ms: int, partition: int) -> None:
        self.project, self.config, self.partition = project, config, partition
        self.spec = project.features
        self.digest = self.spec.digest()
        self.schema = sample_schema(project)
        self._impression_schema = impression_schema(project)
        self._feedback_schemas = {f.name: feedback_schema(project, f) for f in project.feedback}
        kept = [f for f in self.schema if f.name not in LABEL_COLUMNS]
        self.source_schema = pa.schema(kept)
        key = project.impression.key
        self.offset = -1
        self.last = START
        self.watermark = Watermark(silent_ms)
        self.totals = Totals(tasks=[TaskCounts() for _ in project.tasks[:TASKS_MAX]])
        self.locals = [CounterState(c) for c in self.spec.counters if c.key == key]
        self.aggregates = Aggregates([c for c in self.spec.counters if c.key != key])
        self.seen = Memory(config.repeat_horizon_ms)
        self.resolved = Memory(config.resolved_ms)
        self.waiting: dict[bytes, Waiting] = {}
        self.sources: dict[int, Source] = {}
        self.early: dict[tuple[bytes, str], list[Early]] = {}
        self.early_rows = 0
        self.expiries: list[tuple[int, int, int, int, bytes]] = []
        self.deadlines: list[tuple[int, bytes, str]] = []
        self.next_source = 0
        self._tasks_of = {
            f.name: [i for i, t in enumerate(project.tasks[:TASKS_MAX]) if t.feedback == f.name]
            for f in project.feedback
        }

    def take(self, record: Record) -> Emitted | None:
        """Apply one record of the partition and return the samples that it resolved, if any.

        A record at or below `offset` is ignored. One that can't be decoded is counted (`bad_records`) and changes
        nothing else: the same every time the log is read.

        Raises `Overloaded` when more than `join.pending_max` impressions wait.
        """
        if record.offset <= self.offset or record.value is None:
            return None
        labels: list[_Label] = []
        kind = record.headers.get("kind", "")
        try:
            if kind == PUNCTUATION:
                self._take_time(self.watermark.take(decode_punctuation(record.value)), labels)
            elif kind == IMPRESSION:
                self._take_impressions(decode_batch(record.value, self._impression_schema), record.offset, labels)
            elif kind == FEEDBACK and record.headers.get("type", "") in self._feedback_schemas:
                name = record.headers["type"]
                self._take_feedback(name, decode_batch(record.value, self._feedback_schemas[name]), labels)
            elif kind == AGGREGATE:
                self.aggregates.take(decode_batch(record.value, AGGREGATE_SCHEMA))
        except EventRejected:
            self.totals.bad_records += 1
        self.offset = record.offset
        return self._emit(record.offset, labels) if labels else None

    # Time

    def _take_time(self, watermark_ms: int, labels: list[_Label]) -> None:
        while self.expiries and self.expiries[0][0] <= watermark_ms:
            _, offset, row, task, key = heapq.heappop(self.expiries)
            waiting = self.waiting.get(key)
            # A positive has left its expiry behind; (offset, row) tells it from a later impression of the same key.
            if waiting is None or (waiting.offset, waiting.record_row) != (offset, row) or not waiting.open >> task & 1:
                continue
            self._resolve(key, waiting, task, _Label(waiting.source, waiting.row, task, 0.0), labels)
        while self.deadlines and self.deadlines[0][0] <= watermark_ms:
            _, key, name = heapq.heappop(self.deadlines)
            rows = self.early.get((key, name), [])
            kept = [r for r in rows if r.deadline_ms > watermark_ms]
            self._forget_early(key, name, rows, kept)
        self.seen.advance(watermark_ms)
        self.resolved.advance(watermark_ms)
        self.aggregates.advance(watermark_ms)
        for counter in self.locals:
            counter.advance(watermark_ms)

    def _forget_early(self, key: bytes, name: str, rows: list[Early], kept: list[Early]) -> None:
        gone = len(rows) - len(kept)
        self.early_rows -= gone
        for task in self._tasks_of[name]:
            self.totals.tasks[task].pending -= gone
            self.totals.tasks[task].orphans += gone
        if kept:
            self.early[key, name] = kept
        else:
            self.early.pop((key, name), None)

    # Impressions

    def _take_impressions(self, batch: pa.RecordBatch, offset: int, labels: list[_Label]) -> None:
        fresh: list[int] = []
        keys: list[bytes] = []
        ids, requests, places = (batch.column(i).to_pylist() for i in range(3))
        new: set[bytes] = set()
        for row, (event_id, request, place) in enumerate(zip(ids, requests, places, strict=True)):
            seen, key = key_of(IMPRESSION, event_id), key_of(request, str(place))
            known = key in new or key in self.waiting or self.resolved.get(key) is not None
            if known or self.seen.get(seen) is not None:
                self.totals.repeated_in_log += 1
                continue
            self.seen.put(seen)
            new.add(key)
            fresh.append(row)
            keys.append(key)
        if not fresh:
            return
        if len(self.waiting) + len(fresh) > self.config.pending_max:
            raise Overloaded(
                f"partition {self.partition}: {len(self.waiting) + len(fresh)} impressions wait for feedback and "
                f"join.pending_max allows {self.config.pending_max}; the watermark is {self.watermark.time_ms} ms. If "
                "it stands still, look for a gateway that stopped punctuating; if it moves, raise join.pending_max."
            )
        kept = batch if len(fresh) == batch.num_rows else batch.take(pa.array(fresh, pa.int64()))
        tasks = len(self.totals.tasks)
        source = self.next_source
        self.next_source += 1
        self.sources[source] = Source(self._featurized(kept, offset, fresh), len(fresh) * tasks)
        self.totals.impressions += len(fresh)
        for row, (record_row, key, time_ms) in enumerate(
            zip(fresh, keys, kept.column("event_time_ms").to_pylist(), strict=True)
        ):
            self._admit(key, source, row, offset, record_row, time_ms, labels)

    def _admit(
        self, key: bytes, source: int, row: int, offset: int, record_row: int, time_ms: int, labels: list[_Label]
    ) -> None:
        tasks = range(len(self.totals.tasks))
        base_ms = max(time_ms, self.watermark.time_ms)
        waiting = Waiting(source, row, offset, record_row, time_ms, base_ms, open=(1 << len(tasks)) - 1)
        self.waiting[key] = waiting
        for task in tasks:
            counts = self.totals.tasks[task]
            counts.impressions += 1
            counts.waiting += 1
            expiry_ms = base_ms + self.project.tasks[task].window_ms
            heapq.heappush(self.expiries, (expiry_ms, offset, record_row, task, key))
        for name, of in self._tasks_of.items():
            for early in self.early.pop((key, name), ()):
                self.early_rows -= 1
                for task in of:
                    self.totals.tasks[task].pending -= 1
                self._answer(key, name, early.feedback_id, early.event_time_ms, labels)

    def _featurized(self, batch: pa.RecordBatch, offset: int, rows: list[int]) -> pa.RecordBatch:
        """Return the columns of `source_schema`: counters as served, else as known here and now."""
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        columns |= self._counted(batch)
        slots_NF, numeric_ND = featurize(columns, self.spec)
        columns["impression_offset"] = pa.array(np.full(batch.num_rows, offset, dtype=np.int64))
        columns["impression_row"] = pa.array(rows, pa.int32())
        columns["slots"] = list_column(slots_NF, pa.int64())
        columns["numeric"] = list_column(numeric_ND, pa.float32())
        columns["spec"] = pa.array([self.digest] * batch.num_rows, pa.string())
        return pa.RecordBatch.from_arrays([columns[f.name] for f in self.source_schema], schema=self.source_schema)

    def _counted(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """Return the counter columns and count the impressions, row after row."""
        times = batch.column("event_time_ms").to_pylist()
        keys = batch.column("key").to_pylist()
        columns: dict[str, pa.Array] = {}
        for state in self.locals:
            entry = state.counter.counts.index(IMPRESSION) if IMPRESSION in state.counter.counts else -1
            values = []
            for key, time_ms in zip(keys, times, strict=True):
                values.append(state.value(key, time_ms))
                if entry >= 0:
                    state.add(key, entry, time_ms)
            columns |= _as_columns(state.counter.columns(), values, batch)
        for counter in self.aggregates.counters.values():
            others = key_strings(batch.column(counter.key))
            nothing = (0.0,) * len(counter.counts)
            found = [
                nothing if key is None else self.aggregates.value(counter.name, key, time_ms)
                for key, time_ms in zip(others, times, strict=True)
            ]
            columns |= _as_columns(counter.columns(), found, batch)
        return columns

    # Feedback

    def _take_feedback(self, name: str, batch: pa.RecordBatch, labels: list[_Label]) -> None:
        counted = [(s, s.counter.counts.index(name)) for s in self.locals if name in s.counter.counts]
        rows = zip(*(batch.column(i).to_pylist() for i in range(5)), strict=True)
        for event_id, request, place, partition_key, time_ms in rows:
            seen = key_of(FEEDBACK, name, event_id)
            if self.seen.get(seen) is not None:
                self.totals.repeated_in_log += 1
                continue
            self.seen.put(seen)
            self.totals.feedback += 1
            for state, entry in counted:
                state.add(partition_key, entry, time_ms)
            self._answer(key_of(request, str(place)), name, event_id, time_ms, labels)

    def _answer(self, key: bytes, name: str, event_id: str, time_ms: int, labels: list[_Label]) -> None:
        waiting, remembered = self.waiting.get(key), self.resolved.get(key)
        if waiting is None and remembered is None:
            self._wait_early(key, name, event_id, time_ms)
            return
        for task in self._tasks_of[name]:
            counts = self.totals.tasks[task]
            positive = (waiting.positive if waiting is not None else remembered or 0) >> task & 1
            if positive:
                counts.duplicate += 1
            elif (
                waiting is None
                or not waiting.open >> task & 1
                or time_ms - waiting.event_time_ms > self.project.tasks[task].window_ms
            ):
                counts.late += 1
            else:
                counts.matched += 1
                label = _Label(waiting.source, waiting.row, task, 1.0, event_id, time_ms)
                self._resolve(key, waiting, task, label, labels)
                if not waiting.open:
                    waiting, remembered = None, self.resolved.get(key)

    def _wait_early(self, key: bytes, name: str, event_id: str, time_ms: int) -> None:
        if self.early_rows >= self.config.pending_max:
            _, oldest, of = heapq.heappop(self.deadlines)
            self._forget_early(oldest, of, self.early.get((oldest, of), []), [])
        start_ms = self.watermark.time_ms if self.watermark.time_ms >= 0 else time_ms
        deadline_ms = start_ms + self.config.early_feedback_ms
        self.early.setdefault((key, name), []).append(Early(event_id, time_ms, deadline_ms))
        heapq.heappush(self.deadlines, (deadline_ms, key, name))
        self.early_rows += 1
        for task in self._tasks_of[name]:
            self.totals.tasks[task].pending += 1

    # Samples

    def _resolve(self, key: bytes, waiting: Waiting, task: int, label: _Label, labels: list[_Label]) -> None:
        counts = self.totals.tasks[task]
        counts.waiting -= 1
        if label.label:
            counts.positives += 1
            waiting.positive |= 1 << task
        else:
            counts.negatives += 1
        waiting.open &= ~(1 << task)
        labels.append(label)
        if not waiting.open:
            del self.waiting[key]
            self.resolved.put(key, waiting.positive)

    def _emit(self, offset: int, labels: list[_Label]) -> Emitted:
        """Return the samples, ranked in the order of `labels`, and let go of sources that nothing waits for."""
        runs: list[pa.RecordBatch] = []
        start = 0
        for i in range(1, len(labels) + 1):
            if i == len(labels) or labels[i].source != labels[start].source:
                rows = pa.array([label.row for label in labels[start:i]], pa.int64())
                runs.append(self.sources[labels[start].source].batch.take(rows))
                start = i
        merged = pa.concat_batches(runs) if len(runs) > 1 else runs[0]
        count = len(labels)
        columns = {name: merged.column(i) for i, name in enumerate(self.source_schema.names)}
        columns |= {
            "partition": pa.array(np.full(count, self.partition, dtype=np.int32)),
            "offset": pa.array(np.full(count, offset, dtype=np.int64)),
            "rank": pa.array(np.arange(count, dtype=np.int32)),
            "task": pa.array([self.project.tasks[label.task].name for label in labels], pa.string()),
            "label": pa.array([label.label for label in labels], pa.float32()),
            "weight": pa.array(np.ones(count, dtype=np.float32)),
            "feedback_id": pa.array([label.feedback_id for label in labels], pa.string()),
            "feedback_time_ms": pa.array([label.feedback_time_ms for label in labels], pa.int64()),
        }
        self._release(labels)
        after, self.last = self.last, Position(offset, count - 1)
        batch = pa.RecordBatch.from_arrays([columns[f.name] for f in self.schema], schema=self.schema)
        return Emitted(batch, after, self.last)

    def _release(self, labels: list[_Label]) -> None:
        for label in labels:
            source = self.sources[label.source]
            source.live -= 1
            if not source.live:
                del self.sources[label.source]


def _as_columns(
    names: tuple[str, ...], values: list[tuple[float, ...]] | list[list[int]], batch: pa.RecordBatch
) -> dict[str, pa.Array]:
    known_NC = np.asarray(values, dtype=np.float32).reshape(batch.num_rows, len(names))
    columns = {}
    for i, name in enumerate(names):
        served = batch.column(name)
        known = pa.array(np.ascontiguousarray(known_NC[:, i]))
        columns[name] = known if served.null_count == batch.num_rows else pc.coalesce(served, known)
    return columns
