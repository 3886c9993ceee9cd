"""Kill processes at random under load, then account for every event: nothing lost, nothing twice.

It starts a stack of its own (Kafka, the stages that `--stage` needs, a store on disk) in a temporary folder on free
ports, and never touches the running one. With `crawl` or `hdfs` among the stages the store is an HDFS, whose NameNode
and DataNode are killed too; what the crawler asks then is a site of its own, never the project's. The seed is printed
first; the same seed kills the same processes after the same times. Exit code 1 when the account does not close; the
stack's folder then stays, with logs and data.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Self

import msgspec

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.kafka import KafkaReader
from headrace.cli.project_folder import find_project, load_project
from headrace.cli.stack.flags import quiet_clients
from headrace.cli.tools.ledger import table as ledger_table
from headrace.cli.tools.ledger import take_stock
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.contract.project import Project
from headrace.deploy.local.chaos import breaking as chaos
from headrace.deploy.local.chaos import crawl_account as chaos_crawl
from headrace.deploy.local.chaos.load import seed_from_system
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.metrics_text import parse
from headrace.deploy.local.readiness import http_get
from headrace.deploy.local.supervise import Program, Supervisor
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.settled import SettledCounts, check_settled

HELP = "kill processes at random under load, then account for every event"
DRAINED_S = 120.0
KILLS, STREAM_KILLS = 20, 30
VALUES_ON_THEIR_WAY_MS = 10_000
"""Punctuation that is younger than this when the account is drawn may have values that are not written yet."""

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
        help=f"who is killed, separated by commas: {', '.join(chaos.NEEDS)}; stream: {', '.join(chaos.STREAM)}",
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
    # Ctrl-C and SIGTERM both take the stack down on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin, out = time.monotonic(), sys.stderr if args.json else sys.stdout
    stages = [stage.strip() for stage in args.stage.split(",") if stage.strip()]
    seed = args.seed or seed_from_system()
    victims = chaos.victims_of(stages, args.gateways)
    count = args.kills or (STREAM_KILLS if "stream" in stages else KILLS)
    print(f"seed {seed}: {count} kills of {', '.join(victims)} at {args.rate} events/s", file=out, flush=True)
    project_dir = find_project(args.project or os.environ.get("HEADRACE_PROJECT") or "")
    config, project = load_project(project_dir)
    kills = chaos.plan(Random(seed), victims, count)
    account = chaos.Account(seed=seed, stages=stages, kills=kills, rate=args.rate, seconds=0.0, rate_held=0.0)

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:6.1f} s  {text}", file=out, flush=True)

    base = args.port_base or None
    try:
        with _Crawled.of(project, seed, wanted="crawl" in stages) as crawled:
            more = crawled.programs() if crawled else ()
            stack = chaos.own_stack(project_dir, config, stages, say, gateways=args.gateways, base=base, more=more)
            with stack as layout:
                chaos.run(layout, project, config, kills, account, say)
                if crawled:
                    account.crawl = crawled.settled(layout, say)
                if set(stages) - {"ingest", "kafka"}:
                    account.ledger = _drained(layout, project, config, stages, say)
                if crawled and account.crawl is not None:
                    crawled.count(layout, config, account.crawl)
                if "aggregate" in chaos.needed(stages):
                    account.settled = _settled(layout, project, config, say)
                if not _closes(account):
                    raise InvariantBroken("the account does not close")
    except InvariantBroken as error:
        _show(account, args.json)
        print(f"headrace chaos: {error}; again with --seed {seed}", file=sys.stderr)
        return 1
    _show(account, args.json)
    return 0


def _closes(account: chaos.Account) -> bool:
    account.closes = account.closes and (account.ledger is None or _all_there(account.ledger, account.stages))
    account.closes = account.closes and (account.settled is None or account.settled.closes())
    account.closes = account.closes and (account.crawl is None or account.crawl.closes)
    return account.closes


def _all_there(ledger: Ledger, stages: Sequence[str]) -> bool:
    """Say whether the ledger closes and, where a sink ran, nothing is left on its way to the lake."""
    arrived = ledger.positives + ledger.negatives <= ledger.samples == ledger.stored and not ledger.waiting
    return ledger.closes and (arrived or "sink" not in chaos.needed(stages))


def _show(account: chaos.Account, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(account).decode(), flush=True)
        return
    lines = [f"{title:<10}" + _pairs(account, names) for title, names in ROWS]
    if account.crawl is not None:
        lines += [f"{title:<10}" + _pairs(account.crawl, names) for title, names in CRAWL_ROWS]
    if account.settled is not None:
        lines.append(f"{'aggregates':<10}" + _pairs(account.settled, ("values", "wrong", "missing", "undue")))
    if account.ledger is not None:
        lines.append(ledger_table(account.ledger))
    held = f"{account.rate_held:,.0f} of {account.rate:,} events/s held for {account.seconds:.0f} s"
    verdict = "the account closes" if account.closes else "THE ACCOUNT DOES NOT CLOSE"
    print("\n".join([*lines, f"{len(account.kills)} kills, {held}; {verdict}"]), flush=True)


def _pairs(counts: object, names: Sequence[str]) -> str:
    return "   ".join(f"{name} {getattr(counts, name):,}" for name in names)


def _drained(layout: Layout, project: Project, config: Config, stages: Sequence[str], say: chaos.Say) -> Ledger:
    """Return the whole ledger once nothing moves any more, or after `DRAINED_S`."""
    topics = Topics(config.log.generation)
    until = time.monotonic() + DRAINED_S
    while True:
        _await_rest(layout, topics, config, until)
        say("samples and lake stand still; drawing the ledger")
        ledger = take_stock(project, config, topics, KafkaReader(layout.brokers), _lake(layout, config))
        if _all_there(ledger, stages) or time.monotonic() > until:
            return ledger
        say(f"draining: {ledger.waiting:,} wait for feedback, {ledger.samples:,} samples, {ledger.stored:,} stored")


def _await_rest(layout: Layout, topics: Topics, config: Config, until: float) -> None:
    """Return when neither `samples` nor the lake grew while the sink had time for two commits, or at `until`."""
    reader, before = KafkaReader(layout.brokers), ""
    while time.monotonic() < until:
        state = _lake(layout, config).state()
        now = f"{reader.end_offsets(topics.samples)} {state.version if state else -1}"
        if now == before:
            break
        before = now
        time.sleep(2 * config.sink.commit_ms / 1000 + 2.0)
    reader.close()


def _settled(layout: Layout, project: Project, config: Config, say: chaos.Say) -> SettledCounts:
    """Return what a second count of every aggregate finds."""
    say("counting every aggregate again")
    reader = KafkaReader(layout.brokers)
    now_ms = time.time_ns() // 1_000_000
    events = read_range(reader, Topics(config.log.generation).events)
    counts = check_settled(project, config, events, upto_ms=now_ms - VALUES_ON_THEIR_WAY_MS)
    reader.close()
    return counts


def _lake(layout: Layout, config: Config) -> DeltaLake:
    uri = f"{layout.store.removeprefix('file:')}/lake/samples"
    return DeltaLake(uri, generation=config.log.generation, partitions=config.log.partitions)


class _Crawled:
    """The site that is crawled while the crawler is killed, and what came of it."""

    def __init__(self, project: Project, seed: int, sources: Path) -> None:
        joined = {crawl.name: project.impression.fields[crawl.joins] for crawl in project.crawls}
        self.site = chaos_crawl.ChangingSite(project.crawls, joined, seed)
        self._sources = sources
        sources.write_bytes(msgspec.json.encode(self.site.sources()))
        self.site.start()

    @classmethod
    @contextmanager
    def of(cls, project: Project, seed: int, *, wanted: bool) -> Iterator[Self | None]:
        """Yield a site that serves, or None where none is wanted."""
        if not wanted:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="headrace-chaos-site-") as folder:
            crawled = cls(project, seed, Path(folder) / "sources.json")
            try:
                yield crawled
            finally:
                crawled.site.close()

    def programs(self) -> list[Program]:
        """Return the crawler that asks this site."""
        return [Program("crawl", [*self._command(), "--log-level", "WARNING"])]

    def settled(self, layout: Layout, say: chaos.Say) -> chaos_crawl.CrawlAccount:
        """Return the account with what is not settled once the site is at rest and the outbox empty."""
        account = chaos_crawl.CrawlAccount(unsettled=self.site.rest(chaos.QUIET_S))
        until = time.monotonic() + chaos.QUIET_S
        while time.monotonic() < until:
            status, body = http_get(f"http://{HOST}:{layout.port('metrics_crawl')}/metrics")
            if status == 200 and parse(body.decode()).get("headrace_crawl_outbox_rows") == 0:
                break
            time.sleep(0.2)
        say(f"the site rests, {account.unsettled} of {len(self.site.pages)} pages are not acknowledged as they are")
        return account

    def count(self, layout: Layout, config: Config, account: chaos_crawl.CrawlAccount) -> None:
        """Fill the account from log, `features`, lake and stored bodies, and say whether it closes."""
        topics, reader = Topics(config.log.generation), KafkaReader(layout.brokers)
        events, features = read_range(reader, topics.events), read_range(reader, topics.features)
        versions = chaos_crawl.count(self.site, events, features, config.log.partitions, account)
        reader.close()
        lake, crawls = _lake(layout, config), list(self.site.crawls.values())
        state = lake.state()
        if state is not None:
            stored = lake.read(state.version, chaos_crawl.stored_columns(crawls))
            chaos_crawl.count_stored(crawls, stored, versions, account)
        Supervisor(layout).end(("crawl",))
        again = subprocess.run(
            [*self._command(), "--extract-again"],
            env=layout.environment(),
            capture_output=True,
            text=True,
            timeout=chaos.QUIET_S,
            check=False,
        )
        changed, missing = again.stdout.partition(" ")[0], again.stderr.count("is not in the store")
        is_done = again.returncode == 0 and changed.isdigit()
        account.bodies_changed = int(changed) + missing if is_done else len(self.site.pages)
        account.closes = chaos_crawl.closes(account)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "headrace.cli.main", "crawl", "--sources", str(self._sources)]
