"""What becomes of an answer: step 2 of `contract.interfaces.frontier`. Also of an address that gave none."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import logging
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import urldefrag
from weakref import WeakValueDictionary

from scrapy.exceptions import (
    CannotResolveHostError,
    DownloadCancelledError,
    DownloadConnectionRefusedError,
    DownloadTimeoutError,
    IgnoreRequest,
)
from scrapy.http import Response

from headrace.contract.interfaces.frontier import Body, Found, Page, Settled
from headrace.ingest.crawl.bounds_reached import BoundsReached
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.extract import Document
from headrace.ingest.crawl.politeness import NO_ADDRESS, REFUSED, UNREADABLE, Forbidden, HostsAway, OffHost, Unreadable
from headrace.ingest.crawl.refusals import KILLED, STALLED, Refusals, unread
from headrace.ingest.crawl.scrapy_run import Torn
from headrace.process.waits import Waits

log = logging.getLogger("headrace.crawl")

_HOST_WAIT_MAX_MS = 86_400_000
"""Longest wait that a Retry-After may ask for. One day."""
_GONE_DOUBLED_MAX = 8
"""How often the pause until a page that is gone is asked for again doubles: from an hour to 11 days."""
_COUNTED = frozenset({401, 403, 429, 500, 502, 503, 504})
"""Statuses that are counted by themselves; others by their class."""


class Answers:
    """Notes in the frontier what answers bring, and stores their bodies."""

    def __init__(self, deps: CrawlDependencies, waits: Waits) -> None:
        self._waits = waits
        self._crawls = {crawl.name: crawl for crawl in deps.crawls}
        self._config, self._frontier, self._bodies = deps.config, deps.frontier, deps.bodies
        self._metrics, self._clock = deps.metrics, deps.clock
        self.bounds, self.refusals = BoundsReached(deps), Refusals(deps)
        self.noted = asyncio.Event()
        """Set when an answer was noted: it may have brought something for the outbox."""
        self._hosts_away = HostsAway(self._config)
        self._of_body: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By digest: a body that one page leaves may be another's, which comes while it is deleted."""

    async def take(self, page: Page, response: Response, seconds: float) -> None:
        """Settle an answer that took `seconds`."""
        try:
            await self._take(page, response, seconds)
        finally:
            self.noted.set()

    async def _take(self, page: Page, response: Response, seconds: float) -> None:
        status = response.status
        crawl, now_ms = self._crawls[page.source], self._clock.now_ms()
        self._hosts_away.answered(page.host)
        self._metrics.observe("page_seconds", seconds)
        self._metrics.add("body_bytes_total", len(response.body))
        # Who answers 304 unasked has said nothing: the page is not known.
        if status == 304 and (page.etag or page.last_modified):
            self._frontier.not_modified(page, now_ms + crawl.every_ms)
            self._count("not_modified")
        elif status in {404, 410}:
            pause_ms = crawl.every_ms << min(page.gone, _GONE_DOUBLED_MAX)
            unneeded = self._frontier.gone(page, now_ms, now_ms + pause_ms)
            self._count("gone")
            await self._delete(unneeded)
        elif status == 200:
            await self._take_body(page, response, now_ms)
        else:
            if status in {429, 503}:
                wait_ms = _retry_after_ms(response, now_ms) or self._back_off_ms(page)
                self._frontier.wait_for(page.host, now_ms + min(wait_ms, _HOST_WAIT_MAX_MS))
            # What is refused today is refused in a second too; only what the server calls its own fault is not.
            is_passing = status >= 500 or status == 429
            wait_ms = self._back_off_ms(page) if is_passing else max(crawl.every_ms, self._back_off_ms(page))
            self._frontier.failed(page, now_ms + wait_ms)
            self._count(f"status_{status}" if status in _COUNTED else f"status_{status // 100}xx")

    def take_failure(self, page: Page, error: BaseException) -> None:
        """Settle an address that gave no answer."""
        crawl, now_ms = self._crawls[page.source], self._clock.now_ms()
        reason, is_passing = _reason_of(error)
        wait_ms = self._back_off_ms(page) if is_passing else crawl.every_ms
        self._frontier.failed(page, now_ms + wait_ms)
        host_wait_ms = self._hosts_away.failed(page.host, reason, now_ms)
        if host_wait_ms:
            self._frontier.wait_for(page.host, now_ms + host_wait_ms)
        self._count(reason)
        log.log(
            logging.WARNING if reason in ("failed", NO_ADDRESS, REFUSED) else logging.INFO,
            "%s: %s: %s",
            page.url,
            reason,
            str(error) or repr(error),
        )

    async def _take_body(self, page: Page, response: Response, now_ms: int) -> None:
        crawl = self._crawls[page.source]
        content_type = (response.headers.get("Content-Type") or b"").decode("latin-1")
        document = Document(response.url, response.body, content_type, page.sitemap)
        found, refused = await self.refusals.extract(document, crawl, page.refused, page.failures)
        reason = unread(found)
        for left_out, count in found.left_out.items():
            self._metrics.add("left_out_total", count, reason=left_out)
        if found.left_out["wrong_type"]:
            self._frontier.failed(page, now_ms + crawl.every_ms)
            self._count("wrong_type")
            return
        if reason in (KILLED, STALLED) and not refused:
            self._frontier.failed(page, now_ms + self._back_off_ms(page))
            self._count(reason)
            return
        digest = hashlib.sha256(response.body).hexdigest()
        async with self._of_body.setdefault(digest, asyncio.Lock()):
            if not self._frontier.has_body(digest):
                self._frontier.may_be_stored(digest)
                await self._waits.call(
                    f"write of {body_name(digest)}", partial(self._put, body_name(digest), response.body)
                )
            # With the validators of what could not be read, the next answer would be 304, and so for ever.
            settled = Settled(
                at_ms=now_ms,
                due_ms=now_ms + crawl.every_ms,
                etag="" if reason else _header(response, "ETag"),
                last_modified="" if reason else _header(response, "Last-Modified"),
                rows=[(row.key, row.version, row.values) for row in found.rows],
                links=[Found(link.url, link.sitemap, link.last_modified) for link in found.links],
                body=Body(digest, response.url, content_type),
                moved_to=_moved_to(response),
                refused=refused,
            )
            noted = self._frontier.settle(
                page, settled, pages_max=crawl.pages_max, keys_max=crawl.keys_max, depth_max=crawl.depth_max
            )
        if reason == "too_deep":
            log.warning("%s: too_deep: nobody knows what lies below; the page keeps the values that it had", page.url)
        self._count(reason or "taken")
        self.bounds.note(crawl, noted)
        await self._delete(noted.unneeded)

    async def delete_left(self) -> None:
        """Delete the bodies that nothing needs and that a process before this one did not come to delete."""
        await self._delete(self._frontier.unneeded(), may_return=True)

    async def _delete(self, digests: list[str], *, may_return: bool = False) -> None:
        for old in digests:
            async with self._of_body.setdefault(old, asyncio.Lock()):
                if not self._frontier.has_body(old):
                    await self._waits.call(f"delete of {body_name(old)}", partial(self._bodies.delete, body_name(old)))
                    self._frontier.deleted(old, may_return=may_return)

    def _put(self, name: str, body: bytes) -> None:
        self._bodies.put(name, gzip.compress(body, 6, mtime=0))

    def _back_off_ms(self, page: Page) -> int:
        return min(self._config.retry_max_ms, self._config.retry_first_ms << min(page.failures, 20))

    def _count(self, outcome: str) -> None:
        self._metrics.add("pages_total", outcome=outcome)


def body_name(digest: str) -> str:
    """Return the blob of a body.

    >>> body_name("ab12")
    'crawl/bodies/ab/ab12.gz'
    """
    return f"crawl/bodies/{digest[:2]}/{digest}.gz"


def _header(response: Response, name: str) -> str:
    return (response.headers.get(name) or b"").decode("latin-1")[:1_024]


def _moved_to(response: Response) -> str:
    """Return where redirects led that are all permanent; empty where none led anywhere, or one is not."""
    reasons = response.meta.get("redirect_reasons") or []
    is_moved = bool(reasons) and all(reason in {301, 308} for reason in reasons)
    return urldefrag(response.url)[0] if is_moved else ""


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
        return UNREADABLE, True
    if isinstance(error, Torn):
        return "torn", True
    if isinstance(error, OffHost):
        return "off_host", False
    if isinstance(error, DownloadTimeoutError):
        return "timeout", True
    if isinstance(error, CannotResolveHostError):
        return NO_ADDRESS, True
    if isinstance(error, DownloadConnectionRefusedError):
        return REFUSED, True
    if isinstance(error, DownloadCancelledError):
        return "too_large", False
    if isinstance(error, IgnoreRequest):
        # Scrapy tells its two refusals apart by words only: too many redirects, and bodies that swell beyond the bound.
        return ("redirects" if "redirect" in str(error) else "too_large"), False
    return "failed", True
