"""A folder that is there whole, or not at all.

1. Everything is written in a hidden folder beside the wanted one, which a lock keeps for one writer.
2. When the writer is done, all is on the disk.
3. The hidden folder is renamed to the wanted one: an empty one, or one that may be replaced, which is set aside before
   and deleted after.

A writer that is killed leaves hidden folders, which the next one deletes, or puts back where it had set one aside.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.backends.delta.fsync import sync
from headrace.contract.errors import ConfigRejected, Overloaded, Unavailable


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden, empty folder, which is at `target` when the block has ended without an exception.

    Whoever calls it has looked before whether what is at `target` may be replaced.

    Raises:
        ConfigRejected: the place cannot be written.
        Overloaded: another writer of `target` is at work.
        Unavailable: the disk is full or fails. Nothing of this writer is left then.
    """
    making, aside = _hidden(target, "exporting"), _hidden(target, "replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        making.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigRejected(f"{target} can't be written: {error.strerror}. Name another folder.") from error
    lock = os.open(making, os.O_RDONLY)
    try:
        _take(lock, target)
        _clear(making)
        if aside.exists():
            shutil.rmtree(aside)
        try:
            yield making
            _put_in_place(making, target, aside)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else str(error)
            raise Unavailable(f"{target} was not written: {what}. Nothing of it is left; make room there.") from error
        finally:
            if _is_locked_folder(lock, making):
                shutil.rmtree(making, ignore_errors=True)
    finally:
        os.close(lock)


def names_in(target: Path) -> list[str]:
    """Return what is in the folder `target`, sorted; nothing where there is none. What a killed writer had set aside is
    put back first. Raises `ConfigRejected` where `target` is no folder."""
    aside = _hidden(target, "replaced")
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    if not target.exists():
        return []
    if not target.is_dir():
        raise ConfigRejected(f"{target} is a file; name a folder that is not there yet.")
    return sorted(path.name for path in target.iterdir())


def store(path: Path, data: bytes) -> None:
    """Write a file; it is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hidden(target: Path, end: str) -> Path:
    return target.parent / f".{target.name}.{end}"


def _take(lock: int, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Overloaded(f"another export to {target} is under way: wait until it is done.") from None


def _is_locked_folder(lock: int, making: Path) -> bool:
    """Say whether the folder of that name is still the one that the lock is on, not renamed or another's."""
    try:
        return os.path.samestat(os.fstat(lock), making.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _put_in_place(making: Path, target: Path, aside: Path) -> None:
    sync(making)
    if target.exists() and any(target.iterdir()):
        target.rename(aside)
    making.rename(target)
    sync(target.parent)
    if aside.exists():
        shutil.rmtree(aside)
