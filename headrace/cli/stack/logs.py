"""Show the end of a process's log file, and follow it."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path

from headrace.cli.stack.flags import add_stack_flags, present_layout
from headrace.contract.errors import ConfigRejected

POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("stage", help="kafka, namenode, datanode, ingest, stream, train, ... or supervisor")
    parser.add_argument("-n", "--lines", type=int, default=40, help="how many lines of the end (%(default)s)")
    parser.add_argument("--no-follow", action="store_true", help="end after them")


def main(args: argparse.Namespace) -> int:
    """Print, then follow until Ctrl-C."""
    folder = present_layout(args).logs
    file = folder / f"{args.stage}.log"
    if not file.exists():
        names = sorted(p.stem for p in folder.glob("*.log"))
        raise ConfigRejected(f"no log of {args.stage!r} in {folder}; there are: {', '.join(names) or 'none'}.")
    follow(file, args.lines, forever=not args.no_follow)
    return 0


def follow(file: Path, lines: int, *, forever: bool) -> None:
    """Print the last `lines`, then what is added; a rotated file is opened anew."""
    stream = file.open(errors="replace")
    sys.stdout.writelines(deque(stream, maxlen=lines))
    sys.stdout.flush()
    while forever:
        if text := stream.read():
            sys.stdout.write(text)
            sys.stdout.flush()
        elif file.exists() and file.stat().st_ino != _inode(stream.fileno()):
            stream.close()
            stream = file.open(errors="replace")
        else:
            time.sleep(POLL_S)
    stream.close()


def _inode(descriptor: int) -> int:
    return Path(f"/dev/fd/{descriptor}").stat().st_ino
