"""One file of the spool: records that are appended, and read again after a crash.

A record is [length, CRC-32, kind] and its payload. A segment stands alone: entries, the ids of their chunks and
the acks of those chunks are in one file, so it is removed as soon as all its chunks are acked, in any order. (Older
trees wrote an ack into the newest file; `Spool` copies it to where its chunk is.)
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from headrace.contract.errors import Overloaded, disk_remedy

HEAD = struct.Struct("<IIB")
ENTRY, CHUNK, ACK = 1, 2, 3


class Segment:
    """An append-only file. Its descriptor is opened by the first append after `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size, self.inode = 0, -1
        if path.exists():
            found = path.stat()
            self.size, self.inode = found.st_size, found.st_ino
        self.open_chunks = 0
        """Chunks in it that are not acked."""
        self._fd = -1
        self._is_removed = False
        self.is_sound = True
        """Whether what was appended may be trusted. After a failed sync the kernel takes it for written, and the next
        sync says so: it is written anew elsewhere."""

    def append(self, kind: int, payload: bytes) -> int:
        """Write one record whole and return its size, or raise `Overloaded` and leave the file as it was."""
        data = HEAD.pack(len(payload), zlib.crc32(payload), kind) + payload
        try:
            if not self.is_sound:
                raise OSError(5, "an earlier write to it failed", str(self.path))
            if self._fd < 0:
                self._open()
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(28, "a short write: the disk is full")
        except OSError as error:
            self._take_back()
            raise Overloaded(f"the spool {self.path.parent} takes no more: {error}; {disk_remedy(error)}.") from error
        self.size += len(data)
        return len(data)

    def _take_back(self) -> None:
        """Let the file end where it did: nothing that is appended behind a torn record could be read."""
        if self._fd >= 0:
            try:
                os.ftruncate(self._fd, self.size)
            except OSError:
                self.is_sound = False

    def _open(self) -> None:
        """Open it; not what another process has put in its place. Raises `OSError`."""
        if self._is_removed or (self.inode >= 0 and not self.is_there()):
            raise FileNotFoundError(2, "somebody removed it", str(self.path))
        flags = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_EXCL if self.inode < 0 else 0)
        self._fd = os.open(self.path, flags, 0o600)
        self.inode = os.fstat(self._fd).st_ino

    def is_there(self) -> bool:
        """Say whether the file at its path is still this one."""
        try:
            return not self._is_removed and self.path.stat().st_ino == self.inode
        except OSError:
            return False

    def duplicate(self) -> int:
        """Return a descriptor of it that the caller closes. What an earlier process wrote may not be on the disk."""
        return os.dup(self._fd) if self._fd >= 0 else os.open(self.path, os.O_RDONLY)

    def close(self, *, sync: bool = False) -> None:
        """Close the descriptor, with `sync` after putting what was written on the disk; it is unsound where that fails.

        The descriptor is free however the close ends.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                try:
                    if sync:
                        os.fdatasync(fd)
                finally:
                    os.close(fd)
            except OSError:
                self.is_sound = False

    def remove(self) -> int:
        """Delete the file, not what another process has put in its place; return how many bytes that frees.

        Raises `OSError` where the disk refuses; the next call goes on.
        """
        self.close()
        if self.is_there():
            self.path.unlink(missing_ok=True)
        self._is_removed = True
        freed, self.size = self.size, 0
        return freed

    def read(self) -> tuple[list[tuple[int, bytes]], bytes]:
        """Return the records (kind, payload) up to the end or the first torn one, and the bytes from there on."""
        data = self.path.read_bytes()
        records: list[tuple[int, bytes]] = []
        at = 0
        while (record := _record(data, at)) is not None:
            records.append(record)
            at += HEAD.size + len(record[1])
        self.size = len(data)
        return records, data[at:]

    def end_before(self, rest: bytes) -> None:
        """Let the file end before its last bytes: what is appended behind a torn record could never be read."""
        self.size -= len(rest)
        os.truncate(self.path, self.size)


def _record(data: bytes, at: int) -> tuple[int, bytes] | None:
    """Return the whole record that begins here, None where none does."""
    if at + HEAD.size > len(data):
        return None
    length, crc, kind = HEAD.unpack_from(data, at)
    payload = data[at + HEAD.size : at + HEAD.size + length]
    return (kind, payload) if len(payload) == length and zlib.crc32(payload) == crc else None


def is_damage(rest: bytes) -> bool:
    """Say whether bytes behind the last whole record are more than the torn tail of a crash, which is one record.

    Either a whole record lies further on, or the first one is all there and its bytes have changed.
    """
    if len(rest) < HEAD.size:
        return False
    if HEAD.unpack_from(rest)[0] <= len(rest) - HEAD.size:
        return True
    kinds = bytes((ENTRY, CHUNK, ACK))
    for at in range(1, len(rest) - HEAD.size):
        # A look at one byte first: a segment has up to some MB.
        if rest[at + HEAD.size - 1] in kinds and (record := _record(rest, at)) is not None and record[1]:
            return True
    return False
