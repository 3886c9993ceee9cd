"""Stop processes of the local stack until `headrace start`; the others go on.

What waits for a stopped stage stays in the log, with its sender or on its shipper's disk, and is taken when it is back.
"""

from __future__ import annotations

import argparse

from headrace.cli.stack.flags import add_names, present_layout
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import stop_named

add_arguments = add_names


def main(args: argparse.Namespace) -> int:
    """Stop; 0 when all are gone."""
    quiet_clients()
    stop_named(present_layout(args), args.names, print)
    return 0
