"""Start everything on this machine: Kafka, HDFS, all stages, and the demo shop if the project is the demo.

In the foreground it then prints a line every few seconds, and Ctrl-C stops everything; with --detach it returns when
all is ready. Running it again takes over what runs, and starts what does not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from headrace.cli.addresses import HOST
from headrace.cli.project_folder import bounded, is_demo, load_project
from headrace.cli.rules_topic import rules_topic
from headrace.cli.runtime import open_blobs
from headrace.cli.stack.flags import add_stack_flags, new_layout, present_layout, table, timed_printer
from headrace.cli.stack.follow import follow
from headrace.cli.tools.check import cannot_run
from headrace.contract.config import Config
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.deploy.local.doctor import examine
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.readiness import quiet_clients
from headrace.deploy.local.stack import STAGES, start, stop
from headrace.deploy.local.supervise import Program, Supervisor
from headrace.stream.rule_changes import unapplied
from headrace.stream.stored_rules import StoredRules, stored_rules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_stack_flags(parser)
    parser.add_argument("--detach", action="store_true", help="return when all is ready")
    parser.add_argument("--project", metavar="DIR", help="folder with headrace.toml (HEADRACE_PROJECT; examples/shop)")
    parser.add_argument("--brokers", help="an outside Kafka instead of one started here (HEADRACE_BROKERS)")
    parser.add_argument("--store", help="file:/path, an outside hdfs://host:port/path, or cephfs (HEADRACE_STORE)")
    parser.add_argument("--webhdfs", help="http://host:port of the outside NameNode (HEADRACE_WEBHDFS)")
    parser.add_argument("--shipper", choices=["fluentd", "fluent-bit"], help="between shop and gateway (SHIPPER)")


def main(args: argparse.Namespace) -> int:
    """Bring the stack up; 0 when it is ready, or was stopped by Ctrl-C."""
    quiet_clients()
    layout, begin = new_layout(args), time.monotonic()
    config, project = load_project(layout.project)
    if wrong := list(cannot_run(config, project, layout.project)):
        raise ConfigRejected("\n".join(bounded(wrong)))
    if not (args.project or os.environ.get("HEADRACE_PROJECT")) and not is_demo(layout.project):
        print(f"project {layout.project}, as at the last `up` in {layout.home}; --project names another", flush=True)
    # Only a project that declares sources has something to crawl.
    more = [Program("crawl", [sys.executable, "-m", "headrace.cli.main", "crawl"])] if project.crawls else []
    _same_as_running(args, layout)
    layout = replace(layout, variants=tuple(project.variants))
    trouble = [f for f in examine(layout) if f.level != "ok"]
    for finding in trouble:
        print(f"{finding.level}: {finding.what}: {finding.found}\n  remedy: {finding.remedy}", file=sys.stderr)
    if any(f.level == "trouble" and f.what not in ("broker", "HDFS") for f in trouble):
        return 1
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _interrupt(stopped))
    say = timed_printer(begin)
    try:
        specs = Topics(config.log.generation).specs(config.log.partitions)
        start(layout, specs, say, stages=stages_of(layout.project), more=more, log=config.log)
        _show(layout, time.monotonic() - begin)
        with rules_topic(layout.brokers, Topics(config.log.generation)) as writer:
            lines = unapplied(writer, project, _stored_rules(layout, config))
        if lines:
            print("the project on disk differs from the rules in force, which are the log's:")
            print("\n".join(f"  {line}" for line in (*lines, "`headrace spec apply` puts it in force.")), flush=True)
        if args.detach:
            return 0
        print("a line every few seconds; Ctrl-C stops everything", flush=True)
        follow(layout, project.recipe.task)
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop(layout, say)
    return 0


def stages_of(project: Path) -> tuple[str, ...]:
    """Return the stages that a stack of this project runs: the shop's synthetic traffic belongs to the demo alone."""
    return (*(stage for stage in STAGES if stage != "shop" or is_demo(project)), "tensorboard")


def _stored_rules(layout: Layout, config: Config) -> Callable[[], Sequence[StoredRules]]:
    blobs = open_blobs(layout.store, layout.webhdfs)
    return partial(stored_rules, blobs, config.log.generation, config.log.partitions)


def _interrupt(stopped: threading.Event) -> None:
    if not stopped.is_set():
        stopped.set()
        raise KeyboardInterrupt


def _same_as_running(args: argparse.Namespace, layout: Layout) -> None:
    """Refuse to change addresses under a running stack."""
    before = present_layout(args)
    if not Supervisor(before).running():
        return
    for name in ("port_base", "brokers", "store", "project"):
        old, new = getattr(before, name), getattr(layout, name)
        if old != new:
            raise ConfigRejected(
                f"the stack of {layout.home} runs with {name} {old} and not {new}; `headrace down` first."
            )


def _show(layout: Layout, took_s: float) -> None:
    print(f"\n{table(Supervisor(layout).processes())}\n")
    print(f"all ready after {took_s:.1f} s. State: {layout.home}")
    print(f"  serving      http://{HOST}:{layout.port('serving')}/v1/model   POST /v1/rank")
    print(f"  TensorBoard  http://{HOST}:{layout.port('tensorboard')}")
    print(
        f"  log events   forward protocol on {HOST}:{layout.shipper_port if layout.shipper else layout.port('forward')}"
    )
    print(f"  lake         {layout.store.removeprefix('file:')}/lake/samples")
    print("  headrace status, headrace logs train, headrace down", flush=True)
