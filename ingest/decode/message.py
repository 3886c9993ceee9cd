"""A chunk of log records as every way in hands it to the gateway, and the records in it as Python objects. Pure.

The gateway decodes the ordinary records of a chunk to columns without making objects of them (`fluent_chunk`); this
module reads the others, and packs records that came some other way than Fluent forward.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgpack
import msgspec
import numpy as np

from headrace.ingest.decode.msgpack_scan import Buffer, I64s, as_bytes, entry_starts, skip
from headrace.ingest.decode.shallow import shallow_msgpack
from headrace.ingest.decode.times import EventTime, entry_ns, event_time_of

BAD_CHUNK = "bad_chunk"
"""The reason of a body that cannot be read."""


class Unknown(NamedTuple):
    """An ext value of a type that Fluent does not define."""

    code: int
    data: bytes


class Entry(NamedTuple):
    """One log record. `time_ns` is None and `record` any value where the entry has not the form of one."""

    time_ns: int | None
    record: Any


class Message(msgspec.Struct, frozen=True):
    """One message: what the sender acks as a whole.

    `problem` is set when the body cannot be decoded and never will be: `body` is empty then and `raw` has its bytes.
    """

    tag: str
    body: bytes = b""
    """Entries one after the other, each MessagePack of [time, record] in any form that real clients send."""
    chunk: str | bytes | None = None
    signal: int = 0
    """0 is logs; others (metrics, traces) have no entries: they are acked and skipped."""
    plain_bytes: int = 0
    """Size of the body after decompression; 0 where it was not packed."""
    problem: str = ""
    raw: bytes = b""
    json: bool = False
    """Sent as a bare JSON array; its ack is JSON too."""
    per_origin: bool = False
    """The chunk's id is good for its sender's address alone, as an Idempotency-Key is."""
    reason: str = BAD_CHUNK
    """What dead letters say that `problem` makes: of the body where there is none, else of each entry in it."""

    @property
    def entries(self) -> list[Entry]:
        """The entries as Python objects, group markers left out. Raises `ValueError` where the body ends inside one."""
        return list(read_entries(self.body))


def message_of(tag: str, entries: Iterable[tuple[int | None, Any]], chunk: str | bytes | None = None) -> Message:
    """Return a message of (time in ns, record) pairs that came some other way than Fluent forward.

    A value that MessagePack lacks becomes its text. Fluent's time reaches from 1970 to 2106; beyond it whole seconds.
    """
    body = b"".join(pack([_event_time(time_ns), record]) for time_ns, record in entries)
    return Message(tag, body, chunk, plain_bytes=len(body))


def starts_of(message: Message) -> tuple[I64s, str, bytes]:
    """Return where a message's entries begin, what is wrong with it ("": nothing) and the bytes that cannot be read."""
    try:
        return entry_starts(as_bytes(message.body)), message.problem, message.raw
    except ValueError as error:
        return np.empty(0, np.int64), str(error), message.body


def read_entries(body: bytes) -> Iterator[Entry]:
    """Yield the entries of a plain body, group markers left out. Raises `ValueError` when it ends inside one."""
    for start in entry_starts(as_bytes(body)):
        yield read_entry(body, int(start))


def read_entry(body: Buffer, start: int) -> Entry:
    """Return the entry that begins at `start`; one that Python cannot hold has no time and its bytes as the record.

    A record that is nested too deeply comes without its deepest content, and still has more levels than may be.
    """
    data = as_bytes(body)
    _, end, _ = skip(data, len(data), start, 1, len(data))
    raw = shallow_msgpack(data[start:end].tobytes())
    try:
        return _entry(msgpack.unpackb(raw, **UNPACK_OPTIONS))
    except (ValueError, TypeError):
        return Entry(None, raw)


def _entry(item: Any) -> Entry:
    if not isinstance(item, list) or len(item) < 2:
        return Entry(None, item)
    time, record = item[0], item[1]
    if isinstance(time, list) and time:
        time = time[0]
    time_ns = entry_ns(time)
    return Entry(None, item) if time_ns is None else Entry(time_ns, record)


def _ext(code: int, data: bytes) -> EventTime | Unknown:
    return event_time_of(code, data) or Unknown(code, bytes(data))


UNPACK_OPTIONS: dict[str, Any] = {
    "raw": False,
    "unicode_errors": "surrogateescape",
    "strict_map_key": False,
    "ext_hook": _ext,
}
"""How anything that a client sent is unpacked: every value is taken, whatever its bytes."""


def _event_time(time_ns: int | None) -> msgpack.ExtType | int | None:
    if time_ns is None:
        return None
    if not 0 <= time_ns < _TIME_NS_MAX:
        return time_ns // 1_000_000_000
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return msgpack.ExtType(0, seconds.to_bytes(4, "big") + nanoseconds.to_bytes(4, "big"))


_TIME_NS_MAX = 0xFFFFFFFE * 1_000_000_000


def _as_text(value: Any) -> Any:
    return str(value)


def pack(value: Any) -> bytes:
    """Return a value as MessagePack; what MessagePack lacks becomes its text."""
    try:
        return bytes(_PACKER.pack(value))
    except OverflowError:
        return bytes(_PACKER.pack(_with_big_numbers_as_text(value)))


def _with_big_numbers_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {_with_big_numbers_as_text(k): _with_big_numbers_as_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_big_numbers_as_text(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    return value


_PACKER = msgpack.Packer(unicode_errors="surrogateescape", default=_as_text)


def encode_record(record: Any) -> bytes:
    """Return `record` as msgpack, for a dead letter; values that msgpack lacks become their text."""
    return bytes(msgpack.packb(record, unicode_errors="surrogateescape", default=repr))


def chunk_text(chunk: str | bytes) -> str:
    """Return `chunk` as text for an id: itself where it is UTF-8, else base64.

    >>> chunk_text(b"\\xff")
    'b64:/w=='
    """
    try:
        return (chunk if isinstance(chunk, bytes) else chunk.encode("utf-8")).decode("utf-8")
    except UnicodeError:
        data = chunk if isinstance(chunk, bytes) else chunk.encode("utf-8", "surrogateescape")
        return "b64:" + base64.b64encode(data).decode()
