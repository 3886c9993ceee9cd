"""Makes a commit to a lake on a POSIX path outlive a power cut: delta-rs writes and renames, and never asks for fsync.

On HDFS the DataNodes answer for a closed file, and there is nothing to do.

After a sync that failed, Linux calls the lost pages clean: the next sync of the same file succeeds and proves nothing.
So what may have been synced in vain, by this process or the one before, is read from the disk itself before more is
built on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import msgspec
from pyarrow import ArrowException, parquet

from headrace.contract.errors import InvariantBroken


class _Add(msgspec.Struct):
    path: str


class _Action(msgspec.Struct):
    add: _Add | None = None


class OnDisk:
    """Which versions of one table are known to be on the disk. On a store that is no POSIX path nothing is asked."""

    def __init__(self) -> None:
        self._synced = -1
        """The newest version that is known to be on the disk."""
        self._is_doubtful = True
        """Whether a sync failed, here or in the process before, of which nobody knows."""

    def put(self, uri: str, before: int, version: int) -> None:
        """Return when the versions behind `before` up to this one are on the disk. Raises `OSError`."""
        if "://" in uri:
            return
        self._is_doubtful, was_doubtful = True, self._is_doubtful
        make_durable(Path(uri), range(before + 1, version + 1))
        self._is_doubtful = was_doubtful
        if before <= self._synced:
            self._synced = max(self._synced, version)

    def settle(self, uri: str, newest: int) -> None:
        """Have on the disk what is in the table, before more is built on it. Raises `OSError`, `InvariantBroken`."""
        if newest < 0 or "://" in uri or (newest <= self._synced and not self._is_doubtful):
            return
        # Of an earlier process the newest alone: it went on only when those before were on the disk.
        first = newest if self._synced < 0 else min(self._synced + 1, newest)
        read_back(Path(uri), range(first, newest + 1))
        self._synced, self._is_doubtful = newest, False


def make_durable(root: Path, versions: Iterable[int]) -> None:
    """Return when these versions' files, and their entries in the log, are on the disk. Raises `OSError`."""
    log, entries = root / "_delta_log", _entries(root, versions)
    added = [path for each in entries for path in _added(root, each)]
    folders = {folder for path in added for folder in path.parents if folder.is_relative_to(root)}
    # A commit that is there without its rows would be worse than none: rows first.
    for path in (*added, *sorted(folders), *entries, log):
        sync(path)


def read_back(root: Path, versions: Iterable[int]) -> None:
    """Return when these versions are on the disk, as far as they are still there. Raises `OSError`.

    Raises `InvariantBroken` where the disk has something else than what was written.
    """
    for entry in _entries(root, versions):
        if not entry.exists():
            continue
        # A file that is gone was replaced by a compaction meanwhile; where it was not, readers name it.
        added = [path for path in _added(root, entry) if path.exists()]
        for path in (*added, *sorted({path.parent for path in added}), entry, entry.parent):
            sync(path)
        for path in added:
            _forget(path)
            try:
                file = parquet.ParquetFile(path)
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
            except (ArrowException, OSError) as error:
                raise _lost(path, entry, error) from error
        before = entry.read_bytes()
        _forget(entry)
        if entry.read_bytes() != before:
            raise _lost(entry, entry, None)


def _lost(path: Path, entry: Path, error: Exception | None) -> InvariantBroken:
    return InvariantBroken(
        f"{path} is not on the disk as it was written{f': {error}' if error else ''}. The disk failed, or lost power: "
        f"see its kernel log, delete the newest entry of the lake, {entry}, and start the sink, which stores its rows "
        "again."
    )


def _entries(root: Path, versions: Iterable[int]) -> list[Path]:
    return [root / "_delta_log" / f"{version:020d}.json" for version in versions]


def _added(root: Path, entry: Path) -> list[Path]:
    actions = [msgspec.json.decode(line, type=_Action) for line in entry.read_bytes().splitlines()]
    return [root / unquote(action.add.path) for action in actions if action.add is not None]


def _forget(path: Path) -> None:
    """Have the kernel drop what it holds of a file, so that the next read comes from the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Return when a file's bytes, or which files a folder has, are on the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
