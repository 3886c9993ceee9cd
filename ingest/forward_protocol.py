"""Fluent forward v1, receiving side: bytes in, messages out. Pure and incremental; knows no socket and no clock.

What real clients send beyond the specification is taken, not dropped: entries with metadata (`[[time, metadata],
record]`), group markers (skipped), float64 times, headers that are not minimal, packed bodies as `str` or `bin`,
text that is not UTF-8 (kept as lone surrogates, PEP 383), several gzip members or zstd frames.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import msgspec
import pyarrow as pa

from headrace.contract.errors import HeadraceError

GROUP_MARKERS = frozenset({0xFFFFFFFF, 0xFFFFFFFE})
"""EventTime seconds with which fluent-bit opens and closes a group of OTLP records."""

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

    `problem` is set when the body cannot be decoded and never will be: `entries` is empty then and `raw` has its bytes.
    """

    tag: str
    entries: list[Entry]
    chunk: str | bytes | None
    signal: int = 0
    """0 is logs; others (metrics, traces) have no entries: they are acked and skipped."""
    plain_bytes: int = 0
    """Size of the body after decompression; 0 where it was not packed."""
    problem: str = ""
    raw: bytes = b""


class Ping(NamedTuple):
    """The first value of a connection that begins with a handshake, as it came."""

    value: Any


class Decoder:
    """Turns one connection's bytes into messages, however they are cut; with `greets`, a `Ping` comes first."""

    def __init__(self, message_bytes_max: int, *, greets: bool = False) -> None:
        self._greets = greets
        self._bytes_max = message_bytes_max
        self._fed = 0
        self._taken = 0
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=message_bytes_max + _READ_BYTES,
            max_str_len=message_bytes_max,
            max_bin_len=message_bytes_max,
            max_array_len=max(message_bytes_max // 4, 16),
            max_map_len=max(message_bytes_max // 4, 16),
            max_ext_len=65_536,
            **_OPTIONS,
        )

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that has not ended yet."""
        return self._fed - self._taken

    def feed(self, data: bytes) -> Iterator[tuple[Message | Ping, int]]:
        """Yield each message that `data` completes, with its size on the wire.

        Raises `Refused` on bytes that are no forward message, or one beyond the bound; nothing can follow then.
        """
        for start in range(0, len(data), _READ_BYTES):
            piece = data[start : start + _READ_BYTES]
            try:
                self._unpacker.feed(piece)
            except msgpack.BufferFull as error:
                raise self._too_large() from error
            self._fed += len(piece)
            yield from self._complete()
            if self.pending_bytes > self._bytes_max:
                raise self._too_large()

    def _complete(self) -> Iterator[tuple[Message | Ping, int]]:
        while True:
            try:
                value = self._unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (ValueError, TypeError, RecursionError) as error:
                text = str(error) or type(error).__name__
                reason = "too_large" if "exceeds max" in text else "bad_frame"
                raise Refused(reason, f"no msgpack value after byte {self._taken}: {text}.") from error
            taken = self._unpacker.tell()
            size, self._taken = taken - self._taken, taken
            if size > self._bytes_max:
                raise self._too_large()
            if self._greets:
                self._greets = False
                yield Ping(value), size
                continue
            # fluentd keeps nil free as a heartbeat inside a connection.
            if value is not None:
                yield read_message(value, self._bytes_max), size

    def _too_large(self) -> Refused:
        return Refused(
            "too_large",
            f"a message is larger than {self._bytes_max} bytes; raise ingest.chunk_bytes_max or cut chunks.",
        )


def read_message(value: Any, bytes_max: int) -> Message:
    """Return what one decoded msgpack value says.

    Raises `Refused` when it has none of the four forms, or its body decompresses to more than `bytes_max`.
    """
    if not isinstance(value, list) or len(value) < 2:
        raise Refused("bad_frame", f"a forward message is an array of 2 to 4 values, not {type(value).__name__}.")
    tag = _text(value[0])
    if tag is None:
        raise Refused("bad_frame", f"a tag is a string, not {type(value[0]).__name__}.")
    body = value[1]
    packed = isinstance(body, str | bytes)
    at = 2 if packed or isinstance(body, list) else 3
    if at == 3 and (len(value) < 3 or _time_ns(body) is None):
        raise Refused("bad_frame", "the second value is no list of entries, no packed body and no time.")
    option = value[at] if len(value) > at and isinstance(value[at], dict) else {}
    chunk = option.get("chunk")
    chunk = chunk if isinstance(chunk, str | bytes) else None
    signal = option.get("fluent_signal")
    if isinstance(signal, int) and signal != 0:
        return Message(tag, [], chunk, signal)
    if packed:
        return _read_packed(tag, body, option, chunk, bytes_max)
    if isinstance(body, list):
        return Message(tag, [entry for item in body if (entry := _entry(item)) is not None], chunk)
    return Message(tag, [entry] if (entry := _entry([body, value[2]])) is not None else [], chunk)


def _read_packed(tag: str, body: str | bytes, option: dict[Any, Any], chunk: str | bytes | None, most: int) -> Message:
    wire = body if isinstance(body, bytes) else body.encode("utf-8", "surrogateescape")
    try:
        plain = decompress(wire, _text(option.get("compressed")) or "text", most)
        entries = list(read_entries(plain))
    except (ValueError, TypeError, RecursionError, OSError, zlib.error) as error:
        return Message(tag, [], chunk, problem=f"{type(error).__name__}: {error}", raw=wire)
    return Message(tag, entries, chunk, plain_bytes=len(plain))


def read_entries(plain: bytes) -> Iterator[Entry]:
    """Yield the entries of a packed body, group markers left out. Raises `ValueError` when it ends inside one."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(plain), 1), **_OPTIONS)
    unpacker.feed(plain)
    for item in unpacker:
        entry = _entry(item)
        if entry is not None:
            yield entry
    if unpacker.tell() != len(plain):
        raise ValueError(f"the body ends inside an entry, at byte {unpacker.tell()} of {len(plain)}")


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


def _entry(item: Any) -> Entry | None:
    if not isinstance(item, list) or len(item) < 2:
        return Entry(None, item)
    time, record = item[0], item[1]
    if isinstance(time, list) and time:
        time = time[0]
    if isinstance(time, EventTime) and time.seconds in GROUP_MARKERS:
        return None
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


def encode_ack(chunk: str | bytes) -> bytes:
    """Return the ack of `chunk`, verbatim in type and bytes."""
    return bytes(msgpack.packb({"ack": chunk}, unicode_errors="surrogateescape"))


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
