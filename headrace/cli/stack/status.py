"""Show each process, its state, port, memory and log file.

Exits 1 when nothing runs, and 2 when something lives and its supervisor does not tell of it.
"""

from __future__ import annotations

import argparse
import sys

import msgspec

from headrace.cli.stack.flags import add_stack_flags, present_layout, table
from headrace.deploy.local.supervise import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--json", action="store_true", help='{"running", "home", "processes": [...], "trouble"}')


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    layout = present_layout(args)
    supervisor = Supervisor(layout)
    processes = supervisor.processes()
    trouble = "" if processes else supervisor.unanswered()
    if args.json:
        told = {
            "running": bool(processes or trouble),
            "home": str(layout.home),
            "processes": processes,
            "trouble": trouble,
        }
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(told)).decode() + "\n")
    elif processes:
        print(table(processes))
    elif trouble:
        print(trouble)
    else:
        print(f"nothing runs in {layout.home}; `headrace up` starts it.")
    return 0 if processes else 2 if trouble else 1
