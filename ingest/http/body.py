"""Bodies of `POST /v1/events` to the gateway's messages. Pure: bytes, headers and the time of arrival come in.

An event is a map with a `tag` and the fields of its record. `time` is optional; both are taken out of the record:

    {"tag": "store.click", "time": "2026-03-01T12:00:00.25Z", "event_id": "...", "request_id": "...", "item_id": 7}

With `sent_at`, the sender's clock when it sent the request, a wrong clock is corrected: what it differs from the time
of arrival is added to the times that the event brings, if that is more than `TRANSFER_MS`. It stands in the request's
query for all events, or beside an event's `tag`, and is taken out of the record. An event that brings no time has the
time of arrival anyway.

A record whose own fields are called `tag` or `time` goes whole under `record`, beside nothing but `tag`, `time` and
`sent_at`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import msgspec

from headrace.contract.errors import BadRequest
from headrace.ingest.decode.compression import BodyTooLarge, decompress
from headrace.ingest.decode.message import Message, message_of
from headrace.ingest.decode.numbers import DECIMAL
from headrace.ingest.decode.shallow import shallow_json, shallow_msgpack
from headrace.ingest.decode.times import any_unix_ns
from headrace.ingest.decode.validate import brings_id

EVENTS_MAX = 10_000
"""Most events in one request: 10 ms of packing, in which no other connection is served."""
TAG_CHARS_MAX = 512
TRANSFER_MS = 2_000
"""Up to so much a right clock differs by the request's own way: a phone's upload takes a second."""
_SHOWN_CHARS = 64

Events = list[Any]


def read_events(body: bytes, content_type: str, encoding: str, bytes_max: int) -> Events:
    """Return the events of a body, each a map or what stands in its place. Raises `BadRequest`."""
    read = _reader(content_type)
    events = read(_plain(body, encoding, bytes_max))
    if len(events) > EVENTS_MAX:
        raise BadRequest(413, f"{len(events)} events; one request takes {EVENTS_MAX}", "send smaller batches")
    return events


def messages_of(events: Events, key: str, now_ms: int, sent_at: str = "") -> list[Message]:
    """Return one message a tag, in order of first appearance. Raises `BadRequest` where one event has not the form.

    With an idempotency key, an event without an id gets one from the key and its place, so that the same request
    through another gateway or from another address is a repeat too. `sent_at` is the query's, empty where it has none.
    """
    whole_ns = _sent_ns(float(sent_at) if DECIMAL.fullmatch(sent_at) else sent_at, "the query") if sent_at else None
    entries: defaultdict[str, list[tuple[int | None, Any]]] = defaultdict(list)
    for at, event in enumerate(events):
        tag, time_ns, record = _entry(event, at, now_ms, whole_ns)
        if key and not brings_id(record):
            record = {**record, "event_id": f"http/{key}/{at}"}
        entries[tag].append((time_ns, record))
    try:
        made = [message_of(tag, found, key or None) for tag, found in entries.items()]
        return [msgspec.structs.replace(message, per_origin=bool(key)) for message in made]
    except (ValueError, OverflowError) as error:
        step = "send what MessagePack can say: text, numbers of 64 bits, lists, maps"
        raise BadRequest(400, f"a record cannot be written: {type(error).__name__}", step) from error


# -- one event


def _entry(event: Any, at: int, now_ms: int, sent_ns: int | None) -> tuple[str, int, dict[Any, Any]]:
    if not isinstance(event, dict):
        raise BadRequest(400, f"event {at} is {_kind(event)}, not a map", 'send maps: {"tag": "store.click", ...}')
    tag = event.get("tag")
    if not isinstance(tag, str) or not 0 < len(tag) <= TAG_CHARS_MAX:
        what = "no tag" if tag is None else f"a tag that is no text of 1 to {TAG_CHARS_MAX} characters"
        raise BadRequest(400, f"event {at} has {what}", 'give each event the tag of its declared type: "tag": "..."')
    inner = event.get("record")
    if isinstance(inner, dict) and event.keys() <= {"tag", "time", "sent_at", "record"}:
        record = inner
    else:
        record = {name: value for name, value in event.items() if name not in ("tag", "time", "sent_at")}
    if event.get("sent_at") is not None:
        sent_ns = _sent_ns(event["sent_at"], f"event {at}")
    wrong_ms = 0 if sent_ns is None else now_ms - sent_ns // 1_000_000
    wrong_ms = wrong_ms if abs(wrong_ms) > TRANSFER_MS else 0
    own = record.get("event_time_ms")
    if wrong_ms and isinstance(own, int | float) and not isinstance(own, bool):
        own += wrong_ms
        record = {**record, "event_time_ms": own}
    time = event.get("time")
    if time is None:
        if not isinstance(own, int) or isinstance(own, bool) or not 0 <= own < 2**53:
            own = now_ms
        return tag, own * 1_000_000, record
    time_ns = any_unix_ns(time)
    if time_ns is None:
        raise BadRequest(
            400,
            f"event {at} has a time that cannot be read",
            "send Unix seconds, milliseconds, microseconds or nanoseconds, or RFC 3339 with Z or an offset",
        )
    return tag, time_ns + wrong_ms * 1_000_000, record


def _sent_ns(value: Any, where: str) -> int:
    time_ns = any_unix_ns(value)
    if time_ns is None:
        raise BadRequest(400, f"{where} has a sent_at that cannot be read", "send the clock's Unix milliseconds then")
    return time_ns


def _kind(value: Any) -> str:
    return "null" if value is None else {"list": "an array", "str": "text"}.get(type(value).__name__, "a number")


# -- the body's form


def _plain(body: bytes, encoding: str, bytes_max: int) -> bytes:
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise BadRequest(415, f"Content-Encoding {_shown(encoding)} is not known", "send gzip or plain")
    try:
        return decompress(body, "gzip", bytes_max)
    except BodyTooLarge as error:
        raise BadRequest(
            413,
            f"the body decompresses to more than {bytes_max} bytes",
            "send smaller batches, or raise ingest.collector_bytes_max",
        ) from error
    except (ValueError, OSError, zlib.error) as error:
        raise BadRequest(400, "the body is no gzip", "send gzip, or leave Content-Encoding out") from error


def _reader(content_type: str) -> Callable[[bytes], Events]:
    kind, _, parameters = content_type.partition(";")
    read = _READERS.get(kind.strip().lower())
    if read is None:
        raise BadRequest(415, f"Content-Type {_shown(kind)} is not known", f"send one of {', '.join(KNOWN_TYPES)}")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters, re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise BadRequest(415, f"charset {_shown(charset[1])} is not known", "send UTF-8")
    return read


def _read_json(body: bytes) -> Events:
    value = _json(body, "the body")
    return value if isinstance(value, list) else [value]


def _read_lines(body: bytes) -> Events:
    lines = enumerate(body.removeprefix(_BOM).split(b"\n"), 1)
    return [_json(line, f"line {number}") for number, line in lines if line.strip()]


def _read_text(body: bytes) -> Events:
    """Read what a beacon sends, whose type says nothing: one JSON value, else one a line."""
    try:
        return _read_json(body)
    except BadRequest as whole:
        if b"\n" not in body.strip():
            raise
        try:
            return _read_lines(body)
        except BadRequest as lines:
            raise lines from whole


def _read_msgpack(body: bytes) -> Events:
    try:
        plain = shallow_msgpack(body)
        value = msgpack.unpackb(plain, raw=False, unicode_errors="surrogateescape", strict_map_key=False)
    except (ValueError, TypeError) as error:
        raise BadRequest(
            400, f"the body is no MessagePack: {type(error).__name__}", "send one map or one array of maps, no more"
        ) from error
    return value if isinstance(value, list) else [value]


_READERS: Mapping[str, Callable[[bytes], Events]] = {
    "application/json": _read_json,
    "application/x-ndjson": _read_lines,
    "application/ndjson": _read_lines,
    "application/jsonl": _read_lines,
    "application/msgpack": _read_msgpack,
    "application/x-msgpack": _read_msgpack,
    "application/vnd.msgpack": _read_msgpack,
    "text/plain": _read_text,
    "": _read_text,
}
KNOWN_TYPES = ("application/json", "application/x-ndjson", "application/msgpack", "text/plain (JSON or NDJSON)")
_BOM = b"\xef\xbb\xbf"


def _json(data: bytes, where: str) -> Any:
    """Return one JSON value. Of equal keys the last counts, as everywhere.

    NaN, numbers beyond a float and text with half a surrogate pair, which some clients write, are read too: they cost
    their own event (`bad_type`) or one character, not the whole batch. What is nested too deeply costs its own event
    (`too_deep`), too.
    """
    data = shallow_json(data)
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    try:
        return _whole(json.loads(data.removeprefix(_BOM).decode("utf-8")))
    except json.JSONDecodeError as error:
        at = f"{error.msg} at character {error.pos}"
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is not UTF-8"
    except ValueError:
        at = "a number has too many digits"
    raise BadRequest(400, f"{where} is no JSON: {at}", "send JSON in UTF-8, or name another Content-Type")


_HALVES = re.compile("[\ud800-\udfff]")


def _whole(value: Any) -> Any:
    """Return the value with U+FFFD for halves of surrogate pairs."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value


def _shown(text: str) -> str:
    """Return a header's value for an error: short, and nothing that could break a line."""
    return repr(text.strip()[:_SHOWN_CHARS])
