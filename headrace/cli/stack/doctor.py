"""Find what keeps the stack from running, and say the remedy. Exits 1 when something will not run."""

from __future__ import annotations

import argparse
import sys

import msgspec

from headrace.cli.stack.flags import add_stack_flags, new_layout, present_layout
from headrace.deploy.local.doctor import examine
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.supervise import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--json", action="store_true", help="a list of findings: what, found, level, remedy")


def main(args: argparse.Namespace) -> int:
    """Print what was found: of the stack that runs here, else of the one that `up` would start."""
    quiet_clients()
    layout = present_layout(args)
    findings = examine(layout if Supervisor(layout).running() else new_layout(args))
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(findings)).decode() + "\n")
    else:
        for finding in findings:
            print(f"{finding.level:<8}{finding.what}: {finding.found}")
            if finding.remedy:
                print(f"{'':8}  remedy: {finding.remedy}")
    return 1 if any(finding.level == "trouble" for finding in findings) else 0
