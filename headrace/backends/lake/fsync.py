"""Makes a commit to a lake on a POSIX path outlive a power cut: delta-rs writes and renames, and never asks for fsync.

On HDFS the DataNodes answer for a closed file, and there is nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import msgspec


class _Add(msgspec.Struct):
    path: str


class _Action(msgspec.Struct):
    add: _Add | None = None


def make_durable(root: Path, versions: Iterable[int]) -> None:
    """Return when these versions' files, and their entries in the log, are on the disk. Raises `OSError`."""
    log, entries = root / "_delta_log", [root / "_delta_log" / f"{version:020d}.json" for version in versions]
    actions = [msgspec.json.decode(line, type=_Action) for each in entries for line in each.read_bytes().splitlines()]
    added = [root / unquote(action.add.path) for action in actions if action.add is not None]
    folders = {folder for path in added for folder in path.parents if folder.is_relative_to(root)}
    # A commit that is there without its rows would be worse than none: rows first.
    for path in (*added, *sorted(folders), *entries, log):
        sync(path)


def sync(path: Path) -> None:
    """Return when a file's bytes, or which files a folder has, are on the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
