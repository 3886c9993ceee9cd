"""Find what keeps the stack from running, and say the remedy.

It looks at this machine, and at the project as `headrace check` does. Exits 1 when something will not run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from headrace.cli.project_folder import find_project
from headrace.cli.stack.flags import add_stack_flags, new_layout, present_layout
from headrace.cli.tools.check import examine_project
from headrace.deploy.local.doctor import Finding, examine
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.supervise import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--project", metavar="DIR", help="folder with headrace.toml (HEADRACE_PROJECT; examples/shop)")
    parser.add_argument("--json", action="store_true", help="a list of findings: what, found, level, remedy")


def main(args: argparse.Namespace) -> int:
    """Print what was found: of the stack that runs here, else of the one that `up` would start."""
    quiet_clients()
    layout = present_layout(args)
    layout = layout if Supervisor(layout).running() else new_layout(args)
    findings = [*examine(layout), *project_findings(find_project(args.project) if args.project else layout.project)]
    if args.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(findings)).decode() + "\n")
    else:
        for finding in findings:
            print(f"{finding.level:<8}{finding.what}: {finding.found}")
            if finding.remedy:
                print(f"{'':8}  remedy: {finding.remedy}")
    return 1 if any(finding.level == "trouble" for finding in findings) else 0


def project_findings(folder: Path) -> list[Finding]:
    """Return what `headrace check` says of a project, shortly: each thing that is wrong, else what it declares."""
    report = examine_project(folder)
    again = f"correct it; `headrace check {folder}` looks again"
    found = [Finding("project", text, "trouble", again) for text in report.wrong]
    found += [Finding("project", text, "note", f"`headrace check {folder}` tells more") for text in report.notes]
    tasks = report.declares.get("tasks")
    count = len(tasks) if isinstance(tasks, dict) else 0
    return found or [Finding("project", f"{report.project} in {folder}, {count} task{'s' * (count != 1)}", "ok")]
