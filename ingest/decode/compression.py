"""Packed bodies to plain ones, within a bound: gzip of several members, zstd of several frames. Pure."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import pyarrow as pa

from headrace.contract.errors import HeadraceError

_READ_BYTES = 262_144
"""Largest piece that is decompressed at once. 256 KiB."""
_FIRST_BYTES = 1_024
_PADDING = re.compile(rb"\0*")


class BodyTooLarge(HeadraceError):
    """A body decompresses to more than its bound; its sender must make smaller ones."""


def decompress(data: bytes, how: str, bytes_max: int) -> bytes:
    """Return the plain body.

    Raises `BodyTooLarge` beyond `bytes_max`, `ValueError`, `OSError` or `zlib.error` on what cannot be read.
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
        at, view = 0, memoryview(data)
        while at < len(data):
            # What is read beyond a member's end is copied: little at first, so that many small members cost no more.
            member, window = zlib.decompressobj(wbits=31), _FIRST_BYTES
            while not member.eof:
                part = view[at : at + window]
                piece = member.decompress(part, _READ_BYTES)
                if not part and not piece and not member.eof:
                    raise ValueError("the last gzip member is cut off")
                at += len(part) - len(member.unconsumed_tail) - len(member.unused_data)
                window = min(2 * window, _READ_BYTES)
                yield piece
            # Zero bytes after the last member are padding (RFC 1952 leaves them to the reader; gzip ignores them).
            at = _PADDING.match(data, at).end()  # type: ignore[union-attr]

    return _bounded(pieces(), bytes_max)


def _bounded(pieces: Iterator[bytes], bytes_max: int) -> bytes:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > bytes_max:
            raise BodyTooLarge(f"a body decompresses to more than {bytes_max} bytes (ingest.chunk_bytes_max).")
        parts.append(piece)
    return b"".join(parts)
