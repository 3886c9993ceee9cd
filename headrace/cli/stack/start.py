"""Start processes of the local stack that were stopped, or that wait for their next start after a crash.

`train@NAME` learns the variant NAME; one that was declared after `headrace up` is new to the stack here.

They get the project and the settings on disk, and the environment of this call. Returns when all of them are ready, and
at once when one of them ends with a reason that waiting does not mend.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from headrace.cli.project_folder import load_project
from headrace.cli.stack.flags import add_names, present_layout, timed_printer
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import start_named

add_arguments = add_names


def main(args: argparse.Namespace) -> int:
    """Start; 0 when all are ready."""
    quiet_clients()
    layout = present_layout(args)
    if asked := [name.removeprefix("train@") for name in args.names if name.startswith("train@")]:
        # A variant that was declared after `up` is new to the stack.
        project = load_project(layout.project)[1]
        added = [name for name in asked if name not in layout.variants]
        for name in added:
            project.of_variant(name)
        layout = replace(layout, variants=(*layout.variants, *added))
    start_named(layout, args.names, timed_printer(time.monotonic()))
    return 0
