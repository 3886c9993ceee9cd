"""The rows of a history's inputs, batch by batch, through the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace.contract.formats.events import feedback_schema, impression_schema
from headrace.contract.project import Project
from headrace.ingest.decode.times import iso8601_ns
from headrace.stream.history.inputs import SourceFile, digest_of, files_of, plain, times_ms
from headrace.stream.history.mapping import TIME, History, Input, Labelled, columns_of, fields_of, required
from headrace.stream.history.rows import Events, Refusal, Rows

Checked = tuple[Sequence[Events], list[Refusal]]


class Read:
    """The inputs of one history. Raises `ConfigRejected` where files or columns are missing.

    Args:
        folder: to which the mapping's paths are relative.
    """

    def __init__(self, history: History, project: Project, folder: Path) -> None:
        self.project = project
        self.inputs: list[tuple[str, str | None, Input]] = []
        """Name, type of feedback (None for impressions), what the mapping says."""
        if history.labelled is not None:
            self.inputs.append(("labelled", None, history.labelled))
        if history.impressions is not None:
            self.inputs.append(("impressions", None, history.impressions))
        self.inputs += [(f"feedback.{name}", name, each) for name, each in sorted(history.feedback.items())]
        self.files = {name: files_of(given, folder) for name, _, given in self.inputs}
        self.digests = {name: digest_of(files) for name, files in self.files.items()}
        self.columns = {
            (name, file.path): self._columns_of(kind, given, file)
            for name, kind, given in self.inputs
            for file in self.files[name]
        }
        self.rows: Counter[str] = Counter()
        self.ignored: dict[str, list[str]] = {}
        self.is_cut = False
        """True once rows were left out since only some were asked for."""

    def _columns_of(self, kind: str | None, given: Input, file: SourceFile) -> dict[str, str]:
        where, there = str(file.path), file.columns
        found = columns_of(given.columns, fields_of(self.project, kind), there, where)
        needed = [TIME, self.project.impression.key]
        if not isinstance(given, Labelled):
            required(found, [*needed, "request_id"], there, where)
            return found
        required(found, needed, there, where)
        for columns in (given.labels, given.times, given.values):
            columns_of(columns, columns, there, where)
        return found


def read_rows(read: Read, rows: Rows, rows_max: int | None) -> Iterator[Checked]:
    """Yield, batch by batch, what of the rows is imported and what is refused. Counts in `read`."""
    for name, kind, given in read.inputs:
        left = rows_max
        used: set[str] = set()
        there: list[str] = []
        for file in read.files[name]:
            columns = read.columns[name, file.path]
            extra = _extra_of(given)
            used |= {*columns.values(), *extra}
            there += [column for column in file.columns if column not in there]
            first = 1
            for batch in file.batches(sorted({*columns.values(), *extra})):
                if left is not None and left < batch.num_rows:
                    batch, read.is_cut = batch.slice(0, left), True
                left = None if left is None else left - batch.num_rows
                if batch.num_rows:
                    read.rows[name] += batch.num_rows
                    yield _checked(read.project, rows, kind, given, columns, file, first, batch)
                    first += batch.num_rows
                if left == 0:
                    break
        read.ignored[name] = [column for column in there if column not in used]


def _extra_of(given: Input) -> list[str]:
    if not isinstance(given, Labelled):
        return []
    return [*given.labels.values(), *given.times.values(), *given.values.values()]


def _checked(
    project: Project,
    rows: Rows,
    kind: str | None,
    given: Input,
    columns: dict[str, str],
    file: SourceFile,
    first: int,
    batch: pa.RecordBatch,
) -> Checked:
    schema = (
        impression_schema(project)
        if kind is None
        else feedback_schema(project, next(f for f in project.feedback if f.name == kind))
    )
    types = {each.name: each.type for each in schema}
    found = {
        field: times_ms(batch.column(column), given.time_unit, iso8601_ns)
        if field == TIME
        else plain(batch.column(column), types.get(field))
        for field, column in columns.items()
    }
    records = _records(found, batch.num_rows)
    name = str(file.path)
    if not isinstance(given, Labelled):
        events, refused, _ = rows.events(kind or "impression", records, name, first)
        return [events], refused
    _name_requests(records, file, first)
    return rows.labelled(records, _labels(project, given, batch), name, first)


def _records(found: dict[str, list[Any]], count: int) -> list[dict[str, Any]]:
    names = list(found)
    if not names:
        return [{} for _ in range(count)]
    # A place that is missing is 0, and a value that is null was not sent.
    return [dict(zip(names, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _name_requests(records: list[dict[str, Any]], file: SourceFile, first: int) -> None:
    """Give labelled rows without a request one of their own: nothing else must find them."""
    digest = ""
    for at, record in enumerate(records):
        if record.get("request_id") in (None, ""):
            own = record.get("event_id")
            if own in (None, ""):
                digest = digest or digest_of([file])[:16]
                own = f"{digest}-{first + at}"
            record["request_id"] = str(own)


def _labels(project: Project, given: Labelled, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return, row by row and by task, (label, time of its feedback in ms, value)."""
    nothing = [None] * batch.num_rows
    by_task = {}
    for task in project.tasks:
        label = plain(batch.column(given.labels[task.name]), None)
        at, value = given.times.get(task.name), given.values.get(task.name)
        times = nothing if at is None else times_ms(batch.column(at), given.time_unit, iso8601_ns)
        values = nothing if value is None else plain(batch.column(value), pa.float64())
        by_task[task.name] = list(zip(label, times, values, strict=True))
    return [dict(zip(by_task, row, strict=True)) for row in zip(*by_task.values(), strict=True)]
