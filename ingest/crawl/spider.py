"""The spider: asks for what is due and hands on what comes, one for all sources, as long as the process lives.

Scrapy does what it does well: connections, robots.txt, delays, redirects, decompression, bounds of size and time. What
must outlive the process is not Scrapy's: which addresses there are, when each is due, back-off and validators lie
in the frontier. So Scrapy's own retries, filter and queue on disk are off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import scrapy
from scrapy.http import Request, Response
from twisted.python.failure import Failure

from headrace.contract.interfaces.frontier import Page
from headrace.ingest.crawl.answers import Answers
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.scheduler import Scheduler
from headrace.process.woken import woken


class Shutdown:
    """Tells the spider to end, and the stage what went wrong where something did."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """End because of an error: Scrapy would log what it meets in a spider, and go on."""
        self.failure = self.failure or error
        self.asked.set()


class CrawlSpider(scrapy.Spider):
    """Gives Scrapy requests for what the scheduler chooses, and `Answers` what comes of them."""

    name = "headrace"

    def __init__(
        self, deps: CrawlDependencies, scheduler: Scheduler, answers: Answers, shutdown: Shutdown, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._crawls = {crawl.name: crawl for crawl in deps.crawls}
        self._clock = deps.clock
        self._scheduler, self._answers, self._shutdown = scheduler, answers, shutdown

    async def start(self) -> AsyncIterator[Request]:
        """Yield requests until told to stop, or a single run is over."""
        scheduler = self._scheduler
        try:
            while not self._shutdown.asked.is_set() and not scheduler.is_done():
                scheduler.set_gauges()
                scheduler.freed.clear()
                for page in scheduler.choose():
                    yield self._request(page)
                await woken(scheduler.freed, scheduler.rest_s())
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            self._shutdown.fail(error)

    def _request(self, page: Page) -> Request:
        crawl = self._crawls[page.source]
        headers = {"If-None-Match": page.etag, "If-Modified-Since": page.last_modified}
        if crawl.kind == "json" and not page.sitemap:
            headers["Accept"] = "application/json"
        return Request(
            page.url,
            headers={name: value for name, value in headers.items() if value},
            callback=partial(self._answered, page, self._clock.monotonic()),
            errback=partial(self._failed, page),
            dont_filter=True,
            meta={
                "places": crawl.places(),
                "download_timeout": crawl.timeout_ms / 1000,
                "download_maxsize": crawl.bytes_max,
                "download_warnsize": 0,
            },
        )

    async def _answered(self, page: Page, began_s: float, response: Response) -> None:
        latency_s = response.meta.get("download_latency")
        try:
            await self._answers.take(page, response, latency_s or self._clock.monotonic() - began_s)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # The store or the disk: nothing was noted, so the address is due again after the restart.
            self._shutdown.fail(error)
        finally:
            self._scheduler.settled(page)

    async def _failed(self, page: Page, failure: Failure) -> None:
        try:
            self._answers.take_failure(page, failure.value or RuntimeError("no reason was given"))
        except BaseException as error:
            self._shutdown.fail(error)
        finally:
            self._scheduler.settled(page)
