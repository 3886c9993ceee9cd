"""Stop processes of the local stack and start them again, with the project and the settings as they are on disk now.

The others go on: stages read on from where they stood, and what was in flight comes again and is dropped by its ids.
Returns when all of them are ready.
"""

from __future__ import annotations

import argparse
import time

from headrace.cli.stack.flags import add_names, present_layout, timed_printer
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import restart

add_arguments = add_names


def main(args: argparse.Namespace) -> int:
    """Restart; 0 when all are ready."""
    quiet_clients()
    restart(present_layout(args), args.names, timed_printer(time.monotonic()))
    return 0
