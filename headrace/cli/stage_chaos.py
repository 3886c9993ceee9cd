"""Kill processes at random under load, then account for every event: nothing lost, nothing twice.

It starts a stack of its own (Kafka, the stages that `--stage` needs, a store on disk) in a temporary folder on free
ports, and never touches the running one. The seed is printed first; the same seed kills the same processes after the
same times. Exit code 1 when the account does not close; the stack's folder then stays, with logs and data.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from random import Random

import msgspec

from headrace.backends.lake_delta import DeltaLake
from headrace.backends.log_kafka import KafkaReader
from headrace.cli.local import quiet_clients
from headrace.cli.runtime import find_project, load_project
from headrace.cli.stage_ledger import table as ledger_table
from headrace.cli.stage_ledger import take_stock
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.project import Project
from headrace.contract.topics import Topics
from headrace.deploy.local import chaos
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.load import seed_from_system
from headrace.replay.ledger import Ledger

HELP = "kill processes at random under load, then account for every event"
DRAINED_S = 120.0

ROWS = (
    ("load", ("emitted", "emitted_again", "emitted_bad")),
    ("gateway", ("read", "appended", "dead_lettered", "repeated")),
    ("log", ("repeated_in_log",)),
    ("verdict", ("lost", "twice", "made_up", "bad_lost")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    env = os.environ.get
    parser.add_argument(
        "--stage",
        default=env("STAGE") or "ingest",
        help=f"who is killed, separated by commas: {', '.join(chaos.NEEDS)}",
    )
    parser.add_argument("--seed", type=int, default=int(env("SEED") or 0), help="of times and victims (any)")
    parser.add_argument("--kills", type=int, default=int(env("KILLS") or 20), help="how many (%(default)s)")
    parser.add_argument("--rate", type=int, default=int(env("RATE") or 2_000), help="events a second (%(default)s)")
    parser.add_argument("--gateways", type=int, default=2, choices=(1, 2), help="processes on the port (%(default)s)")
    parser.add_argument(
        "--port-base", type=int, default=int(env("PORT_BASE") or 0), help="where ports begin (free ones)"
    )
    parser.add_argument("--project", metavar="DIR", help="folder with headrace.toml (HEADRACE_PROJECT; examples/shop)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for programs; the rest to stderr")


def main(args: argparse.Namespace) -> int:
    """Break things and draw the account."""
    quiet_clients()
    # Ctrl-C and SIGTERM both take the stack down on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin, out = time.monotonic(), sys.stderr if args.json else sys.stdout
    stages = [stage.strip() for stage in args.stage.split(",") if stage.strip()]
    seed = args.seed or seed_from_system()
    victims = chaos.victims_of(stages, args.gateways)
    print(f"seed {seed}: {args.kills} kills of {', '.join(victims)} at {args.rate} events/s", file=out, flush=True)
    project_dir = find_project(args.project or os.environ.get("HEADRACE_PROJECT") or "")
    config, project = load_project(project_dir)
    kills = chaos.plan(Random(seed), victims, args.kills)
    account = chaos.Account(seed=seed, stages=stages, kills=kills, rate=args.rate, seconds=0.0, rate_held=0.0)

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", file=out, flush=True)

    stack = chaos.own_stack(project_dir, config, stages, say, gateways=args.gateways, base=args.port_base or None)
    try:
        with stack as layout:
            chaos.run(layout, project, config, kills, account, say)
            if set(stages) - {"ingest", "kafka"}:
                account.ledger = _drained(layout, project, config, say)
            if not _closes(account):
                raise InvariantBroken("the account does not close")
    except InvariantBroken as error:
        _show(account, args.json)
        print(f"headrace chaos: {error}; again with --seed {seed}", file=sys.stderr)
        return 1
    _show(account, args.json)
    return 0


def _closes(account: chaos.Account) -> bool:
    account.closes = account.closes and (account.ledger is None or account.ledger.closes)
    return account.closes


def _show(account: chaos.Account, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(account).decode(), flush=True)
        return
    lines = [
        f"{title:<10}" + "   ".join(f"{name} {getattr(account, name):,}" for name in names) for title, names in ROWS
    ]
    if account.ledger is not None:
        lines.append(ledger_table(account.ledger))
    held = f"{account.rate_held:,.0f} of {account.rate:,} events/s held for {account.seconds:.0f} s"
    verdict = "the account closes" if account.closes else "THE ACCOUNT DOES NOT CLOSE"
    print("\n".join([*lines, f"{len(account.kills)} kills, {held}; {verdict}"]), flush=True)


def _drained(layout: Layout, project: Project, config: Config, say: chaos.Say) -> Ledger:
    """Return the whole ledger once nothing moves any more, or after `DRAINED_S`."""
    topics = Topics(config.log.generation)
    uri = str(Path(layout.store.removeprefix("file:")) / "lake" / "samples")
    until, before = time.monotonic() + DRAINED_S, ""
    while True:
        lake = DeltaLake(uri, generation=topics.generation, partitions=config.log.partitions)
        ledger = take_stock(project, config, topics, KafkaReader(layout.brokers), lake)
        now = f"{ledger.samples} {ledger.stored} {ledger.in_flight} {ledger.waiting}"
        if (now == before and not ledger.waiting) or time.monotonic() > until:
            return ledger
        say(f"draining: {ledger.waiting:,} wait for feedback, {ledger.samples:,} samples, {ledger.stored:,} stored")
        before = now
        time.sleep(3.0)
