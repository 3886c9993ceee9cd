"""The join: impressions and feedback of one partition to samples. Pure: a function of the partition's order.

1. A record that was taken already (offset at or below the state's) is ignored.
2. Rows whose event id was seen within the horizon are dropped (`repeated_in_log`), and older ones that nobody looked
   up (`late_rows`).
3. An impression is featurized from what precedes it, then waits for each task's feedback until
   max(its time, the watermark when it was read) + the task's window.
4. Feedback in time makes a positive at once; feedback that comes first waits for its impression.
5. Punctuation moves the watermark; what has expired by then becomes negative, in the order (expiry, offset, row, task).
   A task with the eager policy says negative when the impression comes; its positive is a correction.
6. Feedback after the window is late; up to the task's `correct_ms` later it makes one positive, a correction.
7. A change of rules is in force for what is read after it. What waits keeps the rules under which it was read, until
   nothing waits under them any more. Counters that both rules have go on; new ones begin empty.

Samples that one record resolves get ranks 0, 1, 2 ...; (offset, rank) is a sample's position. Records may be taken
several at once: features and samples are then made together, which changes nothing but the time it takes.

Legend: N rows of a record, L labels, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.config import JoinConfig
from headrace.contract.errors import ConfigRejected, EventRejected, Overloaded
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    EXTERNAL,
    EXTERNAL_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    SPEC,
    decode_batch,
    decode_punctuation,
    feedback_schema,
)
from headrace.contract.formats.positions import RANKS_MAX, START, Position
from headrace.contract.formats.sample import list_column
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, Project
from headrace.contract.rules import Rules, check_code, check_growth, decode_change, lanes_of, rules_of
from headrace.contract.spec import Counter
from headrace.kernels.arrays import I64s, U8s, U64s
from headrace.stream.features.counters import amounts, feeds, key_texts
from headrace.stream.features.featurize import featurize
from headrace.stream.join.aggregate_lookup import AggregateLookup
from headrace.stream.join.early_feedback import EarlyFeedback
from headrace.stream.join.external_lookup import ExternalLookup
from headrace.stream.join.late_rows import counted_from_ms
from headrace.stream.join.local_counters import LocalCounter
from headrace.stream.join.matching import (
    CODE,
    CORRECTION,
    ID,
    NEGATIVE,
    SEQ,
    TASK,
    TIME,
    Tables,
    mark_waiting,
    take_feedback,
    take_impressions,
)
from headrace.stream.join.outcome import Emitted, Gathered, TaskCounts, Totals
from headrace.stream.join.payload import Payload, Spill
from headrace.stream.join.pending import ORPHANS, PENDING, Pending
from headrace.stream.join.recent_keys import RecentKeys
from headrace.stream.join.record_columns import as_columns, checked, keys_of, local_keys, numbers_of
from headrace.stream.join.rules_in_force import LABEL_COLUMNS, AsRead, Lane, RulesInForce, joined_schema, late_lanes
from headrace.stream.join.watermark import Watermark


class JoinState:
    """The whole state of one partition. Only `take` and `take_all` change it.

    Args:
        project: whose rules are in force from the partition's beginning (change 1).
        as_read: what becomes of the project's declarations under each change of rules before they are used.
    """

    def __init__(
        self,
        project: Project,
        config: JoinConfig,
        *,
        silent_ms: int,
        partition: int,
        spill: Spill | None = None,
        as_read: AsRead | None = None,
    ) -> None:
        self.project, self.config, self.partition = project, config, partition
        self._as_read = as_read
        self.offset = -1
        self.last = START
        self.watermark = Watermark(silent_ms)
        self._rows = Totals()
        self.seen = RecentKeys(config.repeat_horizon_ms)
        self.resolved = RecentKeys(config.resolved_ms)
        self.payload = Payload(f"p{partition}", spill=spill, memory_bytes=config.payload_bytes)
        self.early = EarlyFeedback(np.zeros(0, np.uint8), config.early_feedback_ms)
        self.aggregates = AggregateLookup(())
        self.external = ExternalLookup(())
        self.local_counters: list[LocalCounter] = []
        self.counts_T9 = np.zeros((0, 9), np.int64)
        self.lanes: list[Lane] = []
        self.feedback: dict[str, FeedbackType] = {}
        """Every type ever declared, as it was declared last, with its schema in `_feedback_schemas`."""
        self.answers: list[int] = []
        """Rows of each of them, repeats left out."""
        self._feedback_schemas: dict[str, pa.Schema] = {}
        self.rules_in_force: list[RulesInForce] = []
        """Oldest first: those that something still waits under, and last those by which records are read."""
        self.begin_rules(1, rules_of(project))

    @property
    def rules(self) -> RulesInForce:
        """The rules by which records are read, and what waits of the impressions that were read by them."""
        return self.rules_in_force[-1]

    @property
    def schema(self) -> pa.Schema:
        """The columns of samples of what is read now."""
        return self.rules.schema

    @property
    def waiting(self) -> int:
        """How many impressions wait, under whatever rules."""
        return sum(len(rules.pending) for rules in self.rules_in_force)

    @property
    def pending(self) -> Pending:
        """What waits of the impressions that were read by `rules`."""
        return self.rules.pending

    @property
    def tasks(self) -> list[Lane]:
        """Every task ever declared here, with its feedback, in the order of `totals.tasks`."""
        return [lane for lane in self.lanes if lane[1]]

    @property
    def totals(self) -> Totals:
        """What became of all rows so far."""
        counts = zip(self.counts_T9.tolist(), self.lanes, strict=True)
        return replace(self._rows, tasks=[TaskCounts(*row) for row, (_, feedback) in counts if feedback])

    def row_totals(self) -> list[int]:
        """Return the totals that no task has, for a snapshot."""
        rows = self._rows
        return [rows.impressions, rows.feedback, rows.repeated_in_log, rows.bad_records, rows.too_late]

    def load_totals(self, totals: Sequence[int]) -> None:
        """Take over what `row_totals` gave; a state of before has no last one."""
        impressions, feedback, repeated_in_log, bad_records, too_late = [*totals, 0][:5]
        self._rows = Totals(impressions, feedback, repeated_in_log, bad_records, too_late)

    # Rules

    def begin_rules(self, number: int, declared: Rules, *, first: int = 0) -> None:
        """Read by these rules from now on; what waits goes on under its own.

        A task that is new here has had all feedback of its kind so far as orphans, or waiting for an impression: its
        sums close like those of the others.
        """
        project = declared.over(self.project)
        project = project if self._as_read is None else self._as_read(project)
        for feedback in project.feedback:
            self.answers += [0] * (feedback.name not in self.feedback)
            self.feedback[feedback.name] = feedback
            self._feedback_schemas[feedback.name] = feedback_schema(project, feedback)
        self._add_lanes([lane for lane in lanes_of(project.tasks) if lane not in self.lanes])
        self.payload.seal()
        self.rules_in_force.append(RulesInForce(number, declared, project, self.lanes, self.counts_T9, first=first))
        known, key = {table.counter: table for table in self.local_counters}, project.impression.key
        counters = project.features.counters
        self.local_counters = [known[c] if c in known else self._new_table(c) for c in counters if c.is_local(key)]
        self.aggregates.change([c for c in counters if not c.is_local(key)])
        self.external.crawls = project.crawls

    def resume_rules(
        self, lanes: Sequence[Lane], feedback: Sequence[FeedbackType], answers: Sequence[int], counts_T9: I64s
    ) -> None:
        """Forget all rules, and know these lanes and types: the stored ones follow, one `begin_rules` each."""
        self.rules_in_force, self.local_counters, self.aggregates = [], [], AggregateLookup(())
        self.lanes, self.counts_T9, self.answers = list(lanes), counts_T9, list(answers)
        self.feedback = {one.name: one for one in feedback}
        self._feedback_schemas = {one.name: feedback_schema(self.project, one) for one in feedback}
        self._declare()

    def _new_table(self, counter: Counter) -> LocalCounter:
        table = LocalCounter(counter)
        table.advance(self.watermark.time_ms)
        return table

    def _add_lanes(self, fresh: list[Lane]) -> None:
        kinds = list(self.feedback)
        added_L9 = np.zeros((len(fresh), 9), np.int64)
        for at, (_, feedback) in enumerate(fresh):
            if feedback:
                kind = kinds.index(feedback)
                waiting = self.early.waiting_of(kind)
                added_L9[at, PENDING], added_L9[at, ORPHANS] = waiting, self.answers[kind] - waiting
        self.lanes += fresh
        self.counts_T9 = np.concatenate([self.counts_T9, added_L9])
        for rules in self.rules_in_force:
            rules.pending.share(self.counts_T9)
        self._declare()

    def _declare(self) -> None:
        """Tell the compiled tables which lanes each kind of feedback answers."""
        tasks_K = [sum(1 << i for i, (_, of) in enumerate(self.lanes) if of == name) for name in self.feedback]
        self.early.declare(np.array(tasks_K, np.uint8))
        self._late_T = late_lanes(self.lanes)
        self._task_names = pa.array([name for name, _ in self.lanes], pa.string())

    def _take_change(self, record: Record, value: bytes, gathered: Gathered) -> None:
        change = decode_change(value, where=f"{record.topic}/{record.partition} offset {record.offset}")
        if change.number <= self.rules.number:
            return
        try:
            check_growth(self.rules.declared, change.rules, self.lanes)
        except ConfigRejected as error:
            # What `headrace spec apply` refuses is the same in every partition: a record that changes nothing.
            raise EventRejected("bad_change", str(error)) from error
        if self._as_read is None:
            check_code(change)
        if gathered.impressions:
            self._keep(gathered.impressions)
            gathered.impressions.clear()
        self.begin_rules(change.number, change.rules, first=self.rules.pending.following)

    def take(self, record: Record) -> Emitted | None:
        """Apply one record of the partition and return the samples that it resolved, if any; see `take_all`."""
        return self.take_all((record,))

    def take_all(self, records: Sequence[Record]) -> Emitted | None:
        """Apply records of the partition in order and return the samples that they resolved, if any.

        A record at or below `offset` is ignored. One that can't be decoded is counted (`bad_records`) and changes
        nothing else: the same every time the log is read.

        Raises `Overloaded` when more than `join.pending_max` impressions wait; the state must not be used after that.
        """
        gathered = Gathered()
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
        self.early.forget()
        if len(self.rules_in_force) > 1:
            self.rules_in_force = [rules for rules in self.rules_in_force if len(rules.pending) or rules is self.rules]
        return emitted

    def _take(self, record: Record, value: bytes, gathered: Gathered) -> None:
        kind, name = record.headers.get("kind", ""), record.headers.get("type", "")
        if kind == PUNCTUATION:
            reached_ms = self.watermark.take(decode_punctuation(value), record.timestamp_ms)
            self._take_time(reached_ms, record.offset, gathered)
        elif kind == IMPRESSION:
            self._take_impressions(checked(decode_batch(value, self.rules.impression_schema)), record, gathered)
        elif kind == FEEDBACK and name in self._feedback_schemas:
            self._take_feedback(name, checked(decode_batch(value, self._feedback_schemas[name])), record, gathered)
        elif kind == AGGREGATE:
            self.aggregates.take(checked(decode_batch(value, AGGREGATE_SCHEMA)))
        elif kind == EXTERNAL:
            self.external.take(checked(decode_batch(value, EXTERNAL_SCHEMA)))
        elif kind == SPEC:
            self._take_change(record, value, gathered)

    def _tables(self, rules: RulesInForce) -> Tables:
        return Tables(
            self.seen.arrays,
            self.resolved.arrays,
            rules.pending.arrays,
            self.early.arrays,
            rules.windows_T,
            rules.eager_T,
            self._late_T,
        )

    def _elsewhere(self, keys_N2: U64s) -> U8s:
        """Return under which older rules each key waits, from 1 on; 0 for none."""
        marks_N = np.zeros(len(keys_N2), np.uint8)
        for mark, rules in enumerate(self.rules_in_force[:-1], start=1):
            mark_waiting(rules.pending.arrays.ring, keys_N2, mark, marks_N)
        return marks_N

    # Time

    def _take_time(self, watermark_ms: int, offset: int, gathered: Gathered) -> None:
        for rules in self.rules_in_force:
            seq_L, task_L = rules.pending.expired(watermark_ms)
            if len(seq_L):
                self.resolved.reserve(len(seq_L))
                rules.pending.close(seq_L, task_L, self.resolved.arrays)
                silent_L = rules.silent_T[task_L] == 1
                if silent_L.any():
                    gathered.released.append(seq_L[silent_L])
                    seq_L, task_L = seq_L[~silent_L], task_L[~silent_L]
                labels_L5 = np.full((len(seq_L), 5), -1, np.int64)
                labels_L5[:, SEQ], labels_L5[:, TASK], labels_L5[:, CODE] = seq_L, task_L, NEGATIVE
                if len(seq_L):
                    gathered.label(labels_L5, offset, None)
            rules.pending.let_go()
        self.early.advance(watermark_ms, self.counts_T9)
        self.seen.advance(watermark_ms)
        self.resolved.advance(watermark_ms)
        self.aggregates.advance(watermark_ms)
        for counter in self.local_counters:
            counter.advance(watermark_ms)

    # Impressions

    def _from_ms(self, record: Record) -> int:
        return counted_from_ms(record.headers, self.watermark.time_ms, self.config.repeat_horizon_ms)

    def _take_impressions(self, batch: pa.RecordBatch, record: Record, gathered: Gathered) -> None:
        rows, rules = batch.num_rows, self.rules
        for table in (self.seen, rules.pending, self.resolved):
            table.reserve(rows)
        # A negative of an eager task, a positive, and one for late feedback that came early.
        fresh_N, labels_L5 = np.empty(rows, np.int32), np.empty((3 * rows * len(self.lanes), 5), np.int64)
        seen_N2, keys_N2 = keys_of(batch, IMPRESSION)
        fresh, labels, late = take_impressions(
            self._tables(rules), seen_N2, keys_N2, numbers_of(batch, 4), self._elsewhere(keys_N2),
            self.watermark.time_ms, self._from_ms(record), fresh_N, labels_L5,
        )  # fmt: skip
        self._rows.too_late += late
        self._rows.repeated_in_log += rows - fresh
        self._rows.impressions += fresh
        if not fresh:
            return
        if self.waiting > self.config.pending_max:
            raise Overloaded(
                f"partition {self.partition}: {self.waiting} impressions wait for feedback and "
                f"join.pending_max allows {self.config.pending_max}; the watermark is {self.watermark.time_ms} ms. If "
                "it stands still, look for a gateway that stopped punctuating; if it moves, raise join.pending_max."
            )
        fresh_N = fresh_N[:fresh]
        kept = batch if fresh == rows else batch.take(pa.array(fresh_N))
        gathered.impressions.append(self._counted(kept, record.offset, fresh_N))
        if labels:
            gathered.label(labels_L5[:labels], record.offset, None)

    def _counted(self, batch: pa.RecordBatch, offset: int, record_rows_N: npt.NDArray[Any]) -> pa.RecordBatch:
        """Return the batch with its counters, as served or else as known here and now, and count it, row after row."""
        times_N = numbers_of(batch, 4)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        keys = local_keys((table.counter for table in self.local_counters), batch)
        for table in self.local_counters:
            ours = feeds(table.counter, IMPRESSION)
            amounts_FN = np.array([amounts(feed, batch) for feed in ours], np.int64).reshape(len(ours), batch.num_rows)
            values_NE = table.take(*keys[table.counter.key_fields], times_N, ours, amounts_FN, read=True)
            columns |= as_columns(table.counter.columns(), values_NE, batch)
        for counter in self.aggregates.counters.values():
            texts = key_texts([batch.column(field) for field in counter.key_fields])
            values_NE = self.aggregates.values(counter, texts, times_N)
            columns |= as_columns(counter.columns(), values_NE, batch)
        columns |= self.external.columns(columns, times_N)
        columns["impression_offset"] = pa.array(np.full(batch.num_rows, offset, dtype=np.int64))
        columns["impression_row"] = pa.array(record_rows_N)
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    def _keep(self, batches: list[pa.RecordBatch]) -> None:
        """Featurize impressions and keep what their samples will hold."""
        rules = self.rules
        batch = batches[0] if len(batches) == 1 else pa.concat_batches(batches)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        slots_NF, numeric_ND = featurize(columns, rules.spec)
        columns["slots"] = list_column(slots_NF, pa.int64())
        columns["numeric"] = list_column(numeric_ND, pa.float32())
        columns["spec"] = pa.repeat(pa.scalar(rules.digest, pa.string()), batch.num_rows)
        kept = pa.RecordBatch.from_arrays([columns[f.name] for f in rules.source_schema], schema=rules.source_schema)
        self.payload.append(rules.pending.following - batch.num_rows, kept, rules.takes)

    # Feedback

    def _take_feedback(self, name: str, batch: pa.RecordBatch, record: Record, gathered: Gathered) -> None:
        if not batch.num_rows:
            return
        for table in (self.seen, self.early, self.resolved):
            table.reserve(batch.num_rows)
        kind = list(self.feedback).index(name)
        seen_N2, keys_N2 = keys_of(batch, f"{FEEDBACK}\x00{name}")
        times_N, fresh_N, early_N, labels = numbers_of(batch, 4), list[I64s](), list[I64s](), list[I64s]()
        # A key waits under one set of rules, and feedback never moves it: neighbours of one set go together.
        mark_N = self._elsewhere(keys_N2)
        cuts = [0, *(np.flatnonzero(mark_N[1:] != mark_N[:-1]) + 1).tolist(), batch.num_rows]
        for start, end in pairwise(cuts):
            rules = self.rules_in_force[int(mark_N[start]) - 1]
            fresh_R, early_R = np.empty(end - start, np.int32), np.empty(end - start, np.int64)
            labels_L5 = np.empty(((end - start) * len(self.lanes), 5), np.int64)
            fresh, count, late = take_feedback(
                self._tables(rules), kind, seen_N2[start:end], keys_N2[start:end], times_N[start:end],
                self.watermark.time_ms, self._from_ms(record), self.config.pending_max, fresh_R, labels_L5, early_R,
            )  # fmt: skip
            self._rows.too_late += late
            labels_L5[:count, ID] += start
            labels.append(labels_L5[:count])
            fresh_N.append(fresh_R[:fresh].astype(np.int64) + start)
            early_N.append(early_R)
        if any(map(len, labels)):
            gathered.label(np.concatenate(labels), record.offset, batch)
        self._count_feedback(name, kind, batch, np.concatenate(fresh_N))
        arrivals_N = np.concatenate(early_N)
        for row in np.flatnonzero(arrivals_N >= 0).tolist():
            self.early.keep(
                int(arrivals_N[row]), batch.column("event_id")[row].as_py(), batch.column("value")[row].as_py()
            )

    def _count_feedback(self, name: str, kind: int, batch: pa.RecordBatch, fresh_N: I64s) -> None:
        self._rows.repeated_in_log += batch.num_rows - len(fresh_N)
        self._rows.feedback += len(fresh_N)
        self.answers[kind] += len(fresh_N)
        if len(fresh_N) < batch.num_rows:
            batch = batch.take(pa.array(fresh_N))
        counted = [(table, ours) for table in self.local_counters if (ours := feeds(table.counter, name))]
        if not counted:
            return
        keys, times_N = local_keys((table.counter for table, _ in counted), batch), numbers_of(batch, 4)
        for table, ours in counted:
            amounts_FN = np.array([amounts(feed, batch) for feed in ours], np.int64)
            table.take(*keys[table.counter.key_fields], times_N, ours, amounts_FN, read=False)

    # Samples

    def _emit(self, gathered: Gathered) -> Emitted:
        """Return the samples in order, ranked within the record that resolved them."""
        labels_L5, offset_L = np.concatenate(gathered.labels), np.concatenate(gathered.offsets)
        count = len(labels_L5)
        first_L = np.flatnonzero(np.concatenate([[True], offset_L[1:] != offset_L[:-1]]))
        rank_L = np.arange(count) - np.repeat(first_L, np.diff(np.concatenate([first_L, [count]])))
        if int(rank_L.max()) >= RANKS_MAX:
            raise Overloaded(
                f"partition {self.partition}: one record resolved {int(rank_L.max()) + 1:,} samples; a position "
                f"counts to {RANKS_MAX:,}: lower join.pending_max ({self.config.pending_max:,}) or the number of tasks."
            )
        seq_L, task_L, code_L = (labels_L5[:, column] for column in (SEQ, TASK, CODE))
        rules_L = np.searchsorted([rules.first for rules in self.rules_in_force], seq_L, side="right") - 1
        present = [rules for i, rules in enumerate(self.rules_in_force) if (rules_L == i).any()]
        schema = present[0].schema if len(present) == 1 else joined_schema(present)
        source = pa.schema([f for f in schema if f.name not in LABEL_COLUMNS])
        kept = self.payload.take(seq_L, source)
        columns = {name: kept.column(i) for i, name in enumerate(source.names)}
        corrects_L, weight_L = code_L == CORRECTION, np.ones(count, np.float32)
        for i, rules in enumerate(self.rules_in_force):
            ours_L = corrects_L & (rules_L == i)
            weight_L[ours_L] = rules.weights_T[task_L[ours_L]]
        positive_L = code_L != NEGATIVE
        columns |= {
            "partition": pa.array(np.full(count, self.partition, dtype=np.int32)),
            "offset": pa.array(offset_L),
            "rank": pa.array(rank_L.astype(np.int32)),
            "task": self._task_names.take(pa.array(task_L)),
            "label": pa.array(positive_L.astype(np.float32)),
            "weight": pa.array(weight_L),
            "feedback_id": _of_feedback(labels_L5[:, ID], gathered.ids, self.early.ids, pa.string()),
            "value": _of_feedback(labels_L5[:, ID], gathered.values, self.early.values, pa.float64()),
            "feedback_time_ms": pa.array(labels_L5[:, TIME], mask=~positive_L),
            "correction": pa.array(corrects_L),
        }
        after, self.last = self.last, Position(int(offset_L[-1]), int(rank_L[-1]))
        batch = pa.RecordBatch.from_arrays([columns[f.name] for f in schema], schema=schema)
        return Emitted(batch, after, self.last)


def _of_feedback(id_L: I64s, rows: list[pa.Array], early: Mapping[int, Any], kind: pa.DataType) -> pa.Array:
    """Return what the feedback of each label brought, from the rows of records or from what came early."""
    early_L = np.flatnonzero(id_L <= -2)
    known = pa.concat_arrays(rows) if rows else pa.array([], kind)
    row_L = id_L.copy()
    if len(early_L):
        found = [early.get(-2 - seq) for seq in id_L[early_L].tolist()]
        row_L[early_L] = len(known) + np.arange(len(early_L))
        known = pa.concat_arrays([known, pa.array(found, kind)])
    return known.take(pa.array(row_L, mask=row_L < 0))
