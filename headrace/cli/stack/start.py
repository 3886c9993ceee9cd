"""Start processes of the local stack that were stopped, or that wait for their next start after a crash.

They get the project and the settings on disk, and the environment of this call. Returns when all of them are ready, and
at once when one of them ends with a reason that waiting does not mend.
"""

from __future__ import annotations

import argparse
import time

from headrace.cli.stack.flags import add_names, present_layout, timed_printer
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import start_named

add_arguments = add_names


def main(args: argparse.Namespace) -> int:
    """Start; 0 when all are ready."""
    quiet_clients()
    start_named(present_layout(args), args.names, timed_printer(time.monotonic()))
    return 0
