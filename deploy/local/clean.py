"""Deletes the local state of a stack that does not run: Kafka's log, HDFS, checkpoints, logs, the model. Jars stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.stack import own_cephfs
from headrace.deploy.local.supervise import Supervisor, orphans
from headrace.serving.model.region_file import region_in_memory

KEPT = frozenset({"jars"})
"""They were fetched and are pinned. `rm -r .headrace/jars` deletes them."""


def deletable(layout: Layout) -> list[Path]:
    """Return the files and folders that `delete` would delete. Raises `ConfigRejected` while the stack runs."""
    if Supervisor(layout).running() or orphans(layout.home) or (layout.own_cephfs and own_cephfs(layout).is_mounted()):
        raise ConfigRejected(f"the stack of {layout.home} runs; `headrace down` first.")
    model = region_in_memory(layout.home)
    # With a larger one that was filled aside when its writer died.
    return [
        *sorted(p for p in layout.home.glob("*") if p.name not in KEPT),
        *sorted(model.parent.glob(model.name + "*")),
    ]


def delete(layout: Layout) -> None:
    """Delete the stack's state, for good. Raises `ConfigRejected` while the stack runs."""
    entries = deletable(layout)
    # Where the path has a space, HDFS is reached through a link in the temporary folder, which goes too.
    note = layout.home / "run" / "hdfs-link"
    if note.exists():
        shutil.rmtree(Path(note.read_text()).parent, ignore_errors=True)
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(f.lstat().st_size for f in files if f.is_file() and not f.is_symlink())
