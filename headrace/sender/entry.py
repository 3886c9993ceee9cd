"""One event as the bytes that travel: its time and its record. Pure."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgpack
from fluent.sender import EventTime

from headrace.contract.errors import EventRejected
from headrace.contract.formats.nesting import LEVELS_MAX, TOO_DEEP, is_deeper

_TIME = struct.Struct(">II")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def time_ns_of(timestamp: float | Decimal | datetime | EventTime) -> int:
    """Return the Unix time in ns of seconds, of a `datetime` with a zone, or of an `EventTime`.

    Raises `EventRejected` on anything else: text times 10^9 would be gigabytes of text.

    >>> time_ns_of(Decimal("1772366400.123456789"))
    1772366400123456789
    """
    try:
        if isinstance(timestamp, EventTime):
            seconds, nanos = _TIME.unpack(timestamp.data)
            return int(seconds * 10**9 + nanos)
        if isinstance(timestamp, datetime):
            # Not by `timestamp()`, a float, which knows some 0.2 microseconds. A naive one has no difference to UTC.
            return (timestamp - _EPOCH) // _MICROSECOND * 1_000
        if isinstance(timestamp, Decimal):
            return int(timestamp.scaleb(9).to_integral_value())
        if isinstance(timestamp, float):
            return round(timestamp * 1e9)
        # `__index__`: an int, and what counts as one (numpy).
        return int(timestamp.__index__()) * 10**9
    except (ArithmeticError, AttributeError, TypeError, ValueError, struct.error) as error:
        raise EventRejected(
            "bad_time",
            f"a {type(timestamp).__name__} is no time here: give seconds since 1970, or a datetime with its zone.",
        ) from error


def pack_entry(tag: str, time_ns: int, data: dict[str, Any]) -> bytes:
    """Return an event as an entry of Fluent forward.

    Raises `EventRejected` on what MessagePack cannot say, `TypeError` on a type that it does not know.
    """
    if not isinstance(tag, str):
        raise TypeError(f"a tag is text, not {type(tag).__name__}")
    if not isinstance(data, dict):
        raise TypeError(f"an event is a map of its fields, not {type(data).__name__}")
    if is_deeper(data):
        raise EventRejected(
            TOO_DEEP, f"an event of tag {tag[:100]!r} has more than {LEVELS_MAX} levels: log it flatter."
        )
    try:
        entry = b"\x92\xd7\x00" + _TIME.pack(*divmod(time_ns, 10**9)) + bytes(msgpack.packb(data))
        tag.encode()
    except struct.error as error:
        raise EventRejected("bad_time", f"{time_ns} ns is no time between 1970 and 2106.") from error
    except (OverflowError, ValueError) as error:
        raise EventRejected("bad_type", f"MessagePack cannot say this event of tag {tag[:100]!r}: {error}.") from error
    return entry
