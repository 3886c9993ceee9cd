"""What should be: the events log through the same pure join again, without features, which no identity depends on.

A change of rules in the log is gone through like in the stream; a task counts from the partition's first row that it
was declared for.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import (
    EXTERNAL,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    Punctuation,
    decode_punctuation,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.spec import FeatureSpec
from headrace.replay.ledger.behind import Watermarks
from headrace.replay.ledger.draw import Expected
from headrace.replay.ledger.keys import JOINED, in_order
from headrace.replay.ledger.ledger import TaskCounts
from headrace.stream.join.join import JoinState
from headrace.stream.join.outcome import Totals
from headrace.stream.join.rules_in_force import Lane

# 1 s before the newest record: partitions are read to ends that were asked one after the other, and totals in one may
# speak of appends beyond the end of another.
SETTLED_MS = 1_000
RUN_RECORDS = 64
"""Most records that are joined at once: a pass costs what some ten small records do."""


Noted = dict[int, tuple[Totals, list[Lane]]]
"""By partition: the join's totals and tasks after one record."""


def rejoin(
    project: Project,
    config: Config,
    records: Iterable[Record],
    *,
    cuts: Mapping[int, int] = MappingProxyType({}),
    noted: Noted | None = None,
) -> tuple[Expected, list[Punctuation]]:
    """Return what the join makes of `records`, and the gateways' punctuation that carries settled totals.

    `project` is read by the rules that were in force from the log's beginning (`stream.rule_changes.first_rules`).
    What the join stands at after the record at `cuts[partition]` is put into `noted`.

    Raises `InvariantBroken` when the log no longer begins at offset 0: what came before it is not known any more.
    """
    states: dict[int, JoinState] = {}
    rows = {IMPRESSION: 0, FEEDBACK: 0, EXTERNAL: 0}
    tables: list[pa.Table] = []
    said: list[tuple[int, Punctuation]] = []
    answers = Counter[tuple[int, str]]()
    newest_ms, watermarks = 0, Watermarks(config.ingest.silent_ms)
    for run, answered in _runs(records, cuts):
        first = run[0]
        state = states.get(first.partition)
        if state is None:
            if first.offset != 0:
                raise InvariantBroken(
                    f"{first.topic}/{first.partition} begins at offset {first.offset}: retention took what the "
                    "ledger needs. Raise the topic's retention, or begin a new generation."
                )
            state = states[first.partition] = JoinState(
                project,
                config.join,
                silent_ms=config.ingest.silent_ms,
                partition=first.partition,
                as_read=_identities_only,
            )
        before = state.totals.feedback
        emitted = state.take_all(run)
        if noted is not None and run[-1].offset == cuts.get(first.partition):
            noted[first.partition] = state.totals, state.tasks
        answers[first.partition, answered] += state.totals.feedback - before
        if emitted is not None:
            tables.append(pa.Table.from_batches([emitted.batch.select(JOINED.names)]).cast(JOINED))
        for record in run:
            kind, newest_ms = record.headers.get("kind", ""), max(newest_ms, record.timestamp_ms)
            if record.value is not None and kind == PUNCTUATION:
                # One that is not ours the join counts, and nobody promised anything.
                with contextlib.suppress(msgspec.DecodeError):
                    promise = decode_punctuation(record.value)
                    watermarks.take(record.partition, record.offset, promise)
                    said.append((record.timestamp_ms, promise))
            elif record.value is not None and kind in rows:
                rows[kind] += row_count(record.value)
    samples = in_order(pa.concat_tables(tables)).combine_chunks() if tables else JOINED.empty_table()
    settled = [p for at, p in said if at <= newest_ms - SETTLED_MS or p.bye]
    return _expected(samples, rows, answers, list(states.values()), watermarks), settled


def _runs(records: Iterable[Record], cuts: Mapping[int, int]) -> Iterator[tuple[list[Record], str]]:
    """Cut each partition into runs that the join takes at once: (records, the type of feedback among them or "")."""
    waiting: dict[int, list[Record]] = {}
    types: dict[int, str] = {}
    for record in records:
        partition, kind = record.partition, record.headers.get("type", "")
        run, before = waiting.setdefault(partition, []), types.setdefault(partition, "")
        if len(run) == RUN_RECORDS or (kind and before and kind != before):
            yield run, before
            run, before = [], ""
            waiting[partition] = run
        run.append(record)
        types[partition] = kind or before
        if record.offset == cuts.get(partition):
            yield run, types[partition]
            waiting[partition], types[partition] = [], ""
    for partition, run in waiting.items():
        if run:
            yield run, types[partition]


def _expected(
    samples: pa.Table,
    rows: dict[str, int],
    answers: Counter[tuple[int, str]],
    states: list[JoinState],
    watermarks: Watermarks,
) -> Expected:
    tasks: dict[str, TaskCounts] = {}
    for state in states:
        for (task, feedback), counts in zip(state.tasks, state.totals.tasks, strict=True):
            total = tasks.setdefault(task, TaskCounts())
            for name in (
                *("impressions", "positives", "negatives", "waiting"),
                *("matched", "duplicate", "late", "orphans", "pending"),
            ):
                setattr(total, name, getattr(total, name) + getattr(counts, name))
            total.feedback += answers[state.partition, feedback]
    return Expected(
        samples=samples,
        rows=rows,
        repeated_in_log=sum(state.totals.repeated_in_log for state in states),
        tasks=tasks,
        impressions=sum(state.totals.impressions for state in states),
        feedback=sum(state.totals.feedback for state in states),
        resolved_ms_N=watermarks.resolved(samples),
        newest_ms=watermarks.newest_ms,
    )


def _identities_only(project: Project) -> Project:
    """Return `project` without raw fields, counters and features: the join then carries little else than ids."""
    replace, key = msgspec.structs.replace, project.impression.key
    return replace(
        project,
        impression=replace(project.impression, fields={key: project.impression.fields[key]}),
        feedback=tuple(replace(feedback, fields={}) for feedback in project.feedback),
        features=FeatureSpec(),
        crawls=(),
    )


def row_count(value: bytes) -> int:
    """Return how many rows a record holds, decoding its first column only; 0 where it can't be decoded."""
    try:
        with pa.ipc.open_stream(
            pa.py_buffer(value), options=pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)
        ) as reader:
            return sum(batch.num_rows for batch in reader)
    except (pa.ArrowInvalid, OSError):
        return 0
