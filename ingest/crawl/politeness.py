"""What a site may ask of us, on top of Scrapy: robots.txt that is asked for again when it is old, a least delay for
each host, and no request to a host that a source does not name.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from math import inf
from typing import Any
from urllib.parse import urlsplit

from scrapy import signals
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import IgnoreRequest
from scrapy.extensions.throttle import AutoThrottle
from scrapy.http import Request, Response

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, is_within

DELAY_MAX_S = 3_600.0
"""Longest delay that a robots.txt may ask for; a longer one is taken as this."""


NO_ADDRESS, REFUSED, UNREADABLE = "no_address", "refused", "robots_unreadable"
"""Why nothing of a host can be had now: its name has no address, nobody listens there, its robots.txt cannot be had."""
_PAGES_MAX = 3
"""Pages of a host in a row that gave no answer for other reasons, as a timeout: then the host is away, not these."""


_OF_THE_PAGE = frozenset({"robots", "off_host", "redirects", "too_large", "torn"})
"""Failures that an answer of the host has brought."""


class Forbidden(IgnoreRequest):
    """robots.txt does not allow it."""


class Unreadable(IgnoreRequest):
    """robots.txt cannot be fetched; RFC 9309 then allows nothing."""


class OffHost(IgnoreRequest):
    """A redirect leads to a host that the source does not name."""


class HostsAway:
    """Hosts that give no answers: they are asked again after a while that doubles, not once for each of their pages."""

    def __init__(self, config: CrawlConfig) -> None:
        self._config = config
        self._held: dict[str, tuple[int, int]] = {}
        """Of a host that is away: how often in a row it was held, and until when, in ms."""
        self._failed: dict[str, int] = {}

    def answered(self, host: str) -> None:
        """Note an answer, whatever it says: the host is not away."""
        self._held.pop(host, None)
        self._failed.pop(host, None)

    def failed(self, host: str, reason: str, now_ms: int) -> int:
        """Note that a page gave no answer; return for how many ms the host is to be left alone, 0 where it is not."""
        if reason in _OF_THE_PAGE:
            return 0
        times, until_ms = self._held.get(host, (0, 0))
        if now_ms < until_ms:
            # It was on its way when the host was held.
            return until_ms - now_ms
        self._failed[host] = self._failed.get(host, 0) + 1
        if reason not in (NO_ADDRESS, REFUSED, UNREADABLE) and self._failed[host] < _PAGES_MAX:
            return 0
        wait_ms = min(self._config.retry_max_ms, self._config.retry_first_ms << min(times, 20))
        self._held[host] = times + 1, now_ms + wait_ms
        return wait_ms


class RobotsTxt(RobotsTxtMiddleware):
    """robots.txt as RFC 9309 says: 4xx allows all, what cannot be reached nothing; asked again when it is old."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        self._good_s = crawler.settings.getfloat("HEADRACE_ROBOTS_S")
        self._had_s: dict[str, float] = {}
        self._why: dict[str, str] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def process_request(self, request: Request) -> None:  # type: ignore[override]
        """Raise `Forbidden` or `Unreadable` where the request may not be sent."""
        if request.meta.get("dont_obey_robotstxt"):
            return
        netloc = urlsplit(request.url).netloc
        came_s = time.monotonic()
        # One at a time: of several that wait for the same answer, Scrapy 2.19 gives it to the first one only.
        async with self._locks[netloc]:
            had_s = self._had_s.get(netloc, -inf)
            # One that cannot be had is good for those alone that waited for it; the host is left alone then.
            good_s = self._good_s if self._parsers.get(netloc) is not None else 0.0
            if came_s - had_s > good_s:
                self._parsers.pop(netloc, None)
            parser = await self.robot_parser(request)
            if came_s - had_s > good_s:
                self._had_s[netloc] = time.monotonic()
        if parser is None:
            raise Unreadable(f"{netloc}/robots.txt cannot be fetched: {self._why.get(netloc, 'no answer')}")
        try:
            self.process_request_2(parser, request)
        except IgnoreRequest as error:
            raise Forbidden(str(error)) from error

    async def _parse_robots(self, response: Response, netloc: str, request: Request) -> None:
        response = response.replace(body=own_rules(response.body, self._default_useragent))
        if response.status >= 500 or response.status == 429:
            raise IgnoreRequest(f"robots.txt answers {response.status}")
        if response.status >= 300:
            response = response.replace(body=b"")
        await super()._parse_robots(response, netloc, request)

    def _robots_error(self, exc: Exception, netloc: str) -> None:
        self._why[netloc] = str(exc) or repr(exc)
        super()._robots_error(exc, netloc)


_AGENT = re.compile(r"[ \t]*user[- ]?agent[ \t]*(?:[: \t])([^#]*)(?:#.*)?", re.IGNORECASE)


def own_rules(robots: bytes, agent: str) -> bytes:
    """Return a robots.txt in which all groups that do not count for `agent` are one agent's: of some thousand agents
    with some thousand rules each, Protego would keep each rule of each. Linear in the length.

    >>> own_rules(b"User-agent: a\\nUser-agent: Headrace\\nDisallow: /x\\nUser-agent: *\\nAllow: /", "headrace (+me)")
    b'User-agent: /\\nUser-agent: headrace\\nDisallow: /x\\nUser-agent: /\\nAllow: /'
    """
    lines = robots.decode("utf-8", "ignore").splitlines()
    told = {number: _name(match[1]) for number, line in enumerate(lines) if (match := _AGENT.fullmatch(line))}
    counts = max(told.values(), key=lambda name: _score(name, agent.lower()), default="*")
    for number, name in told.items():
        # No agent is called "/".
        lines[number] = f"User-agent: {name if name == counts else '/'}"
    return "\n".join(lines).encode()


def _name(told: str) -> str:
    """Return the name that a group is known by: "head*" and "head" are one, whose rules are put together."""
    name = told.strip().lower()
    return name if name == "*" else name.replace("*", "")


def _score(name: str, agent: str) -> int:
    """Return how well a name of robots.txt says this agent: as a word of it, the longest best; any agent 1."""
    if name == "*":
        return 1
    return len(name) if name and re.search(rf"(?<![\w-]){re.escape(name)}", agent) else 0


class AllowedHosts:
    """Keeps redirects on the hosts and ports that a source names, those of robots.txt on those that any source names;
    gives each host a queue of its own."""

    def __init__(self, crawler: Crawler) -> None:
        self._places: Collection[tuple[str, int]] = crawler.settings["HEADRACE_PLACES"]

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> AllowedHosts:
        """Return one for a crawler of Scrapy."""
        return cls(crawler)

    async def process_request(self, request: Request) -> None:
        """Raise `OffHost` where the request leaves its source's places."""
        host = urlsplit(request.url).hostname
        if not is_within(request.url, request.meta.get("places", self._places)):
            raise OffHost(f"{host}: this host or port is none of the source's")
        request.meta["download_slot"] = host


class Throttle(AutoThrottle):
    """AutoThrottle with a least delay for each host: the declared one, or robots.txt's Crawl-delay if longer."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        self._parallel: Mapping[str, int] = crawler.settings.getdict("HEADRACE_PARALLEL")
        self._agent: str = crawler.settings["USER_AGENT"]
        self.delay_min_s: dict[str, float] = {}
        self._declared: dict[str, dict[str, Any]] = dict(crawler.settings.getdict("DOWNLOAD_SLOTS"))
        self._asked_s: defaultdict[str, dict[str, float]] = defaultdict(dict)
        """By host and place: the newest Crawl-delay of each of its robots.txt."""
        crawler.signals.connect(self._robots_parsed, signal=signals.robots_parsed)

    def _robots_parsed(self, robotparser: Any, request: Request) -> None:
        parts = urlsplit(request.url)
        host, downloader = parts.hostname or "", self.crawler.engine.downloader
        self._asked_s[host][parts.netloc] = min(float(robotparser.crawl_delay(self._agent) or 0.0), DELAY_MAX_S)
        asked_s, declared = max(self._asked_s[host].values()), self._declared.get(host, {})
        before_s = self.delay_min_s.get(host, declared.get("delay", 0.0))
        delay_min_s = self.delay_min_s[host] = max(declared.get("delay", 0.0), asked_s)
        if not asked_s and delay_min_s == before_s:
            return
        # A delay between requests is meant between all of them, however many the source would send at once.
        concurrency = 1 if asked_s else declared.get("concurrency", 1)
        downloader.per_slot_settings[host] = {**declared, "delay": delay_min_s, "concurrency": concurrency}
        slot = downloader.slots.get(host)
        if slot is not None:
            # Where less is asked for than before, AutoThrottle would come down from it by half with each answer.
            slot.delay = delay_min_s if delay_min_s < before_s else max(slot.delay, delay_min_s)
            slot.concurrency = concurrency

    def _adjust_delay(self, slot: Any, latency: float, response: Response) -> None:
        host = urlsplit(response.url).hostname or ""
        self.target_concurrency = float(self._parallel.get(host, 1))
        if response.status == 304:
            # As good as 200: else a site that answers nothing but 304 would only ever be asked more slowly.
            response = response.replace(status=200)
        super()._adjust_delay(slot, latency, response)
        slot.delay = max(slot.delay, self.delay_min_s.get(host, self.mindelay))


def host_settings(crawls: Iterable[Crawl]) -> dict[str, dict[str, Any]]:
    """Return Scrapy's settings of each host's queue; where sources share a host, the gentlest counts."""
    slots: dict[str, dict[str, Any]] = {}
    for crawl in crawls:
        for host in crawl.all_hosts():
            before = slots.get(host, {"delay": 0.0, "concurrency": 64})
            slots[host] = {
                "delay": max(before["delay"], crawl.delay_ms / 1000),
                "concurrency": min(before["concurrency"], crawl.parallel),
                "jitter": 0.0,
            }
    return slots
