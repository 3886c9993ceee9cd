"""Packed bodies to plain ones, within a bound: gzip of several members, zstd of several frames. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pyarrow as pa

from headrace.contract.errors import HeadraceError

_READ_BYTES = 262_144
"""Largest piece that is decompressed at once. 256 KiB."""


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
            raise BodyTooLarge(f"a body decompresses to more than {bytes_max} bytes (ingest.chunk_bytes_max).")
        parts.append(piece)
    return b"".join(parts)
