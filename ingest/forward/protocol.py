"""Fluent forward v1, receiving side: bytes in, messages out. Pure and incremental; knows no socket and no clock.

What real clients send beyond the specification is taken, not dropped: entries with metadata (`[[time, metadata],
record]`), group markers (skipped), float64 times, headers that are not minimal, packed bodies as `str` or `bin`,
text that is not UTF-8 (kept as lone surrogates, PEP 383), several gzip members or zstd frames.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgpack
import msgspec
import pyarrow as pa

from headrace.contract.errors import HeadraceError
from headrace.ingest.decode.msgpack_scan import (
    ARRAY,
    BAD,
    BIN,
    DONE,
    LARGE,
    MORE,
    STR,
    Buffer,
    as_bytes,
    entry_starts,
    head,
    skip,
    skip_json,
)

_READ_BYTES = 262_144
"""Largest piece that is fed or decompressed at once. 256 KiB."""


class Refused(HeadraceError):
    """The connection cannot go on: close it, ack nothing. `reason` is counted; the shipper keeps its data."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EventTime(NamedTuple):
    """Fluent's time with nanoseconds."""

    seconds: int
    nanoseconds: int


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
    reason: str = "bad_chunk"
    """What dead letters say that `problem` makes: of the body where there is none, else of each entry in it."""

    @property
    def entries(self) -> list[Entry]:
        """The entries as Python objects, group markers left out. Raises `ValueError` where the body ends inside one."""
        return list(read_entries(self.body))


def message_of(tag: str, entries: Iterable[tuple[int | None, Any]], chunk: str | bytes | None = None) -> Message:
    """Return a message of (time in ns, record) pairs that came some other way than Fluent forward.

    A value that MessagePack lacks becomes its text. Fluent's time reaches from 1970 to 2106; beyond it whole seconds.
    """
    body = b"".join(_pack([_event_time(time_ns), record]) for time_ns, record in entries)
    return Message(tag, body, chunk, plain_bytes=len(body))


class Ping(NamedTuple):
    """The first value of a connection that begins with a handshake, as it came."""

    value: Any


class Decoder:
    """Turns one connection's bytes into messages, however they are cut; with `greets`, a `Ping` comes first."""

    def __init__(self, message_bytes_max: int, *, greets: bool = False) -> None:
        self._greets = greets
        self._bytes_max = message_bytes_max
        self._held = bytearray()
        self._json = False
        self._begin()

    def _begin(self) -> None:
        """Expect a new message at the start of what is held."""
        self._at, self._todo, self._depth, self._quoted = 0, 1, 0, 0

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that has not ended yet."""
        return len(self._held)

    def feed(self, data: bytes) -> Iterator[tuple[Message | Ping, int]]:
        """Yield each message that `data` completes, with its size on the wire.

        Raises `Refused` on bytes that are no forward message, or one beyond the bound; nothing can follow then.
        """
        self._held += data
        while self._held:
            if self._todo == 1 and self._at == 0 and not self._start():
                continue
            size = self._scan()
            if size < 0:
                return
            frame = bytes(memoryview(self._held)[:size])
            del self._held[:size]
            self._begin()
            if self._greets:
                self._greets = False
                yield Ping(_value(frame)), size
            elif self._json:
                yield read_json(frame), size
            elif frame != b"\xc0":
                # fluentd keeps nil free as a heartbeat inside a connection.
                yield read_message(frame, self._bytes_max), size

    def _start(self) -> bool:
        """Look at the first byte: JSON, MessagePack, or blanks between JSON values, which are dropped (False)."""
        first = self._held[0]
        if first in _BLANKS and not self._greets:
            rest = self._held.lstrip(bytes(_BLANKS))
            del self._held[: len(self._held) - len(rest)]
            return False
        # '[' alone is a small number in MessagePack, which begins no message.
        self._json = first == _BRACKET and not self._greets
        return True

    def _scan(self) -> int:
        """Return the size of the message that begins what is held, or -1 when it is not all there."""
        held = as_bytes(self._held)
        if self._json:
            ended, self._at, self._depth, self._quoted = skip_json(held, len(held), self._at, self._depth, self._quoted)
        else:
            ended, self._at, self._todo = skip(held, len(held), self._at, self._todo, self._bytes_max)
        if ended == BAD:
            raise Refused("bad_frame", f"byte {self._at} of a message is no MessagePack.")
        if ended == LARGE or self._at > self._bytes_max or (ended == MORE and len(held) > self._bytes_max):
            raise Refused(
                "too_large",
                f"a message is larger than {self._bytes_max} bytes; raise ingest.chunk_bytes_max or cut chunks.",
            )
        return int(self._at) if ended == DONE else -1


def read_message(frame: bytes, bytes_max: int) -> Message:
    """Return what one whole MessagePack value says.

    Raises `Refused` when it has none of the four forms, or its body decompresses to more than `bytes_max`.
    """
    data = as_bytes(frame)
    end = len(data)
    kind, count, at = head(data, 0)
    if kind != ARRAY or count < 2:
        raise Refused("bad_frame", "a forward message is an array of 2 to 4 values.")
    kind, size, start = head(data, at)
    if kind not in (STR, BIN):
        raise Refused("bad_frame", "a tag is a string.")
    tag = frame[start : start + size].decode("utf-8", "surrogateescape")
    at = start + size
    kind, size, start = head(data, at)
    _, after, _ = skip(data, end, at, 1, end)
    packed = kind in (STR, BIN)
    if packed or kind == ARRAY:
        body, taken = frame[start:after], 2
    else:
        if count < 3 or _time_ns(_value(frame[at:after])) is None:
            raise Refused("bad_frame", "the second value is no list of entries, no packed body and no time.")
        _, last, _ = skip(data, end, after, 1, end)
        body, taken, after = b"\x92" + frame[at:last], 3, last
    option = _option(frame, int(after)) if count > taken else {}
    chunk = option.get("chunk")
    chunk = chunk if isinstance(chunk, str | bytes) else None
    signal = option.get("fluent_signal")
    if isinstance(signal, int) and signal != 0:
        return Message(tag, b"", chunk, signal)
    if packed:
        try:
            plain = decompress(body, _text(option.get("compressed")) or "text", bytes_max)
        except (ValueError, OSError, zlib.error) as error:
            return Message(tag, b"", chunk, problem=f"{type(error).__name__}: {error}", raw=body)
        return Message(tag, plain, chunk, plain_bytes=len(plain))
    return Message(tag, body, chunk)


def _option(frame: bytes, at: int) -> dict[Any, Any]:
    try:
        unpacker = msgpack.Unpacker(**_OPTIONS)
        unpacker.feed(frame[at:])
        option = unpacker.unpack()
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused("bad_frame", f"the options are no map: {type(error).__name__}.") from error
    return option if isinstance(option, dict) else {}


def _value(frame: bytes) -> Any:
    try:
        return msgpack.unpackb(frame, **_OPTIONS)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused("bad_frame", f"no value of MessagePack: {type(error).__name__}.") from error


def read_json(frame: bytes) -> Message:
    """Return the message that a bare JSON array is: `["tag", time, record, option]` or `["tag", [entries], option]`.

    Raises `Refused` on anything else.
    """
    try:
        value = msgspec.json.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused("bad_frame", f"no JSON array: {error}") from error
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], str):
        raise Refused("bad_frame", "a forward message in JSON is an array that begins with a tag.")
    single = not isinstance(value[1], list)
    if single and (len(value) < 3 or _time_ns(value[1]) is None):
        raise Refused("bad_frame", "the second value is no list of entries and no time.")
    items = [value[1:3]] if single else value[1]
    option = value[3 if single else 2] if len(value) > (3 if single else 2) else None
    chunk = option.get("chunk") if isinstance(option, dict) else None
    body = b"".join(map(_pack, items))
    return Message(value[0], body, chunk if isinstance(chunk, str) else None, json=True)


def read_entries(body: bytes) -> Iterator[Entry]:
    """Yield the entries of a plain body, group markers left out. Raises `ValueError` when it ends inside one."""
    for start in entry_starts(as_bytes(body)):
        yield read_entry(body, int(start))


def read_entry(body: Buffer, start: int) -> Entry:
    """Return the entry that begins at `start`; one that Python cannot hold has no time and its bytes as the record."""
    data = as_bytes(body)
    _, end, _ = skip(data, len(data), start, 1, len(data))
    raw = data[start:end].tobytes()
    try:
        return _entry(msgpack.unpackb(raw, **_OPTIONS))
    except (ValueError, TypeError, RecursionError):
        return Entry(None, raw)


def decompress(data: bytes, how: str, bytes_max: int) -> bytes:
    """Return the plain body.

    Raises `Refused` (`too_large`) beyond `bytes_max`, `ValueError`, `OSError` or `zlib.error` on what cannot be read.
    """
    if how == "text" or not data:
        return data
    if how == "gzip":
        return _gunzip(data, bytes_max)
    if how == "zstd":
        with pa.input_stream(pa.py_buffer(data), compression="zstd") as stream:
            return _bounded(iter(lambda: stream.read(_READ_BYTES), b""), bytes_max)
    raise ValueError(f"unknown compression {how!r}; known: text, gzip, zstd")


def _gunzip(data: bytes, bytes_max: int) -> bytes:
    def pieces() -> Iterator[bytes]:
        rest = data
        while rest:
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                piece = member.decompress(rest, _READ_BYTES)
                rest = member.unconsumed_tail
                if not piece and not rest and not member.eof:
                    raise ValueError("the last gzip member is cut off")
                yield piece
            # Zero bytes after the last member are padding (RFC 1952 leaves them to the reader; gzip ignores them).
            rest = member.unused_data.lstrip(b"\0")

    return _bounded(pieces(), bytes_max)


def _bounded(pieces: Iterator[bytes], bytes_max: int) -> bytes:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > bytes_max:
            raise Refused("too_large", f"a body decompresses to more than {bytes_max} bytes (ingest.chunk_bytes_max).")
        parts.append(piece)
    return b"".join(parts)


def _entry(item: Any) -> Entry:
    if not isinstance(item, list) or len(item) < 2:
        return Entry(None, item)
    time, record = item[0], item[1]
    if isinstance(time, list) and time:
        time = time[0]
    time_ns = _time_ns(time)
    return Entry(None, item) if time_ns is None else Entry(time_ns, record)


def _time_ns(time: Any) -> int | None:
    if isinstance(time, EventTime):
        return time.seconds * 1_000_000_000 + time.nanoseconds
    if isinstance(time, bool):
        return None
    if isinstance(time, int):
        return time * 1_000_000_000
    if isinstance(time, float) and math.isfinite(time):
        whole = math.floor(time)
        return whole * 1_000_000_000 + round((time - whole) * 1e9)
    if isinstance(time, msgpack.Timestamp):
        return int(time.to_unix_nano())
    return None


def _ext(code: int, data: bytes) -> EventTime | Unknown:
    if code == 0 and len(data) == 8:
        return EventTime(int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big"))
    return Unknown(code, bytes(data))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else None


_OPTIONS: dict[str, Any] = {
    "raw": False,
    "unicode_errors": "surrogateescape",
    "strict_map_key": False,
    "ext_hook": _ext,
}


def _event_time(time_ns: int | None) -> msgpack.ExtType | int | None:
    if time_ns is None:
        return None
    if not 0 <= time_ns < _TIME_NS_MAX:
        return time_ns // 1_000_000_000
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return msgpack.ExtType(0, seconds.to_bytes(4, "big") + nanoseconds.to_bytes(4, "big"))


_TIME_NS_MAX = 0xFFFFFFFE * 1_000_000_000
_BLANKS = b" \t\r\n"
_BRACKET = ord("[")


def _plain(value: Any) -> Any:
    return str(value)


def _pack(value: Any) -> bytes:
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


_PACKER = msgpack.Packer(unicode_errors="surrogateescape", default=_plain)


def encode_ack(message: Message) -> bytes:
    """Return the ack of `message`, its chunk verbatim in type and bytes; JSON where it came as JSON."""
    ack = {"ack": message.chunk}
    return msgspec.json.encode(ack) if message.json else bytes(msgpack.packb(ack, unicode_errors="surrogateescape"))


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
