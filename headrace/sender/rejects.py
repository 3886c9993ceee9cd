"""The file of events that the gateway refuses for good: one JSON object a line, for people and for `jq`.

`{"tag", "time_ns", "reason", "record"}`; what JSON cannot say (bytes, NaN) is in `raw`, the entry's MessagePack in
base64, instead of `record`. Several processes append to one file, each line in one write.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from headrace.contract.errors import Overloaded, disk_remedy

_BYTES_MAX = 268_435_456
"""256 MiB, some 300 of the largest events. At the bound they stay in the spool, where their tag alone waits."""
_TIME = struct.Struct(">II")


class Rejects:
    """Appends to the file, and counts."""

    def __init__(self, path: Path, bytes_max: int = _BYTES_MAX) -> None:
        self.path = path
        self.count = 0
        """Events since the start of this process."""
        self._bytes_max = bytes_max

    def add(self, tag: str, entries: list[bytes], reason: str) -> None:
        """Append events, or raise `Overloaded`: the file is at its bound, or the disk is full."""
        lines = b"".join(_line(tag, entry, reason) for entry in entries)
        try:
            is_new = not self.path.exists()
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if is_new:
                    sync_folder(self.path.parent)
                size = os.fstat(fd).st_size
                if size + len(lines) > self._bytes_max:
                    raise Overloaded(f"{self.path} has {size} bytes, bound {self._bytes_max}; move it away.")
                _append(fd, lines)
            finally:
                os.close(fd)
        except OSError as error:
            raise Overloaded(f"{self.path} takes no more: {error}; {disk_remedy(error)}.") from error
        self.count += len(entries)


def sync_folder(folder: Path) -> None:
    """Put on the disk which files a folder has."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append(fd: int, lines: bytes) -> None:
    """Append all of it, or raise `OSError` and take back what was written: it is written again at the next try."""
    written = os.write(fd, lines)
    try:
        if written != len(lines):
            raise OSError(28, "a short write: the disk is full")
        os.fdatasync(fd)
    except OSError:
        end = os.lseek(fd, 0, os.SEEK_CUR)
        with suppress(OSError):
            if os.fstat(fd).st_size == end:  # Another process has appended nothing behind it.
                os.ftruncate(fd, end - written)
        raise


def _line(tag: str, entry: bytes, reason: str) -> bytes:
    told: dict[str, Any] = {"tag": tag, "reason": reason}
    try:
        time, record = msgpack.unpackb(entry, strict_map_key=False)
        seconds, nanos = _TIME.unpack(time.data)
        whole = told | {"time_ns": seconds * 10**9 + nanos, "record": record}
        return json.dumps(whole, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    except (ValueError, TypeError, AttributeError, struct.error, msgpack.UnpackException):
        raw = base64.b64encode(entry).decode()
        return json.dumps(told | {"raw": raw}).encode() + b"\n"
