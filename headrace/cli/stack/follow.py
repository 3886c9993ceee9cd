"""Print the lines of `headrace up` for a stack that runs detached: one every 3 s, until Ctrl-C, which stops nothing."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress

from headrace.cli.project_folder import load_project
from headrace.cli.stack.flags import add_stack_flags, present_layout
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.status_line import StatusLine
from headrace.deploy.local.supervise import Supervisor

LINE_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("-n", "--lines", type=int, default=0, help="end after so many lines; 0 never (%(default)s)")


def main(args: argparse.Namespace) -> int:
    """Print until Ctrl-C, the last line, or the stack's end."""
    layout = present_layout(args)
    if not Supervisor(layout).running():
        raise ConfigRejected(f"nothing runs in {layout.home}; `headrace up` starts it.")
    main_task = ""
    # A project that is being edited may be wrong; what runs has read it before.
    with suppress(ConfigRejected):
        main_task = load_project(layout.project)[1].recipe.task
    follow(layout, main_task, lines=args.lines)
    return 0


def follow(layout: Layout, main_task: str, *, lines: int = 0) -> None:
    """Print a line every few seconds until the stack was stopped, or `lines` of them; 0: no bound.

    Each line is of the seconds before it. `main_task` is the project's `recipe.task`, "" where it is not known.
    """
    status, said = StatusLine(layout, main_task), 0
    while not lines or said < lines:
        time.sleep(LINE_S)
        print(status.line(), flush=True)
        said += 1
        supervisor = Supervisor(layout)
        if not supervisor.running() and not supervisor.unanswered():
            print("the stack was stopped from outside", flush=True)
            return
