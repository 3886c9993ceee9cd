"""Cuts hours of event time to spans of as many rows as fit into memory. Pure.

Hours that are small are put together. One that is too big is cut by its seconds, and a second by its milliseconds: all
samples of an impression have its event time, so they are in one span.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from headrace.backends.lake.hour_files import HOUR_MS
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.lake import SpanMs, StoredHour, StoredSpan

Int64s = npt.NDArray[np.int64]
TimesIn = Callable[[SpanMs], Iterable[Int64s]]
"""Gives the event times of the rows in a span, int64, some at a time."""
SECOND_MS = 1_000


def cut_hours(
    hours: Sequence[StoredHour], rows_max: int, times_in: TimesIn, within_ms: SpanMs | None = None
) -> list[StoredSpan]:
    """Return spans that have rows, in order, of at most `rows_max` rows; of more only where a millisecond has more.

    Args:
        hours: those that have rows, oldest first.
        times_in: asked for hours that must be cut, and for their seconds that must be.
        within_ms: leave out what is not in this.

    Raises `InvariantBroken` where an hour that is cut has other rows than `hours` says.
    """
    spans: list[StoredSpan] = []
    for hour in hours:
        for span in _parts(hour, rows_max, times_in, within_ms or (hour.begin_ms, hour.begin_ms + HOUR_MS)):
            if spans and spans[-1].rows + span.rows <= rows_max:
                spans[-1] = StoredSpan((spans[-1].span_ms[0], span.span_ms[1]), spans[-1].rows + span.rows)
            else:
                spans.append(span)
    return spans


def _parts(hour: StoredHour, rows_max: int, times_in: TimesIn, within_ms: SpanMs) -> Iterator[StoredSpan]:
    """Yield the hour, or those of its seconds and milliseconds that have rows."""
    whole_ms = hour.begin_ms, hour.begin_ms + HOUR_MS
    first_ms, end_ms = max(whole_ms[0], within_ms[0]), min(whole_ms[1], within_ms[1])
    if first_ms >= end_ms:
        return
    if (first_ms, end_ms) == whole_ms and hour.rows <= rows_max:
        yield StoredSpan(whole_ms, hour.rows)
        return
    rows_S = _counts(times_in(whole_ms), whole_ms, SECOND_MS)
    if rows_S.sum() != hour.rows:
        raise rows_gone(whole_ms, hour.rows, int(rows_S.sum()))
    for second in np.flatnonzero(rows_S).tolist():
        begin_ms = hour.begin_ms + second * SECOND_MS
        span_ms = begin_ms, begin_ms + SECOND_MS
        if begin_ms >= first_ms and span_ms[1] <= end_ms and rows_S[second] <= rows_max:
            yield StoredSpan(span_ms, int(rows_S[second]))
        elif span_ms[1] > first_ms and begin_ms < end_ms:
            yield from _milliseconds(times_in, span_ms, first_ms, end_ms)


def _milliseconds(times_in: TimesIn, span_ms: SpanMs, first_ms: int, end_ms: int) -> Iterator[StoredSpan]:
    rows_M = _counts(times_in(span_ms), span_ms, 1)
    for at_ms in (np.flatnonzero(rows_M) + span_ms[0]).tolist():
        if first_ms <= at_ms < end_ms:
            yield StoredSpan((at_ms, at_ms + 1), int(rows_M[at_ms - span_ms[0]]))


def _counts(times: Iterable[Int64s], span_ms: SpanMs, step_ms: int) -> Int64s:
    """Return how many times lie in each step of the span."""
    steps = (span_ms[1] - span_ms[0]) // step_ms
    rows_S = np.zeros(steps, np.int64)
    for time_N in times:
        rows_S += np.bincount((time_N - span_ms[0]) // step_ms, minlength=steps)
    return rows_S


def rows_gone(span_ms: SpanMs, held: int, left: int) -> InvariantBroken:
    """Return what is raised where a version has lost rows."""
    return InvariantBroken(
        f"this version of the lake held {held} rows of event times {span_ms[0]} to {span_ms[1]} and {left} are left: "
        "retention has dropped the others. Keep lake.retention_ms longer than what is to be read."
    )
