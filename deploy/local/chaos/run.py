"""One run of chaos: a stack under load, its processes killed at points drawn from a seed, then each id counted.

1. Start Kafka and the stages that are needed, in a folder and on ports of their own, and wait until they are ready.
2. Load: half of the events through `headrace.sender`, half as raw forward chunks that a shipper sends again under their
   ids until they are acked; among them events sent twice on purpose and events that no schema allows.
3. Where the crawler is killed, a site of chaos's own (`crawl_run`) serves the sources that the project declares.
4. Kill -9, a random named process after a random time, soon after its start or while it works; supervisord restarts it.
   With `all`: every process, freezes, servers taken away and a full disk (`faults`, `strikes`).
5. Stop the load, wait until every shipper has its acks.
6. Read the log and the dead letters from the first record, drop repeated ids as the stream does, and compare what is
   left with what was emitted.
7. Where a stage after the gateway ran, wait until nothing moves, then draw the ledger down to the lake, count every
   crawled version and count every aggregate again. With `all`, replay and compare digests (`whole`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.log.kafka import KafkaReader
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.contract.project import Project
from headrace.deploy.local.chaos.account import Account, all_there, closes, wrong
from headrace.deploy.local.chaos.crawl_run import CrawlRun, lake_of
from headrace.deploy.local.chaos.kills import QUIET_S, kill_all, load_and_break
from headrace.deploy.local.chaos.load import Load
from headrace.deploy.local.chaos.own_stack import READY_S, Say, own_stack
from headrace.deploy.local.chaos.plan import ALL, needed
from headrace.deploy.local.chaos.small_disk import SmallDisk, mounted
from headrace.deploy.local.chaos.strikes import Strikes
from headrace.deploy.local.chaos.whole import Backlog, await_steady, await_still, broker_is_settled, model_account
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor
from headrace.process.awake import awake_s
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.settled import SettledCounts, check_settled
from headrace.replay.ledger.take_stock import take_stock

DRAINED_S = 120.0
WHOLE_READY_S = 300.0
"""A trainer that is killed in the middle of its recovery begins it again, behind all the others that start."""
VALUES_ON_THEIR_WAY_MS = 10_000
"""Punctuation that is younger than this when the account is drawn may have values that are not written yet."""


@dataclass(frozen=True, kw_only=True)
class ChaosRun:
    """What one run is given."""

    project_dir: Path
    project: Project
    config: Config
    gateways: int
    """Processes that share the forward port."""
    port_base: int | None
    """Where the ports begin; None looks for free ones."""
    say: Say

    def run(self, account: Account) -> None:
        """Break things as `account` plans, and fill it. Raises `InvariantBroken` when it does not close.

        The stack's folder stays when an error leaves this function, with logs and data.
        """
        stages, is_whole = account.stages, ALL in account.stages
        fills = any(fault.kind == "fill" for fault in account.faults)
        is_crawled = "crawl" in stages or (is_whole and bool(self.project.crawls))
        with (
            mounted(wanted=fills, say=self.say) as disk,
            CrawlRun.of(self.project, account.seed, wanted=is_crawled) as crawl,
        ):
            stack = own_stack(
                self.project_dir,
                self.config,
                stages,
                self.say,
                gateways=self.gateways,
                base=self.port_base,
                more=crawl.programs() if crawl else (),
                home=disk.mount / "home" if disk else None,
            )
            with stack as layout:
                self._break(layout, account, disk)
                if crawl:
                    account.crawl = crawl.settled(layout, QUIET_S, self.say)
                if is_whole:
                    await_steady(layout, self.say)
                if is_whole and not await_still(layout, self.config, self.say):
                    self.say("samples, lake and steps never stood still; drawing the account as they are")
                if set(stages) - {"ingest", "kafka"}:
                    account.ledger = self._drained(layout, account)
                if is_whole:
                    account.model = model_account(layout, self.project, self.config, self.say)
                if crawl and account.crawl is not None:
                    crawl.count(layout, self.config, account.crawl, QUIET_S)
                if "aggregate" in needed(stages):
                    account.settled = self._settled(layout)
                account.closes = closes(account)
                if not account.closes:
                    raise InvariantBroken("; ".join(["the account does not close", *wrong(account)]))

    def _break(self, layout: Layout, account: Account, disk: SmallDisk | None) -> None:
        """Load and break; then wait for the acks and count the ids."""

        def kill(load: Load) -> None:
            kill_all(layout, account, load, self.say)

        def strike(load: Load) -> None:
            with Backlog(layout, load, self.say) as backlog:
                strikes = Strikes(Supervisor(layout), disk, self.say, is_settled=lambda: broker_is_settled(layout))
                strikes.run(account.faults, backlog.told)

        breaks, ready_s = (strike, WHOLE_READY_S) if ALL in account.stages else (kill, READY_S)
        load_and_break(layout, self.project, self.config, account, self.say, breaks=breaks, ready_s=ready_s)

    def _drained(self, layout: Layout, account: Account) -> Ledger:
        """Return the whole ledger once nothing moves any more, or after `DRAINED_S`."""
        until = awake_s() + DRAINED_S
        while True:
            self._await_rest(layout, until)
            self.say("samples and lake stand still; drawing the ledger")
            ledger = take_stock(
                self.project,
                self.config,
                Topics(self.config.log.generation),
                KafkaReader(layout.brokers),
                lake_of(layout, self.config),
            )
            if all_there(ledger, account.stages) or awake_s() > until:
                return ledger
            self.say(
                f"draining: {ledger.waiting:,} wait for feedback, {ledger.samples:,} samples, {ledger.stored:,} stored"
            )

    def _await_rest(self, layout: Layout, until: float) -> None:
        """Return when neither `samples` nor the lake grew while the sink had time for two commits, or at `until`."""
        topics, reader, before = Topics(self.config.log.generation), KafkaReader(layout.brokers), ""
        while awake_s() < until:
            state = lake_of(layout, self.config).state()
            now = f"{reader.end_offsets(topics.samples)} {state.version if state else -1}"
            if now == before:
                break
            before = now
            time.sleep(2 * self.config.sink.commit_ms / 1000 + 2.0)
        reader.close()

    def _settled(self, layout: Layout) -> SettledCounts:
        """Return what a second count of every aggregate finds."""
        self.say("counting every aggregate again")
        reader = KafkaReader(layout.brokers)
        now_ms = time.time_ns() // 1_000_000
        events = read_range(reader, Topics(self.config.log.generation).events)
        counts = check_settled(self.project, self.config, events, upto_ms=now_ms - VALUES_ON_THEIR_WAY_MS)
        reader.close()
        return counts
