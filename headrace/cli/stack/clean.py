"""Delete local state: Kafka's log, HDFS, checkpoints, logs. Says what goes before it goes; jars and .venv stay."""

from __future__ import annotations

import argparse
import sys

from headrace.cli.stack.flags import add_stack_flags, present_layout
from headrace.deploy.local.clean import deletable, delete, size_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask; needed where no terminal can answer")


def main(args: argparse.Namespace) -> int:
    """List, ask, delete. A running stack is refused."""
    layout = present_layout(args)
    entries = deletable(layout)
    if not entries:
        print(f"nothing to delete in {layout.home}")
        return 0
    print("this deletes, for good:")
    for entry in entries:
        print(f"  {size_bytes(entry) / 1e6:10,.1f} MB  {entry}")
    if not (layout.own_hdfs or layout.own_cephfs):
        print(f"it leaves {layout.store} as it is")
    if not args.yes and not _agreed():
        print("nothing was deleted")
        return 1
    delete(layout)
    print("deleted")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        print("no terminal to ask; --yes deletes without a question")
        return False
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")
