"""Times as shippers, servers and browsers write them, to nanoseconds since 1970; None where it is no time. Pure.

| function | what it reads | who writes it |
|---|---|---|
| `entry_ns` | Fluent's EventTime, seconds (whole or float), MessagePack's timestamp | forward clients |
| `any_unix_ns` | a number whose size tells its unit, RFC 3339, MessagePack's timestamp | the collector's clients |
| `rfc3339_ns` | a date and time with a zone | as above |
| `decimal_ns` | a decimal number of a declared unit, to its last digit | shippers that write to Kafka |
| `iso8601_ns` | a date and time, UTC where it names no zone | as above; nginx |
| `clf_ns` | the common log format's time | nginx, Apache |
"""

from __future__ import annotations

import math
import re
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack

NS_OF_UNIT: dict[str, int] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
CLF_SHAPE = r"\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}"
"""A time of the common log format, as a pattern without groups."""
DIGITS_MAX = 40
"""Longest number that is read as a time: beyond it no digit matters."""

_SECOND_NS = 1_000_000_000
_EPOCH_DAY = date(1970, 1, 1).toordinal()


class EventTime(NamedTuple):
    """Fluent's time with nanoseconds."""

    seconds: int
    nanoseconds: int


def event_time_of(code: int, data: bytes) -> EventTime | None:
    """Return the EventTime that a MessagePack ext value is; None where it is another one."""
    if code != 0 or len(data) != 8:
        return None
    return EventTime(int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big"))


def entry_ns(time: Any) -> int | None:
    """Return the time of a Fluent entry.

    >>> entry_ns(EventTime(5, 7)), entry_ns(5), entry_ns(0.5), entry_ns(True)
    (5000000007, 5000000000, 500000000, None)
    """
    if isinstance(time, EventTime):
        return time.seconds * _SECOND_NS + time.nanoseconds
    if isinstance(time, bool):
        return None
    if isinstance(time, int):
        return time * _SECOND_NS
    if isinstance(time, float) and math.isfinite(time):
        whole = math.floor(time)
        return whole * _SECOND_NS + round((time - whole) * 1e9)
    if isinstance(time, msgpack.Timestamp):
        return int(time.to_unix_nano())
    return None


def any_unix_ns(value: Any) -> int | None:
    """Return a time that comes without its unit: that of a number is known by its size.

    >>> any_unix_ns(1_700_000_000) == any_unix_ns(1_700_000_000_000) == any_unix_ns("2023-11-14T22:13:20Z")
    True
    >>> any_unix_ns(0.5), any_unix_ns("2023-11-14T22:13:20.123456789+01:00"), any_unix_ns("2023-11-14"), any_unix_ns(-1)
    (500000000, 1699996400123456789, None, None)
    """
    if isinstance(value, str):
        return rfc3339_ns(value)
    if isinstance(value, msgpack.Timestamp):
        return int(value.to_unix_nano())
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**63:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    # 10^11 seconds are the year 5138, 10^11 milliseconds 1973: nothing that is logged today lies on the wrong side.
    scale = _SECOND_NS
    for bound in (10**11, 10**14, 10**17):
        if value < bound:
            break
        scale //= 1_000
    whole = math.floor(value)
    return whole * scale + round((value - whole) * scale)


def decimal_ns(text: str, unit: str) -> int | None:
    """Return a decimal number of `unit`, nothing rounded before the last nanosecond.

    >>> decimal_ns("1700000000.123456789", "s"), decimal_ns("1e300", "s")
    (1700000000123456789, None)
    """
    value = float(text)
    # 1e13 s is the year 318,857: beyond, the digits are not worth their memory (1e300 has 300 of them).
    if not math.isfinite(value) or abs(value) > 1e13 * _SECOND_NS / NS_OF_UNIT[unit] or len(text) > DIGITS_MAX:
        return None
    return int((Decimal(text) * NS_OF_UNIT[unit]).to_integral_value())


def rfc3339_ns(text: str) -> int | None:
    """Return an RFC 3339 time: a zone is asked for, a leap second is not taken."""
    return iso8601_ns(text) if _RFC3339.fullmatch(text) else None


def iso8601_ns(text: str) -> int | None:
    """Return an ISO 8601 time, UTC where it names no zone. Digits beyond nanoseconds are cut off.

    >>> iso8601_ns("2026-03-01T12:34:56.123456789+0000") == iso8601_ns("2026-03-01T14:34:56.123456789+02:00")
    True
    """
    found = _ISO8601.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(found[n]) for n in range(1, 7))
    seconds = _seconds(year, month, day, hour, minute, second, found[8] or "Z")
    return None if seconds is None else seconds * _SECOND_NS + int((found[7] or "").ljust(9, "0")[:9])


@lru_cache(maxsize=1_024)
def clf_ns(text: str) -> int | None:
    """Return a time of the common log format.

    >>> clf_ns("01/Mar/2026:14:34:56 +0200")
    1772368496000000000
    """
    found = _CLF.fullmatch(text)
    if found is None or found[2] not in _MONTHS:
        return None
    day, year, hour, minute, second = (int(found[n]) for n in (1, 3, 4, 5, 6))
    seconds = _seconds(year, _MONTHS.index(found[2]) + 1, day, hour, minute, second, found[7])
    return None if seconds is None else seconds * _SECOND_NS


def _seconds(year: int, month: int, day: int, hour: int, minute: int, second: int, zone: str) -> int | None:
    try:
        days = date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError:
        return None
    # 60 is a leap second: the first of the next minute, as POSIX counts.
    if hour > 23 or minute > 59 or second > 60:
        return None
    return days * 86_400 + hour * 3_600 + minute * 60 + second - _zone_s(zone)


def _zone_s(zone: str) -> int:
    """Return the seconds that a zone such as `Z`, `+0200` or `-03:30` is ahead of UTC."""
    if zone in ("Z", "z"):
        return 0
    digits = zone[1:].replace(":", "")
    seconds = int(digits[:2]) * 3_600 + int(digits[2:] or 0) * 60
    return -seconds if zone[0] == "-" else seconds


_ISO8601 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9})\d*)?\s?(Z|z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:[0-5]\d(?:[.,]\d{1,12})?(?:[Zz]|[+-](?:(?:[01]\d|2[0-2]):?\d\d|23:?[0-5]\d))",
    re.ASCII,
)
_CLF = re.compile(r"(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-]\d{4})", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
