"""Fluent forward v1, receiving side: bytes in, messages out. Pure and incremental; knows no socket and no clock.

What real clients send beyond the specification is taken, not dropped: entries with metadata (`[[time, metadata],
record]`), group markers (skipped), float64 times, headers that are not minimal, packed bodies as `str` or `bin`,
text that is not UTF-8 (kept as lone surrogates, PEP 383), several gzip members or zstd frames.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import msgspec

from headrace.contract.errors import HeadraceError
from headrace.ingest.decode.compression import BodyTooLarge, decompress
from headrace.ingest.decode.message import UNPACK_OPTIONS, Message, pack
from headrace.ingest.decode.msgpack_scan import (
    ARRAY,
    BAD,
    BIN,
    DONE,
    LARGE,
    MORE,
    STR,
    as_bytes,
    head,
    skip,
    skip_json,
)
from headrace.ingest.decode.shallow import shallow_json, shallow_msgpack
from headrace.ingest.decode.times import entry_ns


class Refused(HeadraceError):
    """The connection cannot go on: close it, ack nothing. `reason` is counted; the shipper keeps its data."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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

    def too_large(self) -> bytes:
        """Return what is said to a peer whose message is beyond the bound, in its own format."""
        word = {"refused": "too_large", "bytes_max": self._bytes_max}
        return msgspec.json.encode(word) if self._json else bytes(msgpack.packb(word))

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
        if count < 3 or entry_ns(_value(frame[at:after])) is None:
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
        except BodyTooLarge as error:
            raise Refused("too_large", str(error)) from error
        except (ValueError, OSError, zlib.error) as error:
            return Message(tag, b"", chunk, problem=f"{type(error).__name__}: {error}", raw=body)
        return Message(tag, plain, chunk, plain_bytes=len(plain))
    return Message(tag, body, chunk)


def _option(frame: bytes, at: int) -> dict[Any, Any]:
    try:
        unpacker = msgpack.Unpacker(**UNPACK_OPTIONS)
        unpacker.feed(shallow_msgpack(frame[at:]))
        option = unpacker.unpack()
    except (ValueError, TypeError) as error:
        raise Refused("bad_frame", f"the options are no map: {type(error).__name__}.") from error
    return option if isinstance(option, dict) else {}


def _value(frame: bytes) -> Any:
    try:
        return msgpack.unpackb(frame, **UNPACK_OPTIONS)
    except (ValueError, TypeError) as error:
        raise Refused("bad_frame", f"no value of MessagePack: {type(error).__name__}.") from error


def read_json(frame: bytes) -> Message:
    """Return the message that a bare JSON array is: `["tag", time, record, option]` or `["tag", [entries], option]`.

    One that begins with a tag and cannot be read (a number of too many digits) has its `problem`: it would be sent
    again for ever, and hold back what is behind it. Raises `Refused` on anything else.
    """
    try:
        value = _json_value(shallow_json(frame))
        if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], str):
            raise Refused("bad_frame", "a forward message in JSON is an array that begins with a tag.")
        single = not isinstance(value[1], list)
        if single and (len(value) < 3 or entry_ns(value[1]) is None):
            raise Refused("bad_frame", "the second value is no list of entries and no time.")
        items = [value[1:3]] if single else value[1]
        option = value[3 if single else 2] if len(value) > (3 if single else 2) else None
        chunk = option.get("chunk") if isinstance(option, dict) else None
        body = b"".join(map(pack, items))
        return Message(value[0], body, _chunk_of(chunk), json=True)
    except (ValueError, TypeError, OverflowError) as error:
        tag = _json_text(_JSON_TAG.match(frame))
        if not tag:
            raise Refused("bad_frame", f"no JSON array that begins with a tag: {type(error).__name__}.") from error
        chunk = _chunk_of(_json_text(_JSON_CHUNK.search(frame[-_OPTION_BYTES:])))
        return Message(tag, b"", chunk, problem=f"no JSON: {type(error).__name__}", raw=frame, json=True)


def _json_value(frame: bytes) -> Any:
    try:
        return msgspec.json.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Bytes that are no UTF-8 stay as lone surrogates, as in MessagePack; NaN costs its own event.
        return json.loads(frame.decode("utf-8", "surrogateescape"))


def _json_text(found: re.Match[bytes] | None) -> str:
    """Return the JSON string that was found, empty where it is none that can go on."""
    try:
        text = json.loads(found[1].decode("utf-8", "surrogateescape")) if found else ""
        text.encode("utf-8", "surrogateescape")
    except ValueError:
        return ""
    return str(text)


def _chunk_of(value: Any) -> str | None:
    """Return a chunk's id that an ack in JSON can give back, else None."""
    try:
        return value if isinstance(value, str) and value.encode() else None
    except UnicodeEncodeError:
        return None


_JSON_TAG = re.compile(rb'\s*\[\s*("(?:[^"\\]|\\.)*+")\s*,')
_JSON_CHUNK = re.compile(rb'\{[^{}\[\]]*?"chunk"\s*:\s*("(?:[^"\\]|\\.)*+")[^{}\[\]]*\}\s*\]\s*$')
_OPTION_BYTES = 1_024
"""So far from the end of a message that cannot be read its options are looked for."""
_BLANKS = b" \t\r\n"
_BRACKET = ord("[")


def encode_ack(message: Message) -> bytes:
    """Return the ack of `message`, its chunk verbatim in type and bytes; JSON where it came as JSON."""
    ack = {"ack": message.chunk}
    return msgspec.json.encode(ack) if message.json else bytes(msgpack.packb(ack, unicode_errors="surrogateescape"))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else None
