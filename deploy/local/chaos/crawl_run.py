"""The crawler's share of a run of chaos: the site that it asks, the process itself, and the account of both."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import msgspec

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.log.kafka import KafkaReader
from headrace.contract.config import Config
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.contract.project import Project
from headrace.deploy.local.chaos.changing_site import ChangingSite
from headrace.deploy.local.chaos.crawl_account import CrawlAccount, closes, count, count_stored, stored_columns
from headrace.deploy.local.chaos.own_stack import Say
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.metrics_text import parse
from headrace.deploy.local.readiness import http_get
from headrace.deploy.local.supervise import Program, Supervisor
from headrace.process.awake import awake_s


class CrawlRun:
    """The site that is crawled while the crawler is killed, and what came of it."""

    def __init__(self, project: Project, seed: int, sources: Path) -> None:
        joined = {crawl.name: project.impression.fields[crawl.joins] for crawl in project.crawls}
        self.site = ChangingSite(project.crawls, joined, seed)
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

    def settled(self, layout: Layout, quiet_s: float, say: Say) -> CrawlAccount:
        """Return the account with what is not settled once the site is at rest and the outbox empty."""
        account = CrawlAccount(unsettled=self.site.rest(quiet_s))
        until = awake_s() + quiet_s
        while awake_s() < until:
            status, body = http_get(f"http://{HOST}:{layout.port('metrics_crawl')}/metrics")
            if status == 200 and parse(body.decode()).get("headrace_crawl_outbox_rows") == 0:
                break
            time.sleep(0.2)
        say(f"the site rests, {account.unsettled} of {len(self.site.pages)} pages are not acknowledged as they are")
        return account

    def count(self, layout: Layout, config: Config, account: CrawlAccount, quiet_s: float) -> None:
        """Fill the account from log, `features`, lake and stored bodies, and say whether it closes."""
        topics, reader = Topics(config.log.generation), KafkaReader(layout.brokers)
        events, features = read_range(reader, topics.events), read_range(reader, topics.features)
        versions = count(self.site, events, features, config.log.partitions, account)
        reader.close()
        lake, crawls = lake_of(layout, config), list(self.site.crawls.values())
        state = lake.state()
        if state is not None:
            stored = lake.read(state.version, stored_columns(crawls))
            count_stored(crawls, stored, versions, account)
        Supervisor(layout).end(("crawl",))
        again = subprocess.run(
            [*self._command(), "--extract-again"],
            env=layout.environment(),
            capture_output=True,
            text=True,
            timeout=quiet_s,
            check=False,
        )
        changed, missing = again.stdout.partition(" ")[0], again.stderr.count("is not in the store")
        is_done = again.returncode == 0 and changed.isdigit()
        account.bodies_changed = int(changed) + missing if is_done else len(self.site.pages)
        account.closes = closes(account)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "headrace.cli.main", "crawl", "--sources", str(self._sources)]


def lake_of(layout: Layout, config: Config) -> DeltaLake:
    """Return the lake of a stack."""
    uri = f"{layout.store.removeprefix('file:')}/lake/samples"
    return DeltaLake(uri, generation=config.log.generation, partitions=config.log.partitions)
