"""Records to one Arrow batch of their declared schema, column by column. Pure: time comes in as a number.

What is refused is named row by row with a stable reason; it becomes a dead letter and never stops its neighbours.

| reason | meaning |
|---|---|
| `bad_type` | no map, or a field whose value is not of its declared type (numbers must be finite) |
| `unknown_field` | a field that the type does not declare, where the type says `unknown="refuse"` |
| `no_partition_key`, `no_request_id` | the field is missing, null or empty |
| `future` | the event time is further ahead of the gateway's clock than `ingest.skew_ms` |
| `past` | the event time lies before `ingest.past` |
| `too_deep` | the record has more than 100 levels of lists and maps |
| `served_unreadable`, `served_key`, `served_format` | `served` is no token of ours, or of another key or release |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.checks.unknown_fields import meant_field
from headrace.contract.formats.events import FEEDBACK, IMPRESSION, feedback_schema, impression_schema, name_of
from headrace.contract.formats.nesting import TOO_DEEP, TOO_DEEP_TEXT, is_deeper
from headrace.contract.formats.served_token import REFUSALS, SERVED, TokenKey
from headrace.contract.project import EXTRA, FeedbackType, ImpressionType, Project, Unknown
from headrace.ingest.decode.served import ServedTokens, opened_record, served_tokens

ID_BYTES_MAX = 512
"""Longest event id, request id and partition key, in characters."""
ENVELOPE_NAMES = frozenset({"event_id", "request_id", "place", "event_time_ms"})
PLACE_MAX = 2**31 - 1
_EXACT_FLOAT = 2**53
_EXTRA_DEPTH_MAX = 32

_NONE = type(None)
_TAKEN_AS_IS: dict[pa.DataType, frozenset[type]] = {
    pa.int64(): frozenset({int, _NONE}),
    pa.float64(): frozenset({float, int, _NONE}),
    pa.float32(): frozenset({float, int, _NONE}),
    pa.string(): frozenset({str, _NONE}),
    pa.bool_(): frozenset({bool, _NONE}),
}
_LISTS = frozenset({pa.list_(pa.string()), pa.list_(pa.int64())})

Reject = Callable[[int, str, str], None]


class Declared(msgspec.Struct, frozen=True):
    """One event type as the project declares it."""

    name: str
    """"impression", or the feedback type's name."""
    kind: str
    tag: str
    key: str
    """Raw field that is the partition key."""
    schema: pa.Schema
    unknown: Unknown
    known: frozenset[str]
    hashed: frozenset[str] = frozenset()
    """Private fields that come as text or integers and are stored as hashes."""
    served: ServedTokens | None = None
    """Opens the tokens of impressions; None of feedback, which brings none."""


class Checked(msgspec.Struct, frozen=True):
    """What became of the rows: `batch` holds the good ones in order; `rows` says which they were."""

    batch: pa.RecordBatch
    rows: list[int]
    rejected: dict[int, tuple[str, str]]
    """Row to (reason, detail)."""


def declared_types(project: Project, key: TokenKey | None = None) -> dict[str, Declared]:
    """Return every declared type by its tag; `key` is that of the tokens of impressions."""
    imp = project.impression
    # What one type calls private is kept by none as an unknown field.
    kinds: tuple[ImpressionType | FeedbackType, ...] = (imp, *project.feedback)
    private = {name for kind in kinds for name in kind.private}
    shown = _declared(IMPRESSION, IMPRESSION, imp, imp.key, impression_schema(project), private)
    found = [msgspec.structs.replace(shown, known=shown.known | {SERVED}, served=served_tokens(project, key))]
    for fb in project.feedback:
        found.append(_declared(fb.name, FEEDBACK, fb, imp.key, feedback_schema(project, fb), private))
    return {item.tag: item for item in found}


def _declared(
    name: str, kind: str, of: ImpressionType | FeedbackType, key: str, schema: pa.Schema, private: set[str]
) -> Declared:
    known = frozenset(schema.names) - {"key"} | ENVELOPE_NAMES | {key} | private
    hashed = frozenset(field for field, how in of.private.items() if how == "hash")
    return Declared(name, kind, of.tag, key, schema, of.unknown, known - {EXTRA}, hashed)


def check(
    declared: Declared,
    records: Sequence[Any],
    times_ns: Sequence[int | None],
    derived_ids: Sequence[str],
    *,
    taken_ms: range,
) -> Checked:
    """Return the good rows as one batch of `declared.schema` and why the others are not in it.

    `derived_ids` and `times_ns` stand in where a record has no `event_id` or `event_time_ms` of its own.
    Event times in `taken_ms` are accepted.
    """
    rejected: dict[int, tuple[str, str]] = {}

    def reject(row: int, reason: str, detail: str) -> None:
        rejected.setdefault(row, (reason, detail))

    rows = _maps(records, times_ns, reject)
    if declared.served is not None and any(SERVED in record for record in rows):
        rows = [opened_record(record) for record in rows]
    for at, record in enumerate(rows):
        if is_deeper(record):
            reject(at, TOO_DEEP, TOO_DEEP_TEXT)
    if declared.unknown == "refuse":
        for at, record in enumerate(rows):
            if not record.keys() <= declared.known:
                names = sorted(str(name)[:64] for name in record.keys() - declared.known)[:5]
                meant = next((text for name in names if (text := meant_field(name, declared.known))), "")
                remedy = "declare them, or set unknown='drop' or 'keep'"
                reject(at, "unknown_field", f"undeclared fields {names}; {remedy}.{meant}".removesuffix("."))
    columns: dict[str, pa.Array] = {}
    strict = frozenset({declared.key})
    for field in declared.schema:
        if field.name == EXTRA and declared.unknown == "keep":
            columns[EXTRA] = pa.array([_extra(record, declared.known) for record in rows], pa.string())
        elif field.name not in _ENVELOPE:
            values = [r.get(field.name) for r in rows]
            if field.name in declared.hashed:
                values = [str(v) if isinstance(v, int) and not isinstance(v, bool) else v or None for v in values]
            columns[field.name] = _column(values, field, field.name in strict, reject)
    columns["key"] = _keys(columns[declared.key], declared.key, reject)
    columns["event_id"] = _ids([r.get("event_id") for r in rows], "event_id", derived_ids, reject)
    columns["request_id"] = _ids([r.get("request_id") for r in rows], "request_id", None, reject)
    columns["place"] = _places([r.get("place") for r in rows], reject)
    columns["event_time_ms"] = _times([r.get("event_time_ms") for r in rows], times_ns, taken_ms, reject)
    if declared.served is not None:
        _take_tokens(declared.served, columns, [record.get(SERVED) for record in rows], reject)
    good = [at for at in range(len(rows)) if at not in rejected]
    arrays = [columns[field.name] for field in declared.schema]
    if rejected:
        keep = pa.array(good, pa.int64())
        arrays = [array.take(keep) for array in arrays]
    return Checked(pa.RecordBatch.from_arrays(arrays, schema=declared.schema), good, rejected)


_ENVELOPE = ENVELOPE_NAMES | {"key"}


def _take_tokens(served: ServedTokens, columns: dict[str, pa.Array], tokens: list[Any], reject: Reject) -> None:
    """Put what tokens say into the columns, and reject the rows whose token is none of ours."""
    if tokens.count(None) == len(tokens):
        return
    texts = [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in tokens]
    # What is no text at all is refused as a text is that is no token.
    told = [text if text is None or (isinstance(text, str) and text.isascii()) else "?" for text in texts]
    opened = served.open(pa.array(told, pa.string()))
    for row, reason in opened.reasons.items():
        reject(row, reason, REFUSALS[reason])
    served.fill(columns, opened, opened.is_open_N)


def _maps(records: Sequence[Any], times_ns: Sequence[int | None], reject: Reject) -> Sequence[Mapping[Any, Any]]:
    if set(map(type, records)) <= {dict} and None not in times_ns:
        return records
    rows: list[dict[Any, Any]] = []
    for at, (record, time_ns) in enumerate(zip(records, times_ns, strict=True)):
        if time_ns is None:
            reject(at, "bad_type", "the entry is not [time, record]")
        elif not isinstance(record, dict):
            reject(at, "bad_type", f"the record is {type(record).__name__}, not a map")
        rows.append(record if isinstance(record, dict) else {})
    return rows


def _column(values: list[Any], field: pa.Field, strict: bool, reject: Reject) -> pa.Array:
    """Return `values` as a column of `field`'s type, null where a row is rejected."""
    if set(map(type, values)) <= _TAKEN_AS_IS.get(field.type, frozenset()):
        try:
            column = pa.array(values, type=field.type)
        except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):
            pass
        else:
            if not pa.types.is_floating(field.type) or pc.all(pc.is_finite(column)).as_py() is not False:
                return column
    fitted: list[Any] = []
    for at, value in enumerate(values):
        try:
            fitted.append(_fit(value, field.type, strict))
        except (ValueError, OverflowError) as error:
            reject(at, "bad_type", f"field {field.name!r} is declared {name_of(field.type)}: {error}")
            fitted.append(None)
    return pa.array(fitted, type=field.type)


def _fit(value: Any, kind: pa.DataType, strict: bool) -> Any:
    """Return `value` as Arrow takes it for `kind`, or raise `ValueError` saying what it is instead."""
    if value is None:
        return None
    if kind == pa.bool_():
        if isinstance(value, bool):
            return value
    elif kind == pa.string():
        if isinstance(value, str | bytes):
            return _utf8(value, strict)
    elif kind in _LISTS:
        if isinstance(value, list):
            return [_fit(item, kind.value_type, strict) for item in value]
    elif kind == pa.int64():
        if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if not -(2**63) <= value < 2**63:
                raise ValueError("an integer beyond 64 bits with sign")
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if number - number != 0.0:
            raise ValueError("not a finite number")
        return number
    raise ValueError(f"got {type(value).__name__}")


def _extra(record: Mapping[Any, Any], known: frozenset[str]) -> str | None:
    """Return the fields that are not known as JSON, names in order; null where there are none."""
    unknown = {name: value for name, value in record.items() if name not in known}
    if not unknown:
        return None
    return json.dumps(_plain(unknown, 0), sort_keys=True, separators=(",", ":"))


def _plain(value: Any, depth: int) -> Any:
    """Return what JSON can say of a value; what it cannot becomes text."""
    if depth > _EXTRA_DEPTH_MAX:
        return f"(nested deeper than {_EXTRA_DEPTH_MAX})"
    if isinstance(value, dict):
        return {_text_of(name): _plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, depth + 1) for inner in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _text_of(value)


def _text_of(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _utf8(value: str | bytes, strict: bool) -> str:
    """Return text; bytes that are not UTF-8 become U+FFFD, or a `ValueError` where the text is a key or an id."""
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if strict:
            raise ValueError("bytes that are not UTF-8") from error
        return data.decode("utf-8", "replace")


def _keys(column: pa.Array, name: str, reject: Reject) -> pa.Array:
    keys = ["" if value is None else str(value) for value in column.to_pylist()]
    for at, key in enumerate(keys):
        if not key:
            reject(at, "no_partition_key", f"field {name!r} is missing, null or empty")
        elif len(key) > ID_BYTES_MAX:
            reject(at, "bad_type", f"field {name!r} has {len(key)} characters; a key has at most {ID_BYTES_MAX}")
    return pa.array(keys, pa.string())


def _ids(values: list[Any], name: str, derived: Sequence[str] | None, reject: Reject) -> pa.Array:
    """Return an id a row: text, or an integer as text; `derived` (or a rejection) where there is none."""
    ids: list[str] = []
    for at, value in enumerate(values):
        text = value
        if type(value) is not str:
            try:
                text = _id_text(value)
            except ValueError as error:
                reject(at, "bad_type", f"{name}: {error}")
                text = ""
        if not text:
            if derived is None:
                reject(at, "no_request_id", "request_id is missing, null or empty")
            text = derived[at] if derived is not None else ""
        elif len(text) > ID_BYTES_MAX:
            reject(at, "bad_type", f"{name} has {len(text)} characters; at most {ID_BYTES_MAX}")
            text = ""
        ids.append(text)
    try:
        return pa.array(ids, pa.string())
    except UnicodeEncodeError:
        for at, text in enumerate(ids):
            if not _encodes(text):
                reject(at, "bad_type", f"{name}: bytes that are not UTF-8")
                ids[at] = ""
        return pa.array(ids, pa.string())


def _id_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return _utf8(value, True)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"text or an integer, got {type(value).__name__}")


def brings_id(record: Any) -> bool:
    """Say whether a record brings an event id of its own; the gateway derives one where it does not.

    >>> brings_id({"event_id": 0}), brings_id({"event_id": ""}), brings_id({"event_id": False}), brings_id("text")
    (True, False, False, False)
    """
    own = record.get("event_id") if isinstance(record, dict) else None
    return bool(own) or (isinstance(own, int) and not isinstance(own, bool))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _places(values: list[Any], reject: Reject) -> pa.Array:
    if set(map(type, values)) <= {int}:
        try:
            places = pa.array(values, pa.int32())
        except (pa.ArrowInvalid, OverflowError):
            pass
        else:
            if len(values) == 0 or pc.min(places).as_py() >= 0:
                return places
    fitted = []
    for at, value in enumerate(values):
        place = 0 if value is None else value
        if isinstance(place, float) and place.is_integer():
            place = int(place)
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place <= PLACE_MAX:
            reject(at, "bad_type", f"place is an integer from 0 to {PLACE_MAX}, got {type(value).__name__}")
            place = 0
        fitted.append(place)
    return pa.array(fitted, pa.int32())


def event_time_ms(value: Any, time_ns: int | None) -> int | None:
    """Return the event's time: its own where that is a number, else the entry's; None where neither is usable."""
    if value is None:
        return None if time_ns is None else time_ns // 1_000_000
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if -_EXACT_FLOAT < value < _EXACT_FLOAT else None


def _times(values: list[Any], times_ns: Sequence[int | None], taken_ms: range, reject: Reject) -> pa.Array:
    earliest_ms, latest_ms = taken_ms.start, taken_ms.stop - 1
    times = []
    for at, (value, time_ns) in enumerate(zip(values, times_ns, strict=True)):
        time_ms = event_time_ms(value, time_ns)
        if time_ms is None or time_ms < 0:
            reject(at, "bad_type", "event_time_ms is no Unix time in milliseconds")
            time_ms = 0
        elif time_ms > latest_ms:
            unit = _other_unit(time_ms, earliest_ms, latest_ms)
            reject(at, "future", f"event time {time_ms} ms is {time_ms - latest_ms} ms beyond clock + skew_ms{unit}")
            time_ms = 0
        elif time_ms < earliest_ms:
            unit = _other_unit(time_ms, earliest_ms, latest_ms) or "; mend it, or set ingest.past to an earlier day"
            reject(at, "past", f"event time {time_ms} ms is before ingest.past, {earliest_ms} ms{unit}")
            time_ms = 0
        times.append(time_ms)
    return pa.array(times, pa.int64())


def _other_unit(time_ms: int, earliest_ms: int, latest_ms: int) -> str:
    """Return the remedy where a time would be good in another unit, else nothing.

    >>> _other_unit(1_700_000_000, 946_684_800_000, 1_700_000_060_000)
    '; it reads as seconds: multiply event_time_ms by 1,000'
    """
    if earliest_ms <= time_ms * 1_000 <= latest_ms:
        return "; it reads as seconds: multiply event_time_ms by 1,000"
    if earliest_ms <= time_ms // 1_000 <= latest_ms:
        return "; it reads as microseconds: divide event_time_ms by 1,000"
    return ""
