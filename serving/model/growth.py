"""How a region grows: a larger file is filled aside, and all processes go over to it.

1. The writer says how much memory the larger region takes beside the one that is read. Where the machine, the memory
   limit of its control group, the filesystem or `serve.memory_bytes` has no room, it refuses, and nothing has happened.
2. It makes a new file, `<region>.larger`, takes the memory, and copies the version that is served into both copies.
3. Each process maps it and scores recent requests against it.
4. The file takes the region's name. Whoever dies before that leaves the old one, whole, and after that the new one.
5. The head of the old region says that there is another. Each process goes over before its next read; one that was
   not told finds out by the file's number.
6. Nothing is written to the old region any more. Its memory is freed when the last process has gone over and its last
   read has ended.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

from headrace.contract.errors import InvariantBroken, Overloaded
from headrace.serving.model.region_layout import (
    _ACTIVE,
    _HEAD,
    _LAYOUT,
    _META_SIZE,
    _READERS,
    _ROWS,
    _ROWS_MAX,
    _SEQ,
    _WARMED,
    READERS_MAX,
    Region,
    region_bytes,
)
from headrace.serving.model.row_table import apply

_GROUP = Path("/sys/fs/cgroup")
_SPARE = 0.05
"""What is left alone of the machine's memory."""


def memory_left(group: Path = _GROUP) -> int:
    """Return how many bytes this process may still take: what the machine has available, and what the memory limit of
    its control group leaves. 5 % of the machine are left alone."""
    memory = psutil.virtual_memory()
    left = int(memory.available - _SPARE * memory.total)
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            left = min(left, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # No control group of version 2, or no limit.
    return max(0, left)


class Room:
    """What regions may take. A region grows within it, or is refused before anything is written."""

    def __init__(self, bytes_max: int = 0, left: Callable[[], int] = memory_left) -> None:
        """
        Args:
            bytes_max: of the region that is read and the larger one together; 0: what the machine has left.
            left: how many bytes may still be taken.
        """
        self.bytes_max, self._left = bytes_max, left

    def check(self, *, taken: int, more: int, folder: Path, why: str) -> None:
        """Raise `Overloaded`, with the numbers and the next step, where `more` bytes do not fit beside `taken`."""
        said = (
            f"{why}: a larger region takes {more / 1e6:,.0f} MB beside the {taken / 1e6:,.0f} MB of the one that is "
            "read until all processes have gone over"
        )
        if self.bytes_max and taken + more > self.bytes_max:
            raise Overloaded(f"{said}; serve.memory_bytes allows {self.bytes_max / 1e6:,.0f} MB: raise it. {_OR}")
        left, free = self._left(), shutil.disk_usage(folder).free
        if more > left:
            raise Overloaded(f"{said}; {left / 1e6:,.0f} MB of memory are left here: give serving more. {_OR}")
        if more > free:
            raise Overloaded(f"{said}; {folder} has {free / 1e6:,.0f} MB: make it larger. {_OR}")


_OR = "Or let the recipe expire rows sooner (Recipe.expire_after_ms), and the next version that fits is taken."


def rows_for(rows: int, rows_max: int) -> int:
    """Return how many rows a copy is given room for: doubled until `rows` fit.

    >>> rows_for(5, 4), rows_for(33, 4), rows_for(3, 4)
    (8, 64, 4)
    """
    while rows_max < rows:
        rows_max *= 2
    return rows_max


def fill_larger(old: Region, path: Path, *, dim: int, rows_max: int, rows: int, room: Room, why: str) -> Region:
    """Make a region at `path` that holds what the active copy of `old` does, twice, and has memory for `rows` rows.

    Raises `Overloaded` where there is no room, and leaves no file.
    """
    room.check(taken=old.taken_bytes, more=region_bytes(dim, rows_max, rows), folder=path.parent, why=why)
    try:
        larger = Region.create(path, dim=dim, rows_max=rows_max)
        larger.reserve(rows, path.parent)
    except (OSError, Overloaded) as error:
        path.unlink(missing_ok=True)
        if isinstance(error, Overloaded):
            raise
        raise Overloaded(f"{why}, and {path} cannot be made: {error}") from error
    mine = larger.head[_LAYOUT : _ROWS_MAX + 1].copy()
    larger.head[:_HEAD] = old.head
    larger.head[_LAYOUT : _ROWS_MAX + 1] = mine
    # Readers name themselves there.
    larger.head[_READERS : _READERS + 3 * READERS_MAX] = 0
    larger.head[_WARMED : _WARMED + READERS_MAX] = 0
    larger.note[:], larger.ring[:] = old.note, old.ring
    active = int(old.head[_ACTIVE])
    held, size = int(old.head[_ROWS + active]), int(old.head[_META_SIZE + active])
    if old.head[_SEQ + active] == 0:
        return larger
    keys_K, values_KV = old.keys[active][:held], old.values[active][:held]
    if apply(larger.index[0], larger.keys[0], larger.values[0], 0, keys_K, values_KV) < 0:
        raise InvariantBroken(f"{held} rows do not fit into {path}, which has room for {rows_max}.")
    larger.dense[0][:] = old.dense[active]
    larger.meta[0][:size] = old.meta[active][:size]
    larger.index[1][:] = larger.index[0]
    larger.dense[1][:] = larger.dense[0]
    larger.keys[1][:held], larger.values[1][:held] = larger.keys[0][:held], larger.values[0][:held]
    larger.meta[1][:size] = larger.meta[0][:size]
    for copy in range(2):
        larger.head[_SEQ + copy], larger.head[_ROWS + copy] = old.head[_SEQ + active], held
        larger.head[_META_SIZE + copy] = size
    return larger


def locked(path: Path) -> int:
    """Return a descriptor of a new file, locked."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def take_name(larger: Path, path: Path) -> None:
    """Give the larger region the name of the one that is read."""
    os.rename(larger, path)
