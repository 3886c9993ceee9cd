"""Rows of a history to events, checked as the gateway checks a log line. Pure.

| reason | a row that is refused, besides those of `headrace.ingest.decode.validate` |
|---|---|
| `before_from` | its time lies before `--from` |
| `after_until` | an impression at or after `--until`, where live ones begin; feedback that no imported one waits for |
| `window_open` | an impression whose longest window is not over: its label can still change |
| `no_label`, `bad_label` | a labelled row without a label for a task, or with one that is none or contradicts another |
| `in_lake` | an impression that the lake holds already |
| `repeat` | an event whose id came before, in the same import |

Legend: N rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from headrace.contract.privacy import Privacy
from headrace.contract.project import Project, Task
from headrace.ingest.decode.validate import Declared, brings_id, check, declared_types

NO_TIME_TEXT = "is no time: a timestamp, ISO 8601, or a Unix time in s, ms, us or ns is"
_TRUE, _FALSE = frozenset({"1", "1.0", "true", "t", "yes"}), frozenset({"0", "0.0", "false", "f", "no"})


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """One row that is not imported, and why."""

    file: str
    row: int
    """1 for the first one of the file."""
    reason: str
    detail: str
    record: Any
    """What it brought, private fields hashed or left out."""


@dataclass(frozen=True)
class Bounds:
    """The times between which history is imported, Unix ms."""

    from_ms: int
    until_ms: int
    now_ms: int
    """When the import began."""


@dataclass(frozen=True)
class Events:
    """Rows of one type that passed every check."""

    declared: Declared
    batch: pa.RecordBatch


class Rows:
    """Checks the rows of one import."""

    def __init__(self, project: Project, privacy: Privacy, bounds: Bounds, *, past_ms: int, skew_ms: int) -> None:
        self._project, self._privacy, self._bounds = project, privacy, bounds
        self._taken_ms = range(past_ms, bounds.now_ms + skew_ms + 1)
        self._declared = {each.name: each for each in declared_types(project, privacy.token_key).values()}
        self._longest_ms = max((t.window_ms for t in project.tasks), default=0)
        self._last_ms = bounds.until_ms + max((t.window_ms + t.correct_ms for t in project.tasks), default=0)

    def declared(self, name: str) -> Declared:
        """Return a type by its name: `impression`, or that of a feedback."""
        return self._declared[name]

    def events(
        self, name: str, records: Sequence[dict[str, Any]], file: str, first_row: int
    ) -> tuple[Events, list[Refusal], np.ndarray[Any, Any]]:
        """Return what of these records of one type is imported, what is not, and which records are: int64 [N].

        `event_time_ms` is an integer, null, or the value that is no time.
        """
        declared = self._declared[name]
        refused: dict[int, tuple[str, str]] = {}
        for at, record in enumerate(records):
            time_ms = record.get("event_time_ms")
            if not isinstance(time_ms, int):
                told = "the time is missing" if time_ms is None else f"{str(time_ms)[:64]!r} {NO_TIME_TEXT}"
                refused[at] = ("bad_type", told)
        # A time for the check to pass: these rows are refused by what stands above.
        given = [{**r, "event_time_ms": self._bounds.now_ms} if at in refused else r for at, r in enumerate(records)]
        ids = [_derived_id(declared, r) if not brings_id(r) else "" for r in given]
        checked = check(declared, given, [0] * len(given), ids, taken_ms=self._taken_ms)
        refused |= {at: told for at, told in checked.rejected.items() if at not in refused}
        rows_N, time_N = np.array(checked.rows, np.int64), checked.batch["event_time_ms"].to_numpy()
        for reason, detail, wrong_N in self._outside(declared, time_N):
            for at in rows_N[wrong_N].tolist():
                refused.setdefault(at, (reason, detail))
        keep = np.array([at not in refused for at in checked.rows], np.bool_)
        batch = checked.batch if keep.all() else checked.batch.filter(pa.array(keep))
        batch = self._privacy.batch(batch, declared.tag, declared.key)
        refusals = [
            self._refusal(file, first_row + at, *why, records[at], declared) for at, why in sorted(refused.items())
        ]
        return Events(declared, batch), refusals, rows_N[keep]

    def refusal(self, file: str, row: int, reason: str, detail: str, record: Any, name: str) -> Refusal:
        """Return a refusal of a record of one type, as it may be shown."""
        return self._refusal(file, row, reason, detail, record, self._declared[name])

    def _refusal(self, file: str, row: int, reason: str, detail: str, record: Any, declared: Declared) -> Refusal:
        return Refusal(
            file=file, row=row, reason=reason, detail=detail, record=self._privacy.record(record, declared.tag)
        )

    def _outside(self, declared: Declared, time_N: Any) -> Iterator[tuple[str, str, Any]]:
        bounds = self._bounds
        yield "before_from", f"the import begins at {bounds.from_ms} ms", time_N < bounds.from_ms
        if declared.kind == "impression":
            yield "after_until", f"the import ends before {bounds.until_ms} ms", time_N >= bounds.until_ms
            yield (
                "window_open",
                f"its window of {self._longest_ms} ms was not over when the import began, at {bounds.now_ms} ms",
                time_N + self._longest_ms > bounds.now_ms,
            )
        else:
            last = f"no imported impression waits for feedback after {self._last_ms} ms"
            yield "after_until", last, time_N > self._last_ms

    def labelled(
        self, records: Sequence[dict[str, Any]], labels: Sequence[Mapping[str, Any]], file: str, first_row: int
    ) -> tuple[list[Events], list[Refusal]]:
        """Return the impressions of labelled rows and the feedback that gives them their labels, and what is refused.

        Args:
            labels: of each row, by task: (label, time of its feedback in ms or null, value).
        """
        wrong: dict[int, tuple[str, str]] = {}
        answers: list[dict[str, dict[str, Any]]] = []
        for at, (record, row) in enumerate(zip(records, labels, strict=True)):
            try:
                answers.append(self._answers(record, row))
            except _WrongLabel as error:
                wrong[at] = (error.reason, str(error))
                answers.append({})
        right = [at for at in range(len(records)) if at not in wrong]
        told = [
            self.refusal(file, first_row + at, *why, records[at], "impression") for at, why in sorted(wrong.items())
        ]
        impressions, refused, kept_N = self.events("impression", [records[at] for at in right], file, 0)
        told += [msgspec.structs.replace(each, row=first_row + right[each.row]) for each in refused]
        found = [impressions]
        ids = impressions.batch["event_id"].to_pylist()
        for name in [f.name for f in self._project.feedback]:
            given = [
                {**answers[right[row]][name], "event_id": f"{ids[n]}/{name}"}
                for n, row in enumerate(kept_N.tolist())
                if name in answers[right[row]]
            ]
            if given:
                found.append(self._feedback(name, given))
        return found, told

    def _feedback(self, name: str, records: list[dict[str, Any]]) -> Events:
        declared = self._declared[name]
        everywhen = range(2**62)
        checked = check(declared, records, [0] * len(records), [""] * len(records), taken_ms=everywhen)
        return Events(declared, self._privacy.batch(checked.batch, declared.tag, declared.key))

    def _answers(self, record: dict[str, Any], row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return, by type, the feedback that gives an impression its labels. Raises `_WrongLabel`."""
        shown_ms, found = record.get("event_time_ms"), {}
        for feedback in self._project.feedback:
            tasks = sorted((t for t in self._project.tasks if t.feedback == feedback.name), key=lambda t: t.window_ms)
            positive = [task for task in tasks if _label(task, row[task.name][0])]
            if not positive or not isinstance(shown_ms, int):
                continue
            at_ms = next((row[t.name][1] for t in positive if row[t.name][1] is not None), None)
            if at_ms is not None and not isinstance(at_ms, int):
                raise _WrongLabel("bad_label", f"task {positive[0].name!r}: {str(at_ms)[:64]!r} {NO_TIME_TEXT}")
            at_ms = shown_ms + positive[0].window_ms if at_ms is None else at_ms
            _check_time(tasks, positive, shown_ms, at_ms)
            fields = {name: record[name] for name in [*feedback.fields, self._project.impression.key] if name in record}
            value = next((row[t.name][2] for t in positive if row[t.name][2] is not None), None)
            found[feedback.name] = {
                **fields,
                **{name: record.get(name) for name in ("request_id", "place")},
                "event_time_ms": at_ms,
                "value": value if isinstance(value, int | float) and math.isfinite(value) else None,
            }
        return found


class _WrongLabel(Exception):
    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _label(task: Task, value: Any) -> bool:
    if value is None:
        raise _WrongLabel("no_label", f"task {task.name!r} has no label")
    text = str(value).strip().lower()
    if text not in _TRUE and text not in _FALSE:
        raise _WrongLabel("bad_label", f"task {task.name!r}: {text[:64]!r} is neither 0 nor 1")
    return text in _TRUE


def _check_time(tasks: Sequence[Task], positive: Sequence[Task], shown_ms: int, at_ms: int) -> None:
    if at_ms < shown_ms:
        raise _WrongLabel("bad_label", f"its feedback came {shown_ms - at_ms} ms before the impression")
    for task in tasks:
        if (at_ms <= shown_ms + task.window_ms) != (task in positive):
            raise _WrongLabel(
                "bad_label",
                f"task {task.name!r} is {int(task in positive)}, its window is {task.window_ms} ms, and its feedback "
                f"came {at_ms - shown_ms} ms after the impression",
            )


def _derived_id(declared: Declared, record: Mapping[str, Any]) -> str:
    """Return the id of an event that brings none: of the request and place for an impression, else of all it has."""
    if declared.kind == "impression":
        return f"{record.get('request_id')}/{record.get('place') or 0}"
    named = sorted((str(name), repr(value)) for name, value in record.items())
    return hashlib.blake2b(f"{declared.tag} {named}".encode("utf-8", "replace"), digest_size=16).hexdigest()
