"""Compiles the join's kernels before anyone waits for them: half a minute on a machine's first start, then cached.

Without it the first events would wait for the compiler, and with them every click.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from headrace.contract.config import JoinConfig
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    SPEC,
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import Project
from headrace.contract.rules import change_of, encode_change
from headrace.kernels.sample_ids import seal_of
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import encode_state, load_state

_DAY_MS = 86_400_000


def compile_join(project: Project, config: JoinConfig) -> None:
    """Lead a few events through a join of which nothing is kept.

    They are matched, early, late, twice, expired, restored, and read by other rules: each kernel is called with each
    of its types.
    """
    state = JoinState(project, config, silent_ms=1_000, partition=0)
    for record in _records(project):
        emitted = state.take(record)
        if emitted is not None:
            seal_of(emitted.batch)
    data = encode_state(state)
    again = JoinState(project, config, silent_ms=1_000, partition=0)
    load_state(again, data)
    again.take(punctuation_record(1_000, 9 * _DAY_MS))


def _records(project: Project) -> Iterator[Record]:
    shown = impression_schema(project)
    rows = [_row(shown, project, i) for i in (0, 1, 1, 2)]
    counters = [
        {"counter": c.name, "key": "1", "as_of_ms": 1, "epoch": 1, "counts": [1.0] * len(c.counts)}
        for c in project.features.counters
    ]
    yield events_record(0, AGGREGATE, batch_from_rows(counters, AGGREGATE_SCHEMA))
    offset = 1
    for when in range(3):
        for feedback in project.feedback:
            schema = feedback_schema(project, feedback)
            batch = batch_from_rows([_row(schema, project, i, feedback.name) for i in (1, 3, when)], schema)
            yield events_record(offset, FEEDBACK, batch, feedback.name)
            offset += 1
        yield events_record(offset, IMPRESSION, batch_from_rows(rows if when else rows[:2], shown))
        change = encode_change(change_of(project, when + 2, now_ms=0))
        yield Record("", 0, offset + 1, None, change, {"kind": SPEC}, 0)
        # Across the change: the impression that is answered, and one like it, are found under the older rules.
        yield events_record(offset + 2, FEEDBACK, batch, feedback.name)
        yield events_record(offset + 3, IMPRESSION, batch_from_rows(rows, shown))
        yield punctuation_record(offset + 4, _DAY_MS * when)
        offset += 5


def _row(schema: pa.Schema, project: Project, number: int, kind: str = "") -> dict[str, Any]:
    envelope = {"event_id": f"{kind}{number}", "request_id": f"r{number}", "place": 0, "key": "1", "event_time_ms": 1}
    return {field.name: _value(field.type) for field in schema} | envelope


def _value(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return [_value(kind.value_type)]
    if pa.types.is_string(kind):
        return "1"
    return pa.scalar(1).cast(kind).as_py()


def punctuation_record(offset: int, time_ms: int) -> Record:
    """Return a record of punctuation."""
    return Record("", 0, offset, None, encode_punctuation(Punctuation("compile", 1, time_ms)), {"kind": PUNCTUATION}, 0)


def events_record(offset: int, kind: str, batch: pa.RecordBatch, name: str = "") -> Record:
    """Return a record of events as it lies in the log."""
    headers = {"kind": kind, "type": name} if name else {"kind": kind}
    return Record("", 0, offset, None, encode_batch(batch), headers, 0)
