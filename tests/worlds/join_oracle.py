"""The join row by row in plain Python: what the compiled one must equal. Slow and obvious on purpose.

Memories are dicts, a heap closes windows, each counter is `CounterState`; only for tests.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from headrace.contract.config import JoinConfig
from headrace.contract.errors import EventRejected, Overloaded
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    SPEC,
    decode_batch,
    decode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import list_column, sample_schema
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.rules import Rules, decode_change, lanes_of, rules_of
from headrace.contract.spec import Counter
from headrace.stream.features.counters import CounterState, aged, amounts, feeds, key_strings
from headrace.stream.features.featurize import featurize
from headrace.stream.join.outcome import Emitted, TaskCounts, Totals
from headrace.stream.join.rules_in_force import LABEL_COLUMNS
from headrace.stream.join.watermark import Watermark

SLICES = 16
KEEP = 4


def key_of(*parts: str) -> bytes:
    return xxhash.xxh3_128_digest("\x00".join(parts).encode())


class Memory:
    """Each key with the slice of time in which it was put last."""

    def __init__(self, horizon_ms: int) -> None:
        self.slice_ms = max(1, horizon_ms // SLICES)
        self.start_ms = -1
        self.items: dict[bytes, tuple[int, int]] = {}

    def get(self, key: bytes) -> int | None:
        found = self.items.get(key)
        return None if found is None else found[1]

    def put(self, key: bytes, value: int = 0) -> None:
        self.items[key] = (self.start_ms, value)

    def advance(self, watermark_ms: int) -> None:
        start_ms = watermark_ms - watermark_ms % self.slice_ms
        if self.start_ms < 0:
            self.items = {key: (start_ms, value) for key, (_, value) in self.items.items()}
        elif start_ms <= self.start_ms:
            return
        self.start_ms = start_ms
        oldest_ms = start_ms - (SLICES + 1) * self.slice_ms
        self.items = {key: kept for key, kept in self.items.items() if kept[0] > oldest_ms}


class Aggregates:
    """Newest values of each (counter, key); a key leaves when its value is zero and the watermark has passed that."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.counters = {counter.name: counter for counter in counters}
        self.epoch = -1
        self.values: dict[tuple[str, str], list[tuple[int, tuple[float, ...]]]] = {}
        self._zeros: list[tuple[int, str, str]] = []

    def take(self, batch: pa.RecordBatch) -> None:
        """Apply rows in order. Rows of an epoch below the highest seen are a ghost's and ignored."""
        rows = zip(*(batch.column(i).to_pylist() for i in range(5)), strict=True)
        for counter, key, as_of_ms, epoch, counts in rows:
            if counter not in self.counters or epoch < self.epoch:
                continue
            self.epoch = epoch
            known = self.values.setdefault((counter, key), [])
            while known and known[-1][0] >= as_of_ms:
                # A restarted aggregator says this and what follows again, under its new epoch.
                known.pop()
            known.append((as_of_ms, tuple(counts)))
            del known[:-KEEP]
            if not any(counts):
                heapq.heappush(self._zeros, (as_of_ms, counter, key))

    def value(self, counter: str, key: str, as_of_ms: int) -> tuple[float, ...]:
        """Return the newest counts whose time is not after `as_of_ms`; zeros where there are none."""
        for known_ms, counts in reversed(self.values.get((counter, key), ())):
            if known_ms <= as_of_ms:
                return aged(self.counters[counter], counts, known_ms, as_of_ms)
        return (0.0,) * len(self.counters[counter].counts)

    def advance(self, watermark_ms: int) -> None:
        """Forget keys whose newest value is zero, as of a time that the watermark has passed."""
        while self._zeros and self._zeros[0][0] <= watermark_ms:
            as_of_ms, counter, key = heapq.heappop(self._zeros)
            known = self.values.get((counter, key))
            if known and known[-1][0] == as_of_ms and not any(known[-1][1]):
                del self.values[counter, key]


@dataclass(slots=True)
class Waiting:
    """One impression that waits: where its columns lie, and which tasks (bits) are open or became positive."""

    source: int
    row: int
    offset: int
    record_row: int
    event_time_ms: int
    base_ms: int
    rules: RulesInForce
    open: int
    positive: int = 0


class RulesInForce:
    """Rules that were in force, and their tasks by lane."""

    def __init__(self, number: int, rules: Rules, project: Project, lanes: list[tuple[str, str]]) -> None:
        self.number, self.rules, self.project = number, rules, project
        self.schema = sample_schema(project)
        tasks = {task.name: task for task in project.tasks}
        self.tasks = {
            lane: tasks[name]
            for lane, (name, feedback) in enumerate(lanes)
            if name in tasks and (feedback or tasks[name].correct_ms)
        }


@dataclass(slots=True)
class _Label:
    waiting: Waiting
    task: int
    label: float
    fed: tuple[str | None, float | None] = (None, None)
    """Id and value of the feedback."""
    feedback_time_ms: int | None = None
    is_late: bool = False


@dataclass(slots=True)
class Early:
    """Feedback that came before its impression."""

    fed: tuple[str, float | None]
    event_time_ms: int
    since_ms: int
    arrival: int


class PlainJoin:
    """The whole state of one partition; `take` is its only way on."""

    def __init__(self, project: Project, config: JoinConfig, *, silent_ms: int, partition: int) -> None:
        self.project, self.config, self.partition = project, config, partition
        self.offset = -1
        self.last = START
        self.watermark = Watermark(silent_ms)
        self.rows = Totals()
        self.counts: list[TaskCounts] = []
        self.lanes: list[tuple[str, str]] = []
        self.answers: dict[str, int] = {}
        self.locals: list[CounterState] = []
        self.aggregates = Aggregates(())
        self.seen = Memory(config.repeat_horizon_ms)
        self.resolved = Memory(config.resolved_ms)
        self.waiting: dict[bytes, Waiting] = {}
        self.sources: dict[int, pa.RecordBatch] = {}
        self.early: dict[tuple[bytes, str], list[Early]] = {}
        self.early_rows = 0
        self.expiries: list[tuple[int, int, int, int, bytes]] = []
        self.arrival = 0
        self._feedback_schemas: dict[str, pa.Schema] = {}
        self._begin(1, rules_of(project))

    @property
    def totals(self) -> Totals:
        tasks = [counts for counts, (_, feedback) in zip(self.counts, self.lanes, strict=True) if feedback]
        return replace(self.rows, tasks=tasks)

    @property
    def schema(self) -> pa.Schema:
        return self.rules.schema

    def _begin(self, number: int, rules: Rules) -> None:
        project = rules.over(self.project)
        for feedback in project.feedback:
            self.answers.setdefault(feedback.name, 0)
            self._feedback_schemas[feedback.name] = feedback_schema(project, feedback)
        for lane in lanes_of(project.tasks):
            if lane in self.lanes:
                continue
            self.lanes.append(lane)
            counts = TaskCounts()
            if lane[1]:
                counts.pending = sum(len(rows) for (_, name), rows in self.early.items() if name == lane[1])
                counts.orphans = self.answers[lane[1]] - counts.pending
            self.counts.append(counts)
        self.rules = RulesInForce(number, rules, project, self.lanes)
        known = {state.counter.name: state for state in self.locals}
        values, zeros, epoch = self.aggregates.values, self.aggregates._zeros, self.aggregates.epoch
        ours, key = project.features.counters, project.impression.key
        self.locals = [known.get(c.name) or CounterState(c) for c in ours if key in c.key_fields]
        for state in self.locals:
            state.advance(self.watermark.time_ms)
        self.aggregates = Aggregates([c for c in ours if key not in c.key_fields])
        names = self.aggregates.counters
        self.aggregates.values = {item: value for item, value in values.items() if item[0] in names}
        self.aggregates._zeros = [zero for zero in zeros if zero[1] in names]
        heapq.heapify(self.aggregates._zeros)
        self.aggregates.epoch = epoch
        self._impression_schema = impression_schema(project)
        self.source_schema = pa.schema([f for f in self.schema if f.name not in LABEL_COLUMNS])

    def _late_lane(self, task: int) -> int:
        late = (self.lanes[task][0], "")
        return self.lanes.index(late) if late in self.lanes else -1

    def _tasks_of(self, name: str) -> list[int]:
        return [lane for lane, (_, feedback) in enumerate(self.lanes) if feedback == name]

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
                promise = decode_punctuation(record.value)
                self._take_time(self.watermark.take(promise, record.timestamp_ms), labels)
            elif kind == IMPRESSION:
                self._take_impressions(decode_batch(record.value, self._impression_schema), record, labels)
            elif kind == FEEDBACK and record.headers.get("type", "") in self._feedback_schemas:
                name = record.headers["type"]
                self._take_feedback(name, decode_batch(record.value, self._feedback_schemas[name]), record, labels)
            elif kind == AGGREGATE:
                self.aggregates.take(decode_batch(record.value, AGGREGATE_SCHEMA))
            elif kind == SPEC:
                change = decode_change(record.value, where="here")
                if change.number > self.rules.number:
                    self._begin(change.number, change.rules)
        except EventRejected:
            self.rows.bad_records += 1
        self.offset = record.offset
        return self._emit(record.offset, labels) if labels else None

    # Time

    def _take_time(self, watermark_ms: int, labels: list[_Label]) -> None:
        due: list[tuple[tuple[int, ...], bytes, Waiting]] = []
        while self.expiries and self.expiries[0][0] <= watermark_ms:
            expiry_ms, offset, row, task, key = heapq.heappop(self.expiries)
            waiting = self.waiting.get(key)
            # A positive has left its expiry behind; (offset, row) tells it from a later impression of the same key.
            if waiting is None or (waiting.offset, waiting.record_row) != (offset, row) or not waiting.open >> task & 1:
                continue
            due.append(((waiting.rules.number, expiry_ms, offset, row, task), key, waiting))
        for (*_, task), key, waiting in sorted(due, key=lambda item: item[0]):
            self._resolve(key, waiting, task, _Label(waiting, task, 0.0), labels)
        for (key, name), rows in list(self.early.items()):
            for early in rows:
                if early.since_ms < 0:
                    early.since_ms = watermark_ms
            kept = [r for r in rows if r.since_ms + self.config.early_feedback_ms > watermark_ms]
            self._forget_early(key, name, rows, kept)
        self.seen.advance(watermark_ms)
        self.resolved.advance(watermark_ms)
        self.aggregates.advance(watermark_ms)
        for counter in self.locals:
            counter.advance(watermark_ms)

    def _forget_early(self, key: bytes, name: str, rows: list[Early], kept: list[Early]) -> None:
        gone = len(rows) - len(kept)
        self.early_rows -= gone
        for task in self._tasks_of(name):
            self.counts[task].pending -= gone
            self.counts[task].orphans += gone
        if kept:
            self.early[key, name] = kept
        else:
            self.early.pop((key, name), None)

    # Impressions

    def _is_too_late(self, record: Record, time_ms: int) -> bool:
        """Say whether nobody knows if an event came before: its gateway would have set it aside."""
        headers, watermark_ms = record.headers, self.watermark.time_ms
        said = headers.get("late", "nothing, as in release 0.1" if "gateway" in headers else "")
        return (
            said in ("", "set-aside") and watermark_ms >= 0 and time_ms < watermark_ms - self.config.repeat_horizon_ms
        )

    def _take_impressions(self, batch: pa.RecordBatch, record: Record, labels: list[_Label]) -> None:
        fresh: list[int] = []
        keys: list[bytes] = []
        offset = record.offset
        ids, requests, places, _, times = (batch.column(i).to_pylist() for i in range(5))
        new: set[bytes] = set()
        for row, (event_id, request, place) in enumerate(zip(ids, requests, places, strict=True)):
            seen, key = key_of(IMPRESSION, event_id), key_of(request, str(place))
            known = key in new or key in self.waiting or self.resolved.get(key) is not None
            if known or self.seen.get(seen) is not None:
                self.rows.repeated_in_log += 1
                continue
            if self._is_too_late(record, times[row]):
                self.rows.repeated_in_log += 1
                self.rows.too_late += 1
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
        source = len(self.sources)
        self.sources[source] = self._featurized(kept, offset, fresh)
        self.rows.impressions += len(fresh)
        for row, (record_row, key, time_ms) in enumerate(
            zip(fresh, keys, kept.column("event_time_ms").to_pylist(), strict=True)
        ):
            self._admit(key, source, row, offset, record_row, time_ms, labels)

    def _admit(
        self, key: bytes, source: int, row: int, offset: int, record_row: int, time_ms: int, labels: list[_Label]
    ) -> None:
        base_ms, tasks = max(time_ms, self.watermark.time_ms), self.rules.tasks
        waiting = Waiting(
            source, row, offset, record_row, time_ms, base_ms, self.rules, open=sum(1 << lane for lane in tasks)
        )
        self.waiting[key] = waiting
        labels += [_Label(waiting, lane, 0.0) for lane, task in tasks.items() if task.policy == "eager"]
        for lane, task in tasks.items():
            is_late = not self.lanes[lane][1]
            self.counts[lane].impressions += not is_late
            self.counts[lane].waiting += not is_late
            expiry_ms = base_ms + task.window_ms + (task.correct_ms if is_late else 0)
            heapq.heappush(self.expiries, (expiry_ms, offset, record_row, lane, key))
        for name in self.answers:
            for early in self.early.pop((key, name), ()):
                self.early_rows -= 1
                for task in self._tasks_of(name):
                    self.counts[task].pending -= 1
                self._answer(key, name, early.fed, early.event_time_ms, labels, waiting)

    def _featurized(self, batch: pa.RecordBatch, offset: int, rows: list[int]) -> pa.RecordBatch:
        """Return the columns of `source_schema`: counters as served, else as known here and now."""
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        columns |= self._counted(batch)
        slots_NF, numeric_ND = featurize(columns, self.rules.project.features)
        columns["impression_offset"] = pa.array(np.full(batch.num_rows, offset, dtype=np.int64))
        columns["impression_row"] = pa.array(rows, pa.int32())
        columns["slots"] = list_column(slots_NF, pa.int64())
        columns["numeric"] = list_column(numeric_ND, pa.float32())
        columns["spec"] = pa.array([self.rules.project.features.digest()] * batch.num_rows, pa.string())
        return pa.RecordBatch.from_arrays([columns[f.name] for f in self.source_schema], schema=self.source_schema)

    def _counted(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """Return the counter columns and count the impressions, row after row."""
        times = batch.column("event_time_ms").to_pylist()
        columns: dict[str, pa.Array] = {}
        for state in self.locals:
            ours = [(feed, amounts(feed, batch)) for feed in feeds(state.counter, IMPRESSION)]
            values = []
            for key, time_ms in zip(_local_keys(state.counter, batch), times, strict=True):
                values.append([0] * len(state.counter.counts) if key is None else state.value(key, time_ms))
                for feed, amount_N in ours if key is not None else ():
                    state.add(key, feed.entry, time_ms, int(amount_N[len(values) - 1]))
            columns |= _as_columns(state.counter.columns(), values, batch)
        for counter in self.aggregates.counters.values():
            others = key_strings([batch.column(field) for field in counter.key_fields])
            nothing = (0.0,) * len(counter.counts)
            found = [
                nothing if key is None else self.aggregates.value(counter.name, key, time_ms)
                for key, time_ms in zip(others, times, strict=True)
            ]
            columns |= _as_columns(counter.columns(), found, batch)
        return columns

    # Feedback

    def _take_feedback(self, name: str, batch: pa.RecordBatch, record: Record, labels: list[_Label]) -> None:
        counted = [
            (s, feed, amounts(feed, batch), _local_keys(s.counter, batch))
            for s in self.locals
            for feed in feeds(s.counter, name)
        ]
        rows = zip(*(batch.column(i).to_pylist() for i in range(5)), batch.column("value").to_pylist(), strict=True)
        for n, (event_id, request, place, _, time_ms, value) in enumerate(rows):
            seen = key_of(FEEDBACK, name, event_id)
            late = self.seen.get(seen) is None and self._is_too_late(record, time_ms)
            self.rows.too_late += late
            if late or self.seen.get(seen) is not None:
                self.rows.repeated_in_log += 1
                continue
            self.seen.put(seen)
            self.rows.feedback += 1
            self.answers[name] += 1
            for state, feed, amount_N, keys in counted:
                key = keys[n]
                if key is not None:
                    state.add(key, feed.entry, time_ms, int(amount_N[n]))
            self._answer(key_of(request, str(place)), name, (event_id, value), time_ms, labels)

    def _answer(
        self,
        key: bytes,
        name: str,
        fed: tuple[str, float | None],
        time_ms: int,
        labels: list[_Label],
        found: Waiting | None = None,
    ) -> None:
        waiting, remembered = found or self.waiting.get(key), self.resolved.get(key)
        if waiting is None and remembered is None:
            self._wait_early(key, name, fed, time_ms)
            return
        for task in self._tasks_of(name):
            counts, late = self.counts[task], self._late_lane(task)
            if waiting is None:
                known = remembered or 0
                is_known = known >> task & 1 or (late >= 0 and known >> late & 1)
                counts.duplicate += bool(is_known)
                counts.late += not is_known
                continue
            declared = waiting.rules.tasks.get(task)
            after_ms = time_ms - waiting.event_time_ms
            if declared is None:
                counts.orphans += 1
            elif waiting.positive >> task & 1:
                counts.duplicate += 1
            elif waiting.open >> task & 1 and after_ms <= declared.window_ms:
                counts.matched += 1
                self._resolve(key, waiting, task, _Label(waiting, task, 1.0, fed, time_ms), labels)
                if late >= 0 and waiting.open >> late & 1:
                    self._shut(key, waiting, late)
            elif late >= 0 and waiting.positive >> late & 1:
                counts.duplicate += 1
            else:
                counts.late += 1
                if late >= 0 and waiting.open >> late & 1 and after_ms <= declared.window_ms + declared.correct_ms:
                    waiting.positive |= 1 << late
                    self._shut(key, waiting, late)
                    labels.append(_Label(waiting, task, 1.0, fed, time_ms, is_late=True))

    def _wait_early(self, key: bytes, name: str, fed: tuple[str, float | None], time_ms: int) -> None:
        if self.early_rows >= self.config.pending_max:
            (oldest, of), rows = min(self.early.items(), key=lambda item: min(r.arrival for r in item[1]))
            first = min(rows, key=lambda r: r.arrival)
            self._forget_early(oldest, of, rows, [r for r in rows if r is not first])
        self.arrival += 1
        early = Early(fed, time_ms, self.watermark.time_ms, self.arrival)
        self.early.setdefault((key, name), []).append(early)
        self.early_rows += 1
        for task in self._tasks_of(name):
            self.counts[task].pending += 1

    # Samples

    def _resolve(self, key: bytes, waiting: Waiting, task: int, label: _Label, labels: list[_Label]) -> None:
        if self.lanes[task][1]:
            counts = self.counts[task]
            counts.waiting -= 1
            counts.positives += bool(label.label)
            counts.negatives += not label.label
            waiting.positive |= (1 << task) if label.label else 0
            if label.label or waiting.rules.tasks[task].policy == "window":
                labels.append(label)
        self._shut(key, waiting, task)

    def _shut(self, key: bytes, waiting: Waiting, lane: int) -> None:
        waiting.open &= ~(1 << lane)
        if not waiting.open:
            del self.waiting[key]
            self.resolved.put(key, waiting.positive)

    def _emit(self, offset: int, labels: list[_Label]) -> Emitted:
        """Return the samples, ranked in the order of `labels`, with the columns of all rules that they were read by."""
        several = sorted({label.waiting.rules.number: label.waiting.rules for label in labels}.items(), reverse=True)
        fields = {field.name: field for _, rules in reversed(several) for field in rules.schema}
        order = list(dict.fromkeys(field.name for _, rules in several for field in rules.schema))
        schema = pa.schema([fields[name] for name in order])
        rows = []
        for rank, label in enumerate(labels):
            source = self.sources[label.waiting.source].slice(label.waiting.row, 1).to_pylist()[0]
            corrects = self._corrects(label)
            task = label.waiting.rules.tasks[label.task]
            rows.append(
                source
                | {
                    "partition": self.partition,
                    "offset": offset,
                    "rank": rank,
                    "task": task.name,
                    "label": label.label,
                    "weight": task.correction_weight if corrects else 1.0,
                    "feedback_id": label.fed[0],
                    "value": label.fed[1],
                    "feedback_time_ms": label.feedback_time_ms,
                    "correction": corrects,
                }
            )
        after, self.last = self.last, Position(offset, len(labels) - 1)
        return Emitted(pa.RecordBatch.from_pylist(rows, schema=schema), after, self.last)

    def _corrects(self, label: _Label) -> bool:
        return bool(label.label) and (label.is_late or label.waiting.rules.tasks[label.task].policy == "eager")


def _local_keys(counter: Counter, batch: pa.RecordBatch) -> list[str | None]:
    """Return a text a row: the partition key, or a list of the values as JSON; None where one is missing."""
    if isinstance(counter.key, str):
        return list(batch.column("key").to_pylist())
    values = zip(*(batch.column(field).to_pylist() for field in counter.key), strict=True)
    return [None if None in row else json.dumps(row) for row in values]


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
