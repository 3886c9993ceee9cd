"""The crawl stage: the spider and the sender of its outbox on one asyncio loop, which Twisted shares.

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
from headrace.contract.interfaces.frontier import Found
from headrace.ingest.crawl.answers import Answers, body_name
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.extract import Document, extract
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.ingest.crawl.politeness import host_settings
from headrace.ingest.crawl.scheduler import Scheduler
from headrace.ingest.crawl.spider import CrawlSpider, Shutdown

log = logging.getLogger("headrace.crawl")

_DRAIN_S = 3.0
"""Longest wait for receipts at the end; what has none is sent again by the next start."""
_SPIDER_STOP_S = 1.0


def scrapy_settings(crawls: Sequence[Crawl], config: CrawlConfig) -> dict[str, Any]:
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
            f"{own}.AllowedHosts": 50,
            f"{own}.RobotsTxt": 100,
        },
        "EXTENSIONS": {
            "scrapy.extensions.throttle.AutoThrottle": None,
            "scrapy.extensions.logstats.LogStats": None,
            f"{own}.Throttle": 0,
        },
    }


class CrawlStage:
    """One crawler process; `run` may be called once in a process, since Twisted's reactor runs once."""

    def __init__(self, deps: CrawlDependencies) -> None:
        self._deps = deps
        epoch = deps.frontier.next_epoch(deps.clock.now_ms())
        self._sender = OutboxSender(deps.frontier, deps.producer, deps.topics, deps.partitions, deps.metrics, epoch)
        for crawl in deps.crawls:
            starts = [Found(url) for url in crawl.start] + [Found(url, sitemap=True) for url in crawl.sitemaps]
            deps.frontier.set_starts(crawl.name, starts)

    def run(self, stop: threading.Event, ready: Callable[[bool], None], *, once: bool = False) -> None:
        """Crawl until `stop`, or with `once` until nothing is due; raise what ended it otherwise."""
        _run_on_reactor(self._crawl(stop, ready, once))

    def extract_again(self) -> int:
        """Extract every stored body once more, send the versions that change, return how many did."""
        deps, changed = self._deps, 0
        for crawl in deps.crawls:
            for body in deps.frontier.newest_bodies(crawl.name):
                packed = deps.bodies.get(body_name(body.digest))
                try:
                    plain = gzip.decompress(packed or b"")
                except (OSError, EOFError, zlib.error):
                    plain = b""
                if not plain:
                    log.warning("%s: its body %s is not in the store", body.url, body.digest)
                    continue
                found = extract(Document(body.base, plain, body.content_type, body.sitemap), crawl)
                rows = [(row.key, row.version, row.values) for row in found.rows]
                changed += deps.frontier.extracted_again(body, rows, deps.clock.now_ms(), crawl.keys_max)
        stopping = asyncio.Event()
        stopping.set()
        asyncio.run(self._sender.run(stopping))
        if self._sender.failure is not None:
            raise self._sender.failure
        return changed

    async def _crawl(self, stop: threading.Event, ready: Callable[[bool], None], once: bool) -> None:
        deps, shutdown = self._deps, Shutdown()
        crawled = asyncio.Event()
        sending = asyncio.ensure_future(self._sender.run(crawled))
        runner = AsyncCrawlerRunner(scrapy_settings(deps.crawls, deps.config))
        crawling = asyncio.ensure_future(
            runner.crawl(
                CrawlSpider,
                deps=deps,
                scheduler=Scheduler(deps, once=once),
                answers=Answers(deps),
                shutdown=shutdown,
            )
        )
        ready(True)
        while not crawling.done():
            if stop.is_set() or self._sender.failure is not None:
                shutdown.asked.set()
            if shutdown.asked.is_set():
                # Answers on their way are not waited for: their addresses stay due.
                await asyncio.wait([asyncio.ensure_future(runner.stop())], timeout=_SPIDER_STOP_S)
                break
            await asyncio.sleep(0.05)
        crawled.set()
        await asyncio.wait([sending], timeout=None if once else _DRAIN_S)
        for failure in (self._sender.failure, shutdown.failure, _failure_of(crawling), _failure_of(sending)):
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
