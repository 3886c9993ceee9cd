"""Where everything lies in the file of the shared region, and one mapping of it.

Layout (an mmap, in `/dev/shm` by default): head int64 [2048], what was refused, ring of recent versions, then for each
of two copies: meta, dense float32, index int64 [2, C] (key, row), keys int64 [R], values float32 [R, V]. The head says
of how many rows and how wide it is, so that whoever opens the file needs to know neither.

Legend: C entries of the index, R rows at most, V values a row (linear, then embedding).
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.contract.errors import InvariantBroken, Overloaded
from headrace.serving.model.process_times import began_at, boot_number
from headrace.serving.model.row_table import Float32s, Int64s

READERS_MAX = 256
_ACTIVE, _SEQ, _ROWS, _META_SIZE, _RING_NEXT, _IS_FULL, _LAYOUT, _BOOT, _DIM, _ROWS_MAX, _MOVED, _PREPARED = (
    0,
    1,
    3,
    5,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
)
LAYOUT = 4
"""Raise it with every change of what lies where, so that no other version takes the region over."""
# Words of each reader: the copy that it is in (plus 1), its process, when that began; how far its counters are; the
# number of what it was the last to warm.
_READERS, _PIDS, _BEGAN, _OFFSETS, _CURRENT_MS, _TOLD_MS, _WARMED = (16 + i * READERS_MAX for i in range(7))
_WORDS = 7
_HEAD = 2048
RING, RING_BYTES = 2048, 8192
NOTE_BYTES = 4096
META_BYTES = 1_048_576
DENSE_MAX = 4_194_304
"""Most dense weights: 16 MiB a copy."""


def region_bytes(dim: int, rows_max: int, rows: int | None = None) -> int:
    """Return the size of a region; with `rows`, the memory that it takes once it has so many. Pages take memory when
    they are first written."""
    rows = rows_max if rows is None else rows
    sizes = [META_BYTES, DENSE_MAX * 4, _entries(rows_max) * 16, rows * 8, rows * (1 + dim) * 4]
    return _HEAD * 8 + NOTE_BYTES + RING * RING_BYTES + 2 * sum(-(-s // 4096) * 4096 for s in sizes)


def _entries(rows_max: int) -> int:
    return 1 << (2 * rows_max - 1).bit_length()


def room_in(path: Path) -> tuple[int, int] | None:
    """Return (dim, rows_max) of the region in a file, or None where there is none of this layout and boot."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            head = np.frombuffer(file.read(_HEAD * 8).ljust(_HEAD * 8, b"\0"), np.int64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if head[_LAYOUT] != LAYOUT or head[_BOOT] != boot_number():
        return None
    dim, rows_max = int(head[_DIM]), int(head[_ROWS_MAX])
    # A wrong number in a head could ask for a table of any size.
    if not (0 <= dim <= 65_536 and 0 < rows_max <= 2**40):
        return None
    return (dim, rows_max) if size == region_bytes(dim, rows_max) else None


class Region:
    """One mapping of a region's file. The memory is freed when nobody maps it and it has no name."""

    def __init__(self, path: Path, *, dim: int, rows_max: int) -> None:
        """Map a file of exactly this room. Raises `InvariantBroken` where it is of another."""
        self.dim, self.rows_max = dim, rows_max
        entries, width, size = _entries(rows_max), 1 + dim, region_bytes(dim, rows_max)
        with open(path, "r+b") as file:
            about = os.fstat(file.fileno())
            if about.st_size != size:
                raise InvariantBroken(f"{path} has another size; the updater must make it anew: restart `serve`.")
            self._map = mmap.mmap(file.fileno(), size)
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self.inode = about.st_ino
        self.named = 0
        """The process that has named itself here as a reader."""
        self.known: list[tuple[int, Any] | None] = [None, None]
        """Sequence and meta that were read last of each copy."""
        self._reserved_rows = -1
        raw = np.frombuffer(self._map, np.uint8)
        self.head: Int64s = raw[: _HEAD * 8].view(np.int64)
        at = _HEAD * 8
        self.note = raw[at : at + NOTE_BYTES]
        at += NOTE_BYTES
        self.ring = raw[at : at + RING * RING_BYTES].reshape(RING, RING_BYTES)
        at += RING * RING_BYTES
        self.meta: list[npt.NDArray[np.uint8]] = []
        self.dense: list[Float32s] = []
        self.index: list[Int64s] = []
        self.keys: list[Int64s] = []
        self.values: list[Float32s] = []
        for _ in range(2):
            self.meta.append(raw[at : at + META_BYTES])
            at += META_BYTES
            self.dense.append(raw[at : at + DENSE_MAX * 4].view(np.float32))
            at += DENSE_MAX * 4
            self.index.append(raw[at : at + entries * 16].view(np.int64).reshape(2, entries))
            at += -(-entries * 16 // 4096) * 4096
            self.keys.append(raw[at : at + rows_max * 8].view(np.int64))
            at += -(-rows_max * 8 // 4096) * 4096
            self.values.append(raw[at : at + rows_max * width * 4].view(np.float32).reshape(rows_max, width))
            at += -(-rows_max * width * 4 // 4096) * 4096

    @classmethod
    def create(cls, path: Path, *, dim: int, rows_max: int) -> Region:
        """Make a new file in place of what lies there, and map it. Whoever maps the old one goes on with it."""
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.truncate(region_bytes(dim, rows_max))  # Sparse: only pages that are written take memory.
        region = cls(path, dim=dim, rows_max=rows_max)
        region.head[_LAYOUT : _ROWS_MAX + 1] = LAYOUT, boot_number(), dim, rows_max
        return region

    @property
    def taken_bytes(self) -> int:
        """Return how much memory it takes now."""
        return os.fstat(self._file).st_blocks * 512

    def name_reader(self, reader: int) -> None:
        """Say that this process is reader `reader`."""
        self.named = os.getpid()
        self.head[_READERS + reader] = 0
        self.head[_BEGAN + reader] = began_at(self.named)
        self.head[_PIDS + reader] = self.named

    def reserve(self, rows: int, where: Path) -> None:
        """Take the memory that `rows` rows need in both copies, or raise `Overloaded` and leave both as they are.

        A page that is first written when the filesystem is full ends the process with SIGBUS, and the next one too.
        """
        if rows <= self._reserved_rows:
            return
        parts: list[npt.NDArray[Any]] = [self.head, self.note, self.ring]
        for copy in range(2):
            parts += [self.meta[copy], self.dense[copy], self.index[copy]]
            parts += [self.keys[copy][:rows], self.values[copy][:rows]]
        origin = self.head.__array_interface__["data"][0]
        try:
            for part in parts:
                os.posix_fallocate(self._file, part.__array_interface__["data"][0] - origin, max(1, part.nbytes))
        except OSError as error:
            raise Overloaded(
                f"{where} has no room for {rows} rows ({error.strerror}); make room: the next snapshot is tried again."
            ) from error
        self._reserved_rows = rows
