"""The crawl stage: the spider and the sender of its outbox on one asyncio loop, which Twisted shares.

Also extraction of stored bodies again, which asks no site for anything.

Whatever fails, in the spider, in what becomes of an answer, in the sender, ends the stage: the frontier has what was
settled, and the next process goes on from there. So does what does not return: calls of the store run in threads with a
bound, and a watchdog looks whether the loop runs.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import threading
import zlib
from collections.abc import Awaitable, Callable
from functools import partial

from scrapy.crawler import AsyncCrawlerRunner

from headrace.contract.crawl import Crawl
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.frontier import Body, Found
from headrace.ingest.crawl.answers import Answers, body_name
from headrace.ingest.crawl.begin import begin
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.extract import Document
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.ingest.crawl.scheduler import Scheduler
from headrace.ingest.crawl.scrapy_run import run_on_reactor, scrapy_settings
from headrace.ingest.crawl.spider import CrawlSpider, Shutdown
from headrace.process.background import Background
from headrace.process.waits import Waits
from headrace.process.watchdog import Watchdog

log = logging.getLogger("headrace.crawl")

_DRAIN_S = 3.0
"""Longest wait for receipts at the end; what has none is sent again by the next start."""
_SPIDER_STOP_S = 1.0
_TICK_S = 0.25


class CrawlRun:
    """The parts of one crawler's process; `check` raises what any of them cannot deal with."""

    def __init__(self, deps: CrawlDependencies, watchdog: Watchdog, *, once: bool = False) -> None:
        self._deps, self._watchdog, self._once = deps, watchdog, once
        self.waits = Waits(deps.clock)
        self.background = Background()
        self.shutdown = Shutdown()
        self.scheduler = Scheduler(deps, once=once)
        self.answers = Answers(deps, self.waits)
        self._crawled = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None
        self._crawling: asyncio.Task[None] | None = None

    async def begin(self) -> OutboxSender:
        """Take an epoch and the declared starts; return who sends the outbox. Raises as `begin.begin`."""
        deps = self._deps
        epoch = await begin(
            deps.frontier,
            self.waits,
            open_reader=deps.open_reader,
            features=deps.topics.features,
            now_ms=deps.clock.now_ms(),
            begin_afresh=deps.begin_afresh,
        )
        for crawl in deps.crawls:
            starts = [Found(url) for url in crawl.start] + [Found(url, sitemap=True) for url in crawl.sitemaps]
            deps.frontier.set_starts(crawl.name, starts)
        return OutboxSender(deps.frontier, deps.producer, deps.topics, deps.partitions, deps.metrics, epoch, deps.clock)

    async def crawl(self, scrapy: Callable[[CrawlRun], Awaitable[None]]) -> None:
        """Begin, send and crawl until `scrapy` ends; then until the outbox is sent, unless the end was asked for."""
        sender = await self.begin()
        await self.answers.delete_left()
        self._sending = self.background.task(
            "the outbox's sender", sender.run(self._crawled, self.answers.noted, self.waits)
        )
        await scrapy(self)
        if not (self.shutdown.asked.is_set() or (self._once and self.scheduler.is_done())):
            raise Unavailable("Scrapy has ended the spider by itself. The stage stops; the next start makes a new one.")
        self._crawled.set()
        self.answers.noted.set()
        if self._once and not self.shutdown.asked.is_set():
            await self._sending

    async def tick(self) -> None:
        """Wait until it is time to `check` again."""
        if self._crawling is not None:
            await asyncio.wait([self._crawling], timeout=_TICK_S)

    def begin_crawl(self, scrapy: Callable[[CrawlRun], Awaitable[None]]) -> None:
        """Crawl in the background."""
        self._crawling = self.background.task("the crawl", self.crawl(scrapy))

    def begin_again(self, extracted: Callable[[int], None]) -> None:
        """Extract every stored body once more in the background; tell how many versions that changed."""
        self._crawling = self.background.task("the extraction", self._extract_again(extracted))

    def check(self) -> bool:
        """Say whether everything is done. Raises what failed, and `Unavailable` where something takes too long."""
        self._watchdog.beat()
        self.background.check()
        if self.shutdown.failure is not None:
            raise self.shutdown.failure
        self.waits.check()
        self.scheduler.check()
        return self._crawling is not None and self._crawling.done()

    async def finish(self) -> None:
        """End the spider, and wait a moment for receipts. Raises what failed."""
        self.shutdown.asked.set()
        self._crawled.set()
        self.answers.noted.set()
        left = [task for task in (self._crawling, self._sending) if task is not None]
        if left:
            await asyncio.wait(left, timeout=_DRAIN_S)
        self.check()

    async def _extract_again(self, extracted: Callable[[int], None]) -> None:
        deps, changed = self._deps, 0
        sender = await self.begin()
        for crawl in deps.crawls:
            for body in deps.frontier.newest_bodies(crawl.name):
                changed += await self._extract_one(crawl, body)
        self._crawled.set()
        await sender.run(self._crawled, self.answers.noted, self.waits)
        extracted(changed)

    async def _extract_one(self, crawl: Crawl, body: Body) -> int:
        name = body_name(body.digest)
        packed = await self.waits.call(f"read of {name}", partial(self._deps.bodies.get, name))
        try:
            plain = gzip.decompress(packed or b"")
        except (OSError, EOFError, zlib.error):
            plain = b""
        if not plain:
            log.warning("%s: its body %s is not in the store", body.url, body.digest)
            return 0
        document = Document(body.base, plain, body.content_type, body.sitemap)
        found, _ = await self.answers.refusals.extract(document, crawl, body.refused)
        rows = [(row.key, row.version, row.values) for row in found.rows]
        noted = self._deps.frontier.extracted_again(body, rows, self._deps.clock.now_ms(), crawl.keys_max)
        self.answers.bounds.note(crawl, noted)
        return noted.written


class CrawlStage:
    """One crawler process; `run` may be called once in a process, since Twisted's reactor runs once."""

    def __init__(self, deps: CrawlDependencies) -> None:
        self._deps = deps
        self._watchdog = Watchdog()

    def run(self, stop: threading.Event, ready: Callable[[bool], None], *, once: bool = False) -> None:
        """Crawl until `stop`, or with `once` until nothing is due; raise what ended it otherwise."""
        self._watchdog.start()
        run_on_reactor(self._crawl(stop, ready, once))
        # After a failure it stays: what does not end by itself then is ended.
        self._watchdog.stop()

    def extract_again(self) -> int:
        """Extract every stored body once more, send the versions that change, return how many did."""
        changed: list[int] = []

        async def work() -> None:
            run = CrawlRun(self._deps, self._watchdog)
            run.begin_again(changed.append)
            while not run.check():
                await run.tick()
            run.check()

        self._watchdog.start()
        asyncio.run(work())
        self._watchdog.stop()
        return changed[0]

    async def _crawl(self, stop: threading.Event, ready: Callable[[bool], None], once: bool) -> None:
        run = CrawlRun(self._deps, self._watchdog, once=once)
        runner = AsyncCrawlerRunner(scrapy_settings(self._deps.crawls, self._deps.config))

        async def scrapy(run: CrawlRun) -> None:
            ready(True)
            await runner.crawl(
                CrawlSpider,
                deps=self._deps,
                scheduler=run.scheduler,
                answers=run.answers,
                shutdown=run.shutdown,
            )

        run.begin_crawl(scrapy)
        try:
            while not run.check() and not stop.is_set():
                await run.tick()
        finally:
            run.shutdown.asked.set()
            # Answers on their way are not waited for: their addresses stay due.
            await asyncio.wait([asyncio.ensure_future(runner.stop())], timeout=_SPIDER_STOP_S)
        await run.finish()
