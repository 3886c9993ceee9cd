"""Goal: every form in which a time comes means the same nanosecond, and what is no time is None, never an error.

Method: hypothesis writes times in the forms that shippers, servers and browsers use; the odd cases are written out.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.ingest.decode.times import (
    EventTime,
    any_unix_ns,
    clf_ns,
    decimal_ns,
    entry_ns,
    event_time_of,
    iso8601_ns,
    rfc3339_ns,
)

TIMES_NS = st.integers(0, 253_402_300_799_999_999_999)
ZONES = st.integers(-23 * 60 - 59, 23 * 60 + 59)


@given(TIMES_NS)
def test_a_time_means_the_same_in_every_unit(time_ns: int) -> None:
    for divisor, low, high in (
        (10**9, 0, 10**11),
        (10**6, 10**11, 10**14),
        (10**3, 10**14, 10**17),
        (1, 10**17, 2**63),
    ):
        number = time_ns // divisor
        if low <= number < high:
            assert any_unix_ns(number) == number * divisor


@pytest.mark.parametrize("value", [True, "noon", "2023-11-14T22:13:20", float("nan"), float("inf"), -1, 2**63, [], {}])
def test_what_is_no_time_is_none(value: Any) -> None:
    assert any_unix_ns(value) is None


@given(st.integers(-(10**10), 10**10), st.integers(0, 999_999_999), ZONES, st.sampled_from("Tt "), st.booleans())
def test_every_written_form_of_a_moment_is_the_same(
    seconds: int, nanos: int, zone_min: int, between: str, colon: bool
) -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    local = moment.astimezone(timezone(timedelta(minutes=zone_min)))
    sign = "-" if zone_min < 0 else "+"
    hours, minutes = divmod(abs(zone_min), 60)
    zone = f"{sign}{hours:02}{':' if colon else ''}{minutes:02}"
    text = local.strftime(f"{local.year:04}-%m-%d{between}%H:%M:%S") + f".{nanos:09}{zone}"
    expected = seconds * 10**9 + nanos
    assert rfc3339_ns(text) == iso8601_ns(text) == any_unix_ns(text) == expected
    clf = local.strftime(f"%d/%b/{local.year:04}:%H:%M:%S {zone.replace(':', '')}")
    assert clf_ns(clf) == seconds * 10**9
    utc = moment.strftime(f"{moment.year:04}-%m-%dT%H:%M:%S") + f".{nanos:09}"
    assert iso8601_ns(utc) == iso8601_ns(utc + "Z") == iso8601_ns(utc + " +00") == expected
    if seconds >= 0:
        assert decimal_ns(f"{seconds}.{nanos:09}", "s") == expected


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_none(text: str) -> None:
    for read in (rfc3339_ns, iso8601_ns, clf_ns, any_unix_ns):
        assert read(text) is None or isinstance(read(text), int)


def test_what_browsers_may_not_write_and_shippers_may() -> None:
    for text in (
        "2023-11-14T22:13:20",
        "2023-11-14T22:13:20+01",
        "2023-11-14T22:13:20 Z",
        "2023-11-14T22:13:20.1234567890123Z",
        "2016-12-31T23:59:60Z",
        "2023-11-14T22:13:20+23:60",
    ):
        assert rfc3339_ns(text) is None
        assert iso8601_ns(text) is not None
    assert rfc3339_ns("2023-11-14T22:13:20,5z") == 1_700_000_000_500_000_000


def test_a_leap_second_and_impossible_days() -> None:
    assert iso8601_ns("2016-12-31T23:59:60Z") == iso8601_ns("2017-01-01T00:00:00Z")
    assert iso8601_ns("2026-02-30T00:00:00Z") is None
    assert iso8601_ns("2026-01-01T24:00:00Z") is None
    assert clf_ns("31/Feb/2026:00:00:00 +0000") is None
    assert clf_ns("01/Xyz/2026:00:00:00 +0000") is None


def test_fluents_own_times() -> None:
    assert event_time_of(0, b"\0\0\0\5\0\0\0\7") == EventTime(5, 7)
    assert event_time_of(1, b"\0" * 8) is None
    assert event_time_of(0, b"\0" * 7) is None
    assert entry_ns(msgpack.Timestamp(-5, 0)) == -5 * 10**9
    assert entry_ns(float("nan")) is None
    assert entry_ns("5") is None
