"""Delete local state: Kafka's log, HDFS, checkpoints, logs. Says what goes before it goes; jars and .venv stay."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from headrace.cli.stack.flags import add_stack_flags, present_layout
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.stack import own_cephfs
from headrace.deploy.local.supervise import Supervisor, orphans

KEPT = frozenset({"jars"})
"""They were fetched and are pinned. `rm -r .headrace/jars` deletes them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask; needed where no terminal can answer")


def main(args: argparse.Namespace) -> int:
    """List, ask, delete. A running stack is refused."""
    layout = present_layout(args)
    if Supervisor(layout).running() or orphans(layout.home) or (layout.own_cephfs and own_cephfs(layout).is_mounted()):
        raise ConfigRejected(f"the stack of {layout.home} runs; `make down` first.")
    entries = sorted(p for p in layout.home.glob("*") if p.name not in KEPT)
    if not entries:
        print(f"nothing to delete in {layout.home}")
        return 0
    print("this deletes, for good:")
    for entry in entries:
        print(f"  {_size(entry) / 1e6:10,.1f} MB  {entry}")
    if not (layout.own_hdfs or layout.own_cephfs):
        print(f"it leaves {layout.store} as it is")
    if not args.yes and not _agreed():
        print("nothing was deleted")
        return 1
    note = layout.home / "run" / "hdfs-link"
    if note.exists():
        shutil.rmtree(Path(note.read_text()).parent, ignore_errors=True)
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    print("deleted")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("no terminal to ask; --yes deletes without a question")
        return False
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(f.lstat().st_size for f in files if f.is_file() and not f.is_symlink())
