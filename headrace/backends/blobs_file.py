"""Blobs as files below a folder: a local disk, or any POSIX mount such as CephFS.

A write is: 1. a new file below `.unfinished/`, 2. fsync, 3. rename onto its name, 4. fsync of the folder, and of those
above it where it is new. A crash before 3 leaves the old object; the leftover is swept when it is an hour old. A write
that failed is made again of all its bytes: what the kernel holds of it is believed by nobody.

Pieces are written and made durable, or read, one by one, and each says `moved`: a slow store is told from one that
hangs.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from headrace.contract.errors import InvariantBroken, Unavailable, disk_remedy
from headrace.contract.interfaces.blobs import Pieces
from headrace.process.moved import moved

UNFINISHED = ".unfinished"
PIECE_BYTES = 64 * 1024 * 1024
"""6 s at 10 MB/s, the slowest store that training keeps up with."""


def checked_name(name: str) -> str:
    """Return `name`, or raise `InvariantBroken` where it could leave the root or hide from `list`.

    >>> checked_name("state/stream/0/100.arrow")
    'state/stream/0/100.arrow'
    """
    if not name or any(not part or part.startswith(".") for part in name.split("/")):
        raise InvariantBroken(f"blob name {name!r}: parts are neither empty nor begin with a dot.")
    return name


def read_in_pieces(read: Callable[[int], bytes]) -> bytes:
    """Return all that `read` gives, piece by piece; its last piece is empty."""
    whole = BytesIO()
    while piece := read(PIECE_BYTES):
        whole.write(piece)
        moved()
    return whole.getvalue()


def cut_pieces(data: bytes | Pieces, size: int) -> Iterator[memoryview]:
    """Yield `data` in order, in pieces of `size` bytes at most."""
    for piece in [data] if isinstance(data, bytes) else data:
        view = memoryview(piece).cast("B")
        yield from (view[start : start + size] for start in range(0, len(view), size))


def _write(file: BinaryIO, data: bytes | Pieces) -> None:
    """Write `data`, all but its end durably: what fsync still has to do then takes no longer than a piece."""
    written = durable = 0
    for piece in cut_pieces(data, PIECE_BYTES):
        if written + len(piece) - durable > PIECE_BYTES:
            file.flush()
            os.fdatasync(file.fileno())
            moved()
            durable = written
        file.write(piece)
        written += len(piece)
    file.flush()


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class FileBlobs:
    """Named byte strings below `root`, which is created when the first one is put."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._swept = False

    def put(self, name: str, data: bytes | Pieces) -> None:
        """Store `data` under `name`, atomically and durably. Raises `Unavailable` when the disk refuses."""
        target = self.root / checked_name(name)
        unfinished = self.root / UNFINISHED
        part = unfinished / uuid.uuid4().hex
        try:
            new = [folder.parent for folder in (target.parent, *target.parent.parents) if not folder.exists()]
            unfinished.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(unfinished)
            with part.open("wb") as file:
                _write(file, data)
                os.fsync(file.fileno())
            part.replace(target)
            for folder in (target.parent, *new):
                _sync_folder(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            told = f"{target} was not stored: {error}; {disk_remedy(error)}."
            raise Unavailable(told) from error

    def get(self, name: str) -> bytes | None:
        """Return the object, or None where there is none."""
        try:
            with (self.root / checked_name(name)).open("rb") as file:
                return read_in_pieces(file.read)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise Unavailable(f"{self.root / name} cannot be read: {error}") from error

    def list(self, prefix: str) -> list[str]:
        """Return the full names of the objects directly in folder `prefix` ("" is the root), sorted."""
        folder = self.root / checked_name(prefix.rstrip("/")) if prefix else self.root
        lead = f"{prefix.rstrip('/')}/" if prefix else ""
        try:
            with os.scandir(folder) as entries:
                return sorted(lead + e.name for e in entries if not e.name.startswith(".") and e.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise Unavailable(f"{folder} cannot be listed: {error}") from error

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens where there is none."""
        try:
            (self.root / checked_name(name)).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise Unavailable(f"{self.root / name} cannot be deleted: {error}") from error

    def _sweep(self, unfinished: Path) -> None:
        if self._swept:
            return
        self._swept = True
        for leftover in unfinished.iterdir():
            with contextlib.suppress(OSError):
                if leftover.stat().st_mtime < time.time() - 3_600:
                    leftover.unlink()
