"""Stop everything that `headrace up` started here; no process of it is left."""

from __future__ import annotations

import argparse

from headrace.cli.stack.flags import add_stack_flags, present_layout
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import stop

add_arguments = add_stack_flags


def main(args: argparse.Namespace) -> int:
    """Stop the stack; 0 also when none runs."""
    quiet_clients()
    said: list[str] = []
    stop(present_layout(args), said.append)
    print("; ".join(said) or "nothing runs here")
    return 0
