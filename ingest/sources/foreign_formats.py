"""Kafka messages as fluent-bit's `out_kafka` and fluentd's `kafka2` write them: bytes to (tag, time, record). Pure.

| format | written by | what is restored |
|---|---|---|
| `json` | fluent-bit (float, iso8601, iso8601_ns), kafka2 with and without `<inject>` | time to its last digit |
| `msgpack` | the same two | float64 time: the shortest decimal that means it |
| `gelf` | fluent-bit | `_name` is `name` again; level is a number there; milliseconds |
| `raw` | fluent-bit, anything | the text as one field; Kafka's timestamp |
| `otlp_json` | fluent-bit | one message holds many records; whole nanoseconds |

Bytes that are not UTF-8 stay as lone surrogates (PEP 383), as on the forward port.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple

import msgpack
import msgspec

from headrace.contract.config import SourceConfig
from headrace.contract.formats.nesting import LEVELS_MAX, TOO_DEEP, TOO_DEEP_TEXT
from headrace.ingest.decode.message import BAD_CHUNK
from headrace.ingest.decode.numbers import DECIMAL, INTEGER, NUMBER
from headrace.ingest.decode.shallow import KEPT, OTLP_KEPT, shallow_json, shallow_msgpack
from headrace.ingest.decode.times import (
    DIGITS_MAX,
    NS_OF_UNIT,
    EventTime,
    decimal_ns,
    entry_ns,
    event_time_of,
    iso8601_ns,
)
from headrace.ingest.sources.otlp_texts import log_record_texts


class Foreign(NamedTuple):
    """One record of a message. `problem` says why it cannot be read; `raw` has its bytes then, `reason` sorts it."""

    tag: str
    time_ns: int | None
    record: Any
    problem: str = ""
    raw: bytes = b""
    reason: str = BAD_CHUNK


class _Number(float):
    """A float that remembers how JSON wrote it: a time has more digits than a float holds."""

    text: str

    def __new__(cls, text: str) -> _Number:
        """Return the float, with its text."""
        made = super().__new__(cls, text)
        made.text = text
        return made


def read_foreign(source: SourceConfig, value: bytes | None, timestamp_ms: int | None) -> list[Foreign]:
    """Return the records of one Kafka message, in order; one that cannot be read has its `problem`.

    `timestamp_ms` is Kafka's own time of the message, for records that bring none.
    """
    if value is None:
        return [Foreign(source.tag, None, None, "the message has no value")]
    timestamp_ns = None if timestamp_ms is None else timestamp_ms * 1_000_000
    try:
        return _READERS[source.format](source, value, timestamp_ns)
    except _UNREADABLE as error:
        # The first line without the value: a dead letter's detail never holds a user's content.
        problem = f"no {source.format}: {_where(error)}"
        return [Foreign(source.tag, None, None, problem, value)]


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return f"{type(error).__name__}: {error}" if isinstance(error, _Unreadable) else type(error).__name__


class _Unreadable(ValueError):
    """What is wrong with a record; the message holds nothing of its content."""


class _TooDeep(ValueError):
    """A record has more levels than may be."""


_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What reading arbitrary bytes may raise."""


def _json(source: SourceConfig, value: bytes, timestamp_ns: int | None) -> list[Foreign]:
    return [_mapped(source, _json_value(value), timestamp_ns, value)]


def _msgpack(source: SourceConfig, value: bytes, timestamp_ns: int | None) -> list[Foreign]:
    record = msgpack.unpackb(shallow_msgpack(value), raw=False, unicode_errors="surrogateescape", strict_map_key=False)
    return [_mapped(source, record, timestamp_ns, value)]


def _raw(source: SourceConfig, value: bytes, timestamp_ns: int | None) -> list[Foreign]:
    return [_tagged(source, {source.text_field: value.decode("utf-8", "surrogateescape")}, timestamp_ns, value)]


def _gelf(source: SourceConfig, value: bytes, timestamp_ns: int | None) -> list[Foreign]:
    record = _json_value(value)
    if not isinstance(record, dict) or "version" not in record:
        raise _Unreadable("a GELF message is a map with a version")
    restored = {name: item for name, item in record.items() if name not in ("version", "timestamp", "short_message")}
    for name in list(restored):
        if name.startswith("_") and name[1:] not in restored:
            restored[name[1:]] = restored.pop(name)
    if "short_message" in record:
        restored.setdefault(source.text_field, record["short_message"])
    return [_tagged(source, restored, _time_of(record.get("timestamp"), "s", timestamp_ns), value)]


def _otlp(source: SourceConfig, value: bytes, timestamp_ns: int | None) -> list[Foreign]:
    found, raws = [], RecordBytes(source, value)
    for nth, entry in enumerate(_log_records(value)):
        try:
            one = _otlp_record(source, entry, timestamp_ns)
        except _TooDeep:
            one = Foreign(source.tag, None, None, TOO_DEEP_TEXT, reason=TOO_DEEP)
        except _UNREADABLE as error:
            one = Foreign(source.tag, None, None, f"no log record of OTLP: {_where(error)}")
        found.append(one._replace(raw=raws[nth]) if one.problem else one)
    return found


def _log_records(value: bytes) -> list[Any]:
    whole = _json_value(value, OTLP_KEPT)
    if not isinstance(whole, dict) or "resourceLogs" not in whole:
        raise _Unreadable("a message of OTLP is a map with resourceLogs")
    return [
        entry
        for resource in _list(whole, "resourceLogs")
        for scope in _list(resource, "scopeLogs")
        for entry in _list(scope, "logRecords")
    ]


class RecordBytes:
    """The bytes of each record of a message; of the whole message where they cannot be told."""

    def __init__(self, source: SourceConfig, value: bytes) -> None:
        self._value, self._is_otlp = value, source.format == "otlp_json"

    def __getitem__(self, nth: int) -> bytes:
        texts = self._texts
        return texts[nth] if nth < len(texts) else self._value

    @cached_property
    def _texts(self) -> list[bytes]:
        # Once a message, however many of its records are bad.
        return log_record_texts(self._value) if self._is_otlp else []


def _otlp_record(source: SourceConfig, entry: Any, timestamp_ns: int | None) -> Foreign:
    if not isinstance(entry, dict):
        raise _Unreadable("a log record is a map")
    record = {item["key"]: _any_value(item.get("value")) for item in _list(entry, "attributes")}
    body = _any_value(entry.get("body"))
    if body is not None:
        record |= body if isinstance(body, dict) else {source.text_field: body}
    # 0 means unknown (OpenTelemetry, logs data model), and the time of observation stands in.
    nanos = _int(entry.get("timeUnixNano") or 0) or _int(entry.get("observedTimeUnixNano") or 0)
    return _tagged(source, record, nanos or timestamp_ns, b"")


def _any_value(value: Any, depth: int = 1) -> Any:
    """Return what an OTLP `AnyValue` holds; 64-bit integers travel as strings in its JSON."""
    if depth > LEVELS_MAX:
        raise _TooDeep
    if not value:
        return None
    if not isinstance(value, dict) or len(value) != 1:
        raise _Unreadable("a value is a map of one kind")
    ((kind, inner),) = value.items()
    if kind == "kvlistValue":
        return {item["key"]: _any_value(item.get("value"), depth + 1) for item in _list(inner, "values")}
    if kind == "arrayValue":
        return [_any_value(item, depth + 1) for item in _list(inner, "values")]
    if kind == "intValue":
        return _int(inner)
    if kind == "doubleValue":
        return float(_digits(inner, NUMBER))
    if kind == "bytesValue":
        return base64.b64decode(inner, validate=True)
    if kind in ("stringValue", "boolValue"):
        return inner
    raise _Unreadable("a value of an unknown kind")


def _int(value: Any) -> int:
    """Return an integer of 64 bits: a number or its text, also written as 1.7e18 (protobuf, the mapping to JSON)."""
    if isinstance(value, _Number) and value.is_integer() and len(value.text) <= DIGITS_MAX:
        value = int(Decimal(value.text))
    return int(_digits(value, INTEGER))


def _digits(value: Any, pattern: re.Pattern[str]) -> str:
    """Return a number as its text, or a text that is one: `int` and `float` also take `1_0`, `inf`, other scripts."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Unreadable("a number of another type")
    if not pattern.fullmatch(text := str(value)):
        raise _Unreadable("a text that is no number")
    return text


def _list(value: Any, name: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if found is None and isinstance(value, dict):
        return []
    if not isinstance(found, list):
        raise _Unreadable(f"{name} is a list")
    return found


def _mapped(source: SourceConfig, record: Any, timestamp_ns: int | None, raw: bytes) -> Foreign:
    """Take the time out of a record that shippers wrote beside its fields."""
    if not isinstance(record, dict):
        raise _Unreadable("the message is no map")
    if source.time_field not in record:
        return _tagged(source, record, timestamp_ns, raw)
    time_ns = _time_of(record.pop(source.time_field), source.time_unit, None)
    if time_ns is None:
        raise _Unreadable(f"field {source.time_field!r} is no time; iso8601, or a number of {source.time_unit}")
    return _tagged(source, record, time_ns, raw)


def _tagged(source: SourceConfig, record: dict[Any, Any], time_ns: int | None, raw: bytes) -> Foreign:
    tag = record.get(source.tag_field) if source.tag_field else None
    if isinstance(tag, bytes):
        tag = tag.decode("utf-8", "surrogateescape")
    if isinstance(tag, str) and tag:
        del record[source.tag_field]
        return Foreign(tag, time_ns, record)
    if not source.tag:
        problem = f"field {source.tag_field!r} holds no tag, and the source declares none"
        return Foreign("", time_ns, None, problem, raw)
    return Foreign(source.tag, time_ns, record)


def _json_value(value: bytes, levels: int = KEPT) -> Any:
    value = shallow_json(value, levels)
    try:
        return _DECODER.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # fluentd writes bytes that are no UTF-8 as they are; Python's own reader takes them as lone surrogates.
        return json.loads(value.decode("utf-8", "surrogateescape"), parse_float=_Number, parse_constant=_no_constant)


def _no_constant(_text: str) -> Any:
    raise _Unreadable("NaN and Infinity are no JSON")


def _time_of(value: Any, unit: str, otherwise: int | None) -> int | None:
    """Return nanoseconds since 1970 of a number or a string, None where it is no time, `otherwise` where it is null."""
    if isinstance(value, bool) or value is None:
        return otherwise
    if isinstance(value, int):
        return value * NS_OF_UNIT[unit]
    if isinstance(value, float):
        return decimal_ns(value.text if isinstance(value, _Number) else repr(value), unit)
    if isinstance(value, msgpack.ExtType):
        value = event_time_of(value.code, value.data)
    if isinstance(value, EventTime | msgpack.Timestamp):
        return entry_ns(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str) or len(value) > DIGITS_MAX:
        return None
    return decimal_ns(value, unit) if DECIMAL.fullmatch(value) else iso8601_ns(value)


_DECODER = msgspec.json.Decoder(float_hook=_Number)
_READERS: dict[str, Callable[[SourceConfig, bytes, int | None], list[Foreign]]] = {
    "json": _json,
    "msgpack": _msgpack,
    "gelf": _gelf,
    "raw": _raw,
    "otlp_json": _otlp,
}
