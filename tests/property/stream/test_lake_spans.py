"""Goal: hours of the lake are cut to spans that hold all rows, each once, and no more rows than are allowed, whatever
the times; rows that are gone are told. Method: random event times in few hours, many equal, few or many a span."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.lake.spans import cut_hours
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.lake import StoredHour

HOUR_MS = 3_600_000
BASE_MS = 1_700_000_000_000 // HOUR_MS * HOUR_MS


class Rows:
    """Event times; counts how many were read."""

    def __init__(self, times: list[int]) -> None:
        self.times, self.read = times, 0

    @property
    def hours(self) -> list[StoredHour]:
        begins = sorted({at // HOUR_MS * HOUR_MS for at in self.times})
        return [StoredHour(b, sum(b <= at < b + HOUR_MS for at in self.times)) for b in begins]

    def times_in(self, span_ms):
        found = [at for at in self.times if span_ms[0] <= at < span_ms[1]]
        self.read += len(found)
        return [np.array(found[i : i + 3], np.int64) for i in range(0, len(found), 3)]


def rows_of(seed: int, count: int) -> Rows:
    rng = Random(seed)
    moments = [BASE_MS + rng.randrange(30 * HOUR_MS) for _ in range(rng.randint(1, 8))]
    steps = [0, 1, 2, 999, 1_000, 70_000]
    return Rows([rng.choice(moments) + rng.choice(steps) for _ in range(count)])


@given(seed=st.integers(0, 2**32), count=st.integers(0, 60), rows_max=st.integers(1, 70), is_part=st.booleans())
def test_every_row_is_in_one_span_that_is_not_too_big(seed: int, count: int, rows_max: int, is_part: bool) -> None:
    rows, rng = rows_of(seed, count), Random(seed + 1)
    within = None
    if is_part:
        begin_ms = BASE_MS + rng.randrange(20 * HOUR_MS)
        within = begin_ms, begin_ms + rng.choice([1, 500, 1_500, HOUR_MS, 9 * HOUR_MS])
    wanted = [at for at in rows.times if within is None or within[0] <= at < within[1]]
    spans = cut_hours(rows.hours, rows_max, rows.times_in, within)
    assert sum(span.rows for span in spans) == len(wanted)
    for span in spans:
        here = [at for at in wanted if span.span_ms[0] <= at < span.span_ms[1]]
        assert span.rows == len(here) > 0
        assert len(here) <= rows_max or len(set(here)) == 1
        assert within is None or (within[0] <= span.span_ms[0] and span.span_ms[1] <= within[1])
    edges = [edge for span in spans for edge in span.span_ms]
    assert edges == sorted(edges)
    # Neighbours would not fit together.
    for one, two in itertools.pairwise(spans):
        assert one.rows + two.rows > rows_max


def test_hours_that_fit_are_not_read() -> None:
    rows = rows_of(1, 50)
    assert len(cut_hours(rows.hours, 50, rows.times_in)) == 1 and rows.read == 0


def test_an_hour_that_lost_rows_is_refused() -> None:
    """The log says how many there were, and a cut counts what is left: less would be left out in silence."""
    rows = Rows([BASE_MS + at for at in range(0, 90_000, 1_000)])
    hours = rows.hours
    del rows.times[-7:]
    with pytest.raises(InvariantBroken, match=r"held 90 rows .* and 83 are left"):
        cut_hours(hours, 20, rows.times_in)
