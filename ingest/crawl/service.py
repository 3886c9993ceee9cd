"""The crawl stage: one spider and one outbox on one asyncio loop, which Twisted shares.

Also extraction of stored bodies again, which asks no site for anything.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import threading
import zlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from scrapy.crawler import AsyncCrawlerRunner
from scrapy.utils.reactor import install_reactor

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.frontier import Found, Frontier
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.ingest.crawl.extract import Document, extract
from headrace.ingest.crawl.outbox import Outbox
from headrace.ingest.crawl.politeness import host_settings
from headrace.ingest.crawl.spider import CrawlSpider, Desk, body_name

log = logging.getLogger("headrace.crawl")

_DRAIN_S = 3.0
"""Longest wait for receipts at the end; what has none is sent again by the next start."""
_SPIDER_STOP_S = 1.0


def settings(crawls: Sequence[Crawl], config: CrawlConfig) -> dict[str, Any]:
    """Return Scrapy's settings: its politeness on, all that it would keep or try again by itself off."""
    hosts = host_settings(crawls)
    own = "headrace.ingest.crawl.politeness"
    return {
        "USER_AGENT": config.user_agent,
        "ROBOTSTXT_OBEY": True,
        "HEADRACE_ROBOTS_S": config.robots_ms / 1000,
        "HEADRACE_PARALLEL": {host: slot["concurrency"] for host, slot in hosts.items()},
        "DOWNLOAD_SLOTS": hosts,
        "CONCURRENT_REQUESTS": config.requests_max,
        "AUTOTHROTTLE_ENABLED": True,
        "AUTOTHROTTLE_START_DELAY": 0.0,
        "DOWNLOAD_MAXSIZE": 1_048_576,
        "DOWNLOAD_TIMEOUT": 20,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "DOWNLOAD_HANDLERS": {"data": None, "file": None, "ftp": None, "s3": None},
        "REDIRECT_MAX_TIMES": config.redirects_max,
        "METAREFRESH_ENABLED": False,
        "RETRY_ENABLED": False,
        "COOKIES_ENABLED": False,
        "REFERER_ENABLED": False,
        "HTTPERROR_ALLOW_ALL": True,
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,
        "LOG_ENABLED": False,
        "STATS_DUMP": False,
        "DOWNLOADER_MIDDLEWARES": {
            "scrapy.downloadermiddlewares.robotstxt.RobotsTxtMiddleware": None,
            "scrapy.downloadermiddlewares.offsite.OffsiteMiddleware": None,
            f"{own}.Fence": 50,
            f"{own}.Robots": 100,
        },
        "EXTENSIONS": {
            "scrapy.extensions.throttle.AutoThrottle": None,
            "scrapy.extensions.logstats.LogStats": None,
            f"{own}.Throttle": 0,
        },
    }


class Service:
    """One crawler process; `run` may be called once in a process, since Twisted's reactor runs once."""

    def __init__(
        self,
        crawls: Sequence[Crawl],
        config: CrawlConfig,
        topics: Topics,
        partitions: int,
        frontier: Frontier,
        bodies: Blobs,
        producer: Producer,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._crawls, self._config, self._frontier, self._bodies = crawls, config, frontier, bodies
        self._metrics, self._clock = metrics, clock
        epoch = frontier.next_epoch(clock.now_ms())
        self._outbox = Outbox(frontier, producer, topics, partitions, metrics, epoch)
        for crawl in crawls:
            starts = [Found(url) for url in crawl.start] + [Found(url, sitemap=True) for url in crawl.sitemaps]
            frontier.set_starts(crawl.name, starts)

    def run(self, stop: threading.Event, ready: Callable[[bool], None], *, once: bool = False) -> None:
        """Crawl until `stop`, or with `once` until nothing is due; raise what ended it otherwise."""
        _run_on_reactor(self._crawl(stop, ready, once))

    def extract_again(self) -> int:
        """Extract every stored body once more, send the versions that change, return how many did."""
        changed = 0
        for crawl in self._crawls:
            for body in self._frontier.newest_bodies(crawl.name):
                packed = self._bodies.get(body_name(body.digest))
                try:
                    plain = gzip.decompress(packed or b"")
                except (OSError, EOFError, zlib.error):
                    plain = b""
                if not plain:
                    log.warning("%s: its body %s is not in the store", body.url, body.digest)
                    continue
                found = extract(Document(body.base, plain, body.content_type, body.sitemap), crawl)
                rows = [(row.key, row.version, row.values) for row in found.rows]
                changed += self._frontier.extracted_again(body, rows, self._clock.now_ms(), crawl.keys_max)
        stopping = asyncio.Event()
        stopping.set()
        asyncio.run(self._outbox.run(stopping))
        if self._outbox.failure is not None:
            raise self._outbox.failure
        return changed

    async def _crawl(self, stop: threading.Event, ready: Callable[[bool], None], once: bool) -> None:
        crawls = {crawl.name: crawl for crawl in self._crawls}
        desk = Desk(crawls, self._config, self._frontier, self._bodies, self._metrics, self._clock, once=once)
        sent = asyncio.Event()
        sender = asyncio.ensure_future(self._outbox.run(sent))
        runner = AsyncCrawlerRunner(settings(self._crawls, self._config))
        crawling = asyncio.ensure_future(runner.crawl(CrawlSpider, desk=desk))
        ready(True)
        while not crawling.done():
            if stop.is_set() or self._outbox.failure is not None:
                desk.stopping.set()
            if desk.stopping.is_set():
                # Answers on their way are not waited for: their addresses stay due.
                await asyncio.wait([asyncio.ensure_future(runner.stop())], timeout=_SPIDER_STOP_S)
                break
            await asyncio.sleep(0.05)
        sent.set()
        await asyncio.wait([sender], timeout=None if once else _DRAIN_S)
        for failure in (self._outbox.failure, desk.failure, _failure_of(crawling), _failure_of(sender)):
            if failure is not None:
                raise failure


def _failure_of(task: asyncio.Future[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _run_on_reactor(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on Twisted's reactor over asyncio, and end it; raise what `work` raised."""
    install_reactor("twisted.internet.asyncioreactor.AsyncioSelectorReactor")
    from twisted.internet import reactor as installed

    reactor: Any = installed
    raised: list[BaseException] = []

    async def whole() -> None:
        try:
            await work
        except BaseException as error:
            raised.append(error)
        finally:
            reactor.stop()

    def begin() -> None:
        task = asyncio.ensure_future(whole())
        tasks.append(task)

    tasks: list[asyncio.Future[None]] = []
    reactor.callWhenRunning(begin)
    reactor.run(installSignalHandlers=False)
    if raised:
        raise raised[0]
