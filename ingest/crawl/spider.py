"""The spider: asks for what is due and settles what comes, one for all sources, as long as the process lives.

Scrapy does what it does well: connections, robots.txt, delays, redirects, decompression, bounds of size and time. What
must outlive the process is not Scrapy's: which addresses there are, when each is due, back-off and validators lie
in the frontier. So Scrapy's own retries, filter and queue on disk are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import scrapy
from scrapy.exceptions import DownloadCancelledError, DownloadTimeoutError, IgnoreRequest
from scrapy.http import Request, Response
from twisted.python.failure import Failure

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.frontier import Body, Found, Frontier, Page, Settled
from headrace.contract.metrics import Metrics
from headrace.ingest.crawl.extract import Document, extract
from headrace.ingest.crawl.politeness import Forbidden, OffHost, Unreadable

log = logging.getLogger("headrace.crawl")

_IDLE_S = 0.1
_HOST_WAIT_MAX_MS = 86_400_000
"""Longest wait that a Retry-After may ask for. One day."""
_TELL_S = 1.0


class Desk:
    """What the spider works with; `once`: end when nothing is left that was due at the start."""

    def __init__(
        self,
        crawls: Mapping[str, Crawl],
        config: CrawlConfig,
        frontier: Frontier,
        bodies: Blobs,
        metrics: Metrics,
        clock: Clock,
        *,
        once: bool,
    ) -> None:
        self.crawls, self.config, self.frontier, self.bodies = crawls, config, frontier, bodies
        self.metrics, self.clock, self.once = metrics, clock, once
        self.stopping = asyncio.Event()
        self.failure: Exception | None = None
        self.in_flight: dict[tuple[str, str], str] = {}
        """(source, address) to host, of what was asked for and is not settled."""
        self._until_ms = clock.now_ms() if once else None
        self._in_hand = Counter[str]()
        self._tell_s = 0.0
        self.freed = asyncio.Event()
        """Set when a request is settled: there may be room for the next."""

    def done_with(self, page: Page) -> None:
        """Note that a request is settled, well or not."""
        self.in_flight.pop((page.source, page.url), None)
        self.freed.set()

    def more(self) -> list[Page]:
        """Return addresses to ask for now: due, within the bounds, and not asked for already."""
        room = self.config.requests_max - len(self.in_flight)
        if room <= 0 or self.frontier.waiting() >= self.config.outbox_max:
            return []
        loads = Counter(self.in_flight.values())
        limits = {host: 2 * crawl.parallel for crawl in self.crawls.values() for host in crawl.all_hosts()}
        busy = [host for host, load in loads.items() if load >= limits.get(host, 2)]
        limit = room + len(self.in_flight)
        chosen: list[Page] = []
        for page in self.frontier.due(self._due_ms(), list(self.crawls), busy, limit):
            if (page.source, page.url) in self.in_flight or loads[page.host] >= limits.get(page.host, 2):
                continue
            loads[page.host] += 1
            self.in_flight[page.source, page.url] = page.host
            chosen.append(page)
            if len(chosen) == room:
                break
        return chosen

    def is_done(self) -> bool:
        """Say whether a run that ends by itself has nothing left that is due."""
        if not self.once or self.in_flight:
            return False
        next_ms = self.frontier.next_due_ms(list(self.crawls))
        return next_ms is None or next_ms > self._due_ms()

    def _due_ms(self) -> int:
        """Return up to when an address is due: a run that ends by itself asks for each at most once."""
        return self.clock.now_ms() if self._until_ms is None else self._until_ms

    def tell(self) -> None:
        """Set the gauges, once a second."""
        now_s = self.clock.monotonic()
        if now_s >= self._tell_s:
            self._tell_s = now_s + _TELL_S
            for name in self.crawls:
                self.metrics.set("pages_known", self.frontier.pages(name), reason=name)

    async def take(self, page: Page, response: Response, seconds: float) -> None:
        """Settle an answer; step 2 of `contract.interfaces.frontier`."""
        status = response.status
        crawl, now_ms = self.crawls[page.source], self.clock.now_ms()
        self.metrics.observe("page_seconds", seconds)
        self.metrics.add("body_bytes_total", len(response.body))
        if status == 304:
            self.frontier.not_modified(page, now_ms + crawl.every_ms)
            self._count("not_modified")
        elif status in {404, 410}:
            self.frontier.gone(page, now_ms, now_ms + crawl.every_ms)
            self._count("gone")
        elif status == 200:
            await self._take_body(page, response, now_ms)
        else:
            if status in {429, 503}:
                wait_ms = _retry_after_ms(response, now_ms) or self._back_off_ms(page)
                self.frontier.wait_for(page.host, now_ms + min(wait_ms, _HOST_WAIT_MAX_MS))
            # What is refused today is refused in a second too; only what the server calls its own fault is not.
            is_passing = status >= 500 or status == 429
            wait_ms = self._back_off_ms(page) if is_passing else max(crawl.every_ms, self._back_off_ms(page))
            self.frontier.failed(page, now_ms + wait_ms)
            self._count(f"status_{status}" if status in _COUNTED else f"status_{status // 100}xx")

    def refuse(self, page: Page, error: BaseException) -> None:
        """Settle an address that gave no answer."""
        crawl, now_ms = self.crawls[page.source], self.clock.now_ms()
        reason, is_passing = _reason_of(error)
        wait_ms = self._back_off_ms(page) if is_passing else crawl.every_ms
        self.frontier.failed(page, now_ms + wait_ms)
        self._count(reason)
        log.log(logging.INFO if reason != "failed" else logging.WARNING, "%s: %s: %s", page.url, reason, error)

    async def _take_body(self, page: Page, response: Response, now_ms: int) -> None:
        crawl = self.crawls[page.source]
        content_type = (response.headers.get("Content-Type") or b"").decode("latin-1")
        document = Document(response.url, response.body, content_type, page.sitemap)
        # A body of megabytes takes a second: the loop goes on meanwhile.
        found = await asyncio.to_thread(extract, document, crawl)
        for reason, count in found.left_out.items():
            self.metrics.add("left_out_total", count, reason=reason)
        if found.left_out["wrong_type"]:
            self.frontier.failed(page, now_ms + crawl.every_ms)
            self._count("wrong_type")
            return
        digest = hashlib.sha256(response.body).hexdigest()
        self._in_hand[digest] += 1
        try:
            if not self.frontier.has_body(digest):
                packed = await asyncio.to_thread(gzip.compress, response.body, 6, mtime=0)
                await asyncio.to_thread(self.bodies.put, body_name(digest), packed)
            settled = Settled(
                at_ms=now_ms,
                due_ms=now_ms + crawl.every_ms,
                etag=_header(response, "ETag"),
                last_modified=_header(response, "Last-Modified"),
                rows=[(row.key, row.version, row.values) for row in found.rows],
                links=[Found(link.url, link.sitemap, link.last_modified) for link in found.links],
                body=Body(digest, response.url, content_type),
            )
            unneeded = self.frontier.settle(
                page, settled, pages_max=crawl.pages_max, keys_max=crawl.keys_max, depth_max=crawl.depth_max
            )
        finally:
            self._in_hand[digest] -= 1
        self._count("broken" if found.left_out["broken"] else "taken")
        for old in unneeded:
            if not self._in_hand[old]:
                await asyncio.to_thread(self.bodies.delete, body_name(old))

    def _back_off_ms(self, page: Page) -> int:
        return min(self.config.retry_max_ms, self.config.retry_first_ms << min(page.failures, 20))

    def _count(self, reason: str) -> None:
        self.metrics.add("pages_total", reason=reason)


class CrawlSpider(scrapy.Spider):
    """Gives Scrapy requests for what is due, and the desk what comes of them."""

    name = "headrace"

    def __init__(self, desk: Desk, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.desk = desk

    async def start(self) -> AsyncIterator[Request]:
        """Yield requests until told to stop, or a single run is over."""
        desk = self.desk
        while not desk.stopping.is_set() and not desk.is_done():
            desk.tell()
            pages = desk.more()
            for page in pages:
                yield self._request(page)
            desk.freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(desk.freed.wait(), _IDLE_S)

    def _request(self, page: Page) -> Request:
        crawl = self.desk.crawls[page.source]
        headers = {"If-None-Match": page.etag, "If-Modified-Since": page.last_modified}
        if crawl.kind == "json" and not page.sitemap:
            headers["Accept"] = "application/json"
        return Request(
            page.url,
            headers={name: value for name, value in headers.items() if value},
            callback=partial(self._settle, page, self.desk.clock.monotonic()),
            errback=partial(self._refuse, page),
            dont_filter=True,
            meta={
                "hosts": crawl.all_hosts(),
                "download_timeout": crawl.timeout_ms / 1000,
                "download_maxsize": crawl.bytes_max,
                "download_warnsize": 0,
            },
        )

    async def _settle(self, page: Page, began_s: float, response: Response) -> None:
        latency_s = response.meta.get("download_latency")
        try:
            await self.desk.take(page, response, latency_s or self.desk.clock.monotonic() - began_s)
        except Exception as error:
            # The store or the disk: nothing was noted, so the address is due again after the restart.
            self.desk.failure = error
            self.desk.stopping.set()
        finally:
            self.desk.done_with(page)

    async def _refuse(self, page: Page, failure: Failure) -> None:
        try:
            self.desk.refuse(page, failure.value or RuntimeError("no reason was given"))
        finally:
            self.desk.done_with(page)


_COUNTED = frozenset({401, 403, 429, 500, 502, 503, 504})


def body_name(digest: str) -> str:
    """Return the blob of a body.

    >>> body_name("ab12")
    'crawl/bodies/ab/ab12.gz'
    """
    return f"crawl/bodies/{digest[:2]}/{digest}.gz"


def _header(response: Response, name: str) -> str:
    return (response.headers.get(name) or b"").decode("latin-1")[:1_024]


def _retry_after_ms(response: Response, now_ms: int) -> int:
    """Return the wait that Retry-After asks for, in seconds or as a date; 0 where it says nothing."""
    text = _header(response, "Retry-After").strip()
    if text.isascii() and text.isdigit():
        return int(text[:9]) * 1_000
    try:
        return max(0, int(parsedate_to_datetime(text).timestamp() * 1_000) - now_ms)
    except (ValueError, TypeError, OverflowError):
        return 0


def _reason_of(error: BaseException) -> tuple[str, bool]:
    """Return what to count, and whether it may pass soon."""
    if isinstance(error, Forbidden):
        return "robots", False
    if isinstance(error, Unreadable):
        return "robots_unreadable", True
    if isinstance(error, OffHost):
        return "off_host", False
    if isinstance(error, DownloadTimeoutError):
        return "timeout", True
    if isinstance(error, DownloadCancelledError):
        return "too_large", False
    if isinstance(error, IgnoreRequest):
        # Scrapy tells its two refusals apart by words only: too many redirects, and bodies that swell beyond the bound.
        return ("redirects" if "redirect" in str(error) else "too_large"), False
    return "failed", True
