"""A stack of its own under load, whose processes are killed at points drawn from a seed; then each id is counted.

1. Start Kafka and the stages that are needed, in a folder and on ports of their own, and wait until they are ready.
2. Load: half of the events through `headrace.sender`, half as raw forward chunks that a shipper sends again under their
   ids until they are acked; among them events sent twice on purpose and events that no schema allows.
3. A project's crawled sources are served by a site of chaos's own (`chaos_crawl`) where the crawler is killed.
4. Kill -9, a random named process after a random time, soon after its start or while it works; supervisord restarts it.
5. Stop the load, wait until every shipper has its acks.
6. Read the log and the dead letters from the first record, drop repeated ids as the stream does, and hold what is left
   against what was emitted.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec

from headrace.backends.log.kafka import KafkaReader
from headrace.contract.config import PORTS, Config, port
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.formats.events import (
    FEEDBACK,
    IMPRESSION,
    PUNCTUATION,
    Punctuation,
    decode_batch,
    decode_punctuation,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.project import Project
from headrace.deploy.local import readiness
from headrace.deploy.local.chaos.crawl_account import CrawlAccount
from headrace.deploy.local.chaos.load import Emitted, Load
from headrace.deploy.local.doctor import free_port
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.stack import ALSO, STAGES, start, stop
from headrace.deploy.local.supervise import Program, Supervisor
from headrace.replay.ledger.ledger import Ledger, draw_gateways
from headrace.replay.ledger.settled import SettledCounts

NEEDS: dict[str, tuple[str, ...]] = {
    "kafka": ("ingest",),
    "ingest": ("ingest",),
    "stream": ("ingest", "stream", "aggregate", "sink"),
    "aggregate": ("ingest", "stream", "aggregate"),
    "sink": ("ingest", "stream", "sink"),
    "hdfs": ("ingest", "stream", "sink"),
    "crawl": ("ingest", "crawl"),
    "train": ("ingest", "stream", "aggregate", "sink", "train"),
    "serve": ("ingest", "stream", "aggregate", "sink", "train", "serve"),
}
"""Which stages run when one is killed: those that it reads from."""
STORE = ("namenode", "datanode")
ON_HDFS = frozenset({"hdfs", "crawl"})
"""Who names one of these gets a store on HDFS, and its processes are killed too; else the store is a folder."""

SECOND, SECOND_WORKER = "ingest-2", "stream-2"
STREAM = ("stream", SECOND_WORKER, "aggregate", "sink")
"""Who is killed when `stream` is named: two workers that share the partitions, and what stands around them."""
READY_S = 120.0
QUIET_S = 180.0
# Kafka takes 2 to 5 s to be back, a gateway 1 to 3: a kill in the middle of it now and then, else while it works.
EARLY_SHARE, EARLY_S, LATE_S = 0.2, 1.0, 4.0

Say = Callable[[str], None]


class Kill(msgspec.Struct):
    """One kill -9: who, how long after the one before, and whether it waits until all is ready."""

    process: str
    after_s: float
    when_ready: bool
    pid: int = 0


class Account(msgspec.Struct, kw_only=True):
    """What the ids say. `closes` when nothing is lost, twice or made up, and the gateways' sum holds."""

    seed: int
    stages: list[str]
    kills: list[Kill]
    rate: int
    seconds: float
    rate_held: float
    """Events emitted a second while processes were killed."""
    emitted: int = 0
    """Distinct good events."""
    emitted_again: int = 0
    emitted_bad: int = 0
    read: int = 0
    appended: int = 0
    dead_lettered: int = 0
    repeated: int = 0
    repeated_in_log: int = 0
    lost: int = 0
    twice: int = 0
    made_up: int = 0
    bad_lost: int = 0
    closes: bool = False
    ledger: Ledger | None = None
    """The whole ledger, down to the lake, where a stage after `ingest` ran."""
    crawl: CrawlAccount | None = None
    """What came of the crawled versions, where the crawler was killed."""
    settled: SettledCounts | None = None
    """The aggregator's values, counted again from the events, where it ran."""


def plan(random: Random, victims: Sequence[str], kills: int) -> list[Kill]:
    """Return who is killed when; the same for the same seed."""
    made = []
    for _ in range(kills):
        early = random.random() < EARLY_SHARE
        made.append(Kill(random.choice(victims), random.uniform(0.0, EARLY_S if early else LATE_S), not early))
    return made


def victims_of(stages: Sequence[str], gateways: int) -> list[str]:
    """Return the processes that `stages` name. Raises `ConfigRejected` for a stage that nobody can kill here."""
    wrong = [stage for stage in stages if stage not in NEEDS]
    if wrong:
        raise ConfigRejected(f"--stage {','.join(wrong)}: one or more of {', '.join(NEEDS)} is wanted.")
    named = [victim for stage in stages if stage != "hdfs" for victim in (STREAM if stage == "stream" else (stage,))]
    named += STORE if ON_HDFS & set(stages) else ()
    return list(dict.fromkeys([*named, *([SECOND] if gateways > 1 and "ingest" in stages else [])]))


def needed(stages: Sequence[str]) -> set[str]:
    """Return the stages that run when `stages` are named."""
    return {need for stage in stages for need in NEEDS[stage]}


@contextmanager
def own_stack(
    project: Path,
    config: Config,
    stages: Sequence[str],
    say: Say,
    *,
    gateways: int = 1,
    base: int | None = None,
    more: Sequence[Program] = (),
) -> Iterator[Layout]:
    """Yield a fresh stack that runs what `stages` need; its folder goes with it, unless an error leaves the block.

    `more` are programs that take the place of the stages whose names they have.
    """
    home = Path(tempfile.mkdtemp(prefix="headrace-chaos-")) / "home"
    base, on_hdfs = free_base() if base is None else base, bool(ON_HDFS & set(stages))
    layout = Layout(
        home=home,
        port_base=base,
        brokers=f"{HOST}:{port('kafka', base)}",
        store=f"hdfs://{HOST}:{port('namenode', base)}/headrace" if on_hdfs else f"file:{home / 'store'}",
        webhdfs=f"http://{HOST}:{port('namenode_http', base)}" if on_hdfs else None,
        project=project,
        own_kafka=True,
        own_hdfs=on_hdfs,
    )
    running = sorted(needed(stages), key=(*STAGES, *ALSO).index)
    gates = _two_gateways(layout) if gateways > 1 else []
    gates += [_second_worker(layout)] if "stream" in stages else []
    try:
        specs = Topics(config.log.generation).specs(config.log.partitions)
        start(layout, specs, say, stages=running, more=[*gates, *more])
        yield layout
    except BaseException:
        say(f"logs and data stay in {home}")
        raise
    else:
        stop(layout, lambda _: None)
        _remove(home.parent)
    finally:
        stop(layout, lambda _: None)


def _two_gateways(layout: Layout) -> list[Program]:
    """Return the programs of two gateways that share the forward port. The second's metrics are on another base."""
    command = [sys.executable, "-m", "headrace.cli.main", "ingest", "--share-port", "--port"]
    command.append(str(layout.port("forward")))
    second = ["--name", SECOND, "--port-base", str(_second_base(layout))]
    return [Program("ingest", [*command, "--name", "ingest-1"]), Program(SECOND, [*command, *second])]


def _second_worker(layout: Layout) -> Program:
    """Return a second stream worker of the same group, with local state and metrics of its own."""
    own = ["--home", str(layout.home / SECOND_WORKER), "--port-base", str(_second_base(layout))]
    return Program(SECOND_WORKER, [sys.executable, "-m", "headrace.cli.main", "stream", *own])


def _second_base(layout: Layout) -> int:
    return (layout.port_base or 0) + len(PORTS)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.rmdir()


def free_base() -> int:
    """Return a PORT_BASE with twice as many free ports as a stack has; below 32768, where the kernel takes its own."""
    span = 2 * len(PORTS)
    for base in range(26_000 + os.getpid() % 50 * span, 32_700 - span, span):
        if all(free_port(number) for number in range(base, base + span)):
            return base
    raise Unavailable(f"no {span} free ports in a row below 32700; give PORT_BASE=.")


def run(layout: Layout, project: Project, config: Config, kills: Sequence[Kill], account: Account, say: Say) -> Account:
    """Load the stack, kill, wait for quiet, and fill `account`."""
    load = Load(project, layout.port("forward"), layout.home / "spool", account.rate, account.seed)
    begin = time.monotonic()
    load.start()
    try:
        kill_all(layout, kills, load, say)
        time.sleep(1.0)
    finally:
        load.stop()
    account.seconds = round(time.monotonic() - begin, 1)
    account.rate_held = round(load.count / account.seconds, 1)
    await_ready(layout)
    if not load.settled(QUIET_S):
        say(f"{load.unacked} events still have no ack after {QUIET_S:.0f} s")
    say(f"quiet: every shipper has its acks after {time.monotonic() - begin - account.seconds:.1f} s more")
    reader = KafkaReader(layout.brokers)
    count(reader, Topics(config.log.generation), project, load, account)
    reader.close()
    return account


def kill_all(layout: Layout, kills: Sequence[Kill], load: Load, say: Say) -> None:
    """Carry the plan out, a line a kill."""
    supervisor = Supervisor(layout)
    for number, kill in enumerate(kills, 1):
        if kill.when_ready:
            await_ready(layout)
        time.sleep(kill.after_s)
        until = time.monotonic() + READY_S
        while not kill.pid:
            kill.pid = supervisor.pids().get(kill.process, 0)
            if not kill.pid and time.monotonic() > until:
                raise Unavailable(f"{kill.process} did not start again in {READY_S:.0f} s; see {layout.logs}.")
            time.sleep(0 if kill.pid else 0.05)
        try:
            os.kill(kill.pid, signal.SIGKILL)
        except ProcessLookupError:
            say(f"kill {number}: {kill.process} {kill.pid} was gone already")
        when = "at work" if kill.when_ready else "as it starts"
        say(
            f"kill {number:>2} of {len(kills)}: {kill.process} (pid {kill.pid}, {when}, after {kill.after_s:.1f} s); "
            f"{load.count:,} emitted, {load.unacked:,} without ack"
        )


def await_ready(layout: Layout) -> None:
    """Return when the broker and all stages that run here say that they are ready."""
    probes = readiness.stage_probes(layout)
    others = readiness.stage_probes(replace(layout, port_base=_second_base(layout)))
    probes |= {SECOND: others["ingest"], SECOND_WORKER: others["stream"]}
    asked = [probes[p.name] for p in Supervisor(layout).processes() if p.name in probes]
    until = time.monotonic() + READY_S
    while reasons := [reason for ask in asked if (reason := ask())]:
        if time.monotonic() > until:
            raise Unavailable(f"not ready again after {READY_S:.0f} s: {'; '.join(reasons)}; see {layout.logs}.")
        time.sleep(0.05)
    if layout.own_kafka and (trouble := readiness.kafka_trouble(layout.brokers, READY_S)):
        raise Unavailable(trouble)
    while layout.own_hdfs and (trouble := readiness.hdfs_trouble(layout)):
        if time.monotonic() > until:
            raise Unavailable(f"not ready again after {READY_S:.0f} s: {trouble}; see {layout.logs}.")


def count(reader: Reader, topics: Topics, project: Project, load: Emitted, account: Account) -> None:
    """Read the log and fill what it says."""
    found: Counter[tuple[str, str]] = Counter()
    ids: set[tuple[int, str, str]] = set()
    said: list[Punctuation] = []
    rows = 0
    for record in read_range(reader, topics.events):
        kind = record.headers.get("kind", "")
        if record.value is not None and kind == PUNCTUATION:
            said.append(decode_punctuation(record.value))
        elif record.value is not None and kind in (IMPRESSION, FEEDBACK):
            batch = decode_batch(record.value)
            kind = record.headers.get("type", kind)
            rows += batch.num_rows
            for event_id, request in zip(batch["event_id"].to_pylist(), batch["request_id"].to_pylist(), strict=True):
                if (record.partition, kind, event_id) in ids:
                    account.repeated_in_log += 1
                else:
                    ids.add((record.partition, kind, event_id))
                    found[kind, request] += 1
    letters = [decode_dead_letter(r.value) for r in read_range(reader, topics.dead_letters) if r.value is not None]
    ledger = Ledger()
    tags = {project.impression.tag, *(feedback.tag for feedback in project.feedback)}
    draw_gateways(ledger, rows, sum(letter.tag in tags for letter in letters), said)
    account.read, account.appended = ledger.read, ledger.appended
    account.dead_lettered, account.repeated = ledger.dead_lettered, ledger.repeated
    account.emitted, account.emitted_again, account.emitted_bad = len(load.good), load.again, len(load.bad)
    account.lost = sum(found[name] == 0 for name in load.good)
    account.twice = sum(max(0, times - 1) for times in found.values())
    account.made_up = sum(name not in load.good for name in found)
    account.bad_lost = len(load.bad - {letter.event_id for letter in letters})
    account.closes = (
        account.lost == account.twice == account.made_up == account.bad_lost == ledger.lost_where["log"] == 0
        and account.read == account.appended + account.dead_lettered + account.repeated
        and account.appended == account.emitted + account.repeated_in_log
    )
