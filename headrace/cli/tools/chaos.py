"""Kill processes at random under load, then account for every event: nothing lost, nothing twice.

It starts a stack of its own (Kafka, the stages that `--stage` needs, a store on disk) in a temporary folder on free
ports, and never touches the running one. With `crawl` or `hdfs` among the stages the store is an HDFS, whose NameNode
and DataNode are killed too; what the crawler asks then is a site of its own, never the project's. The seed is printed
first; the same seed kills the same processes after the same times. Exit code 1 when the account does not close; the
stack's folder then stays, with logs and data.

`--stage all` runs everything on a small disk of its own, which takes root and a loop device (else no disk is filled and
the run says so). It kills every process and every server, freezes some (SIGSTOP, SIGCONT), takes the broker and the
store away for a while, and fills that disk once. Then, without a hand, all must be ready again, the account and the
ledger must close, and replay must reach the live model's digest.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from headrace.cli.project_folder import find_project, load_project
from headrace.contract.errors import InvariantBroken
from headrace.deploy.local.chaos.account import Account
from headrace.deploy.local.chaos.faults import VICTIMS, Fault, draw_faults
from headrace.deploy.local.chaos.load import seed_from_system
from headrace.deploy.local.chaos.plan import ALL, NEEDS, SECOND, STREAM, draw_kills, victims_of
from headrace.deploy.local.chaos.run import ChaosRun
from headrace.deploy.local.chaos.small_disk import lacking
from headrace.deploy.local.readiness import quiet_clients
from headrace.replay.ledger.ledger import table as ledger_table

KILLS, STREAM_KILLS = 20, 30

ROWS = (
    ("load", ("emitted", "emitted_again", "emitted_bad")),
    ("gateway", ("read", "appended", "dead_lettered", "repeated")),
    ("log", ("repeated_in_log",)),
    ("verdict", ("lost", "twice", "made_up", "bad_lost")),
)
CRAWL_ROWS = (
    ("site", ("sent", "acknowledged", "unsettled")),
    ("crawled", ("logged", "repeated_in_log", "joined")),
    ("wrong", ("lost", "twice", "made_up", "out_of_order", "differing", "stale", "mixed", "bodies_changed")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    env = os.environ.get
    parser.add_argument(
        "--stage",
        default=env("STAGE") or "ingest",
        help=f"who is killed, separated by commas: {', '.join(NEEDS)}; stream: {', '.join(STREAM)}; all: everything",
    )
    parser.add_argument("--seed", type=int, default=int(env("SEED") or 0), help="of times and victims (any)")
    parser.add_argument(
        "--kills", type=int, default=int(env("KILLS") or 0), help=f"how many ({KILLS}; {STREAM_KILLS} with stream)"
    )
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
    # Ctrl-C and SIGTERM both end the stack before the program ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin, out = time.monotonic(), sys.stderr if args.json else sys.stdout
    stages = [stage.strip() for stage in args.stage.split(",") if stage.strip()]
    seed = args.seed or seed_from_system()
    victims, is_whole = victims_of(stages, args.gateways), ALL in stages
    count = args.kills or (STREAM_KILLS if "stream" in stages else KILLS)
    print(f"seed {seed}: {count} kills of {', '.join(victims)} at {args.rate} events/s", file=out, flush=True)
    project_dir = find_project(args.project or os.environ.get("HEADRACE_PROJECT") or "")
    config, project = load_project(project_dir)
    kills = [] if is_whole else draw_kills(Random(seed), victims, count)
    account = Account(seed=seed, stages=stages, kills=kills, rate=args.rate, seconds=0.0, rate_held=0.0)
    if is_whole:
        account.disk = lacking(Path(tempfile.gettempdir()))
        but = [name for name, runs in ((SECOND, args.gateways > 1), ("crawl", bool(project.crawls))) if not runs]
        account.faults = draw_faults(Random(seed), count, fills=not account.disk, but=but)
        print("\n".join(_plan(account.faults, account.disk)), file=out, flush=True)
    run = ChaosRun(
        project_dir=project_dir,
        project=project,
        config=config,
        gateways=args.gateways,
        port_base=args.port_base or None,
        say=lambda text: print(f"{time.monotonic() - begin:6.1f} s  {text}", file=out, flush=True),
    )
    try:
        run.run(account)
    except InvariantBroken as error:
        _show(account, args.json)
        print(f"headrace chaos: {error}; again with --seed {seed}", file=sys.stderr)
        return 1
    _show(account, args.json)
    return 0


def _show(account: Account, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(account).decode(), flush=True)
        return
    lines = [f"{title:<10}" + _pairs(account, names) for title, names in ROWS]
    if account.disk:
        lines.append(f"disk      not filled: {account.disk}")
    if account.model is not None:
        model = account.model
        lines.append(
            f"model     step {model.step:,} of run {model.run}, {model.replayed_rows:,} samples, served {model.served}"
        )
        lines.append(f"replay    {model.replayed_digest or '-'}\nlive      {model.live_digest or '-'}")
    if account.crawl is not None:
        lines += [f"{title:<10}" + _pairs(account.crawl, names) for title, names in CRAWL_ROWS]
    if account.settled is not None:
        lines.append(f"{'aggregates':<10}" + _pairs(account.settled, ("values", "wrong", "missing", "undue")))
    if account.ledger is not None:
        lines.append(ledger_table(account.ledger))
    held = f"{account.rate_held:,.0f} of {account.rate:,} events/s held for {account.seconds:.0f} s"
    verdict = "the account closes" if account.closes else "THE ACCOUNT DOES NOT CLOSE"
    if account.held_s:
        held += f", of which the load paused {account.held_s:.0f} s"
    broken = ", ".join(f"{many} {kind}" for kind, many in Counter(_KINDS[f.kind] for f in account.faults).items())
    print("\n".join([*lines, f"{broken or f'{len(account.kills)} kills'}, {held}; {verdict}"]), flush=True)


_KINDS = {"kill": "kills", "freeze": "freezes", "stop": "stops of a server", "fill": "full disk"}


def _plan(faults: Sequence[Fault], disk: str) -> list[str]:
    """Return the plan for people: how often each victim is killed, then a row for each other fault."""
    kills = Counter(fault.target for fault in faults if fault.kind == "kill")
    spells = [f for f in faults if f.kind != "kill"]
    return [
        "kills: " + ", ".join(f"{name} {kills[name]}" for name in VICTIMS if kills[name]),
        *(f"at {f.at_s:5.1f} s {_KINDS[f.kind]:<18} {f.target:<13} {f.for_s:4.1f} s" for f in spells),
        *([f"the disk is not filled: {disk}"] if disk else []),
    ]


def _pairs(counts: object, names: Sequence[str]) -> str:
    return "   ".join(f"{name} {getattr(counts, name):,}" for name in names)
