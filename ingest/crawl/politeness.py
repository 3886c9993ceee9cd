"""What a site may ask of us, on top of Scrapy: robots.txt that is asked for again when it is old, a least delay for
each host, and no request to a host that a source does not name.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from scrapy import signals
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.robotstxt import RobotsTxtMiddleware
from scrapy.exceptions import IgnoreRequest
from scrapy.extensions.throttle import AutoThrottle
from scrapy.http import Request, Response

from headrace.contract.crawl import Crawl, is_within

DELAY_MAX_S = 3_600.0
"""Longest delay that a robots.txt may ask for; a longer one is taken as this."""
_UNREACHABLE_S = 30.0
"""Time until an unreachable robots.txt is asked for again."""


class Forbidden(IgnoreRequest):
    """robots.txt does not allow it."""


class Unreadable(IgnoreRequest):
    """robots.txt cannot be fetched; RFC 9309 then allows nothing."""


class OffHost(IgnoreRequest):
    """A redirect leads to a host that the source does not name."""


class RobotsTxt(RobotsTxtMiddleware):
    """robots.txt as RFC 9309 says: 4xx allows all, what cannot be reached nothing; asked again when it is old."""

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        self._good_s = crawler.settings.getfloat("HEADRACE_ROBOTS_S")
        self._asked_s: dict[str, float] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def process_request(self, request: Request) -> None:  # type: ignore[override]
        """Raise `Forbidden` or `Unreadable` where the request may not be sent."""
        if request.meta.get("dont_obey_robotstxt"):
            return
        netloc = urlsplit(request.url).netloc
        # One at a time: of several that wait for the same answer, Scrapy 2.19 gives it to the first one only.
        async with self._locks[netloc]:
            now_s = time.monotonic()
            good_s = _UNREACHABLE_S if self._parsers.get(netloc) is None else self._good_s
            if now_s - self._asked_s.get(netloc, now_s) > good_s:
                self._parsers.pop(netloc, None)
            if netloc not in self._parsers:
                self._asked_s[netloc] = now_s
            parser = await self.robot_parser(request)
        if parser is None:
            raise Unreadable(f"{netloc}/robots.txt cannot be fetched")
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


_AGENT = re.compile(r"[ \t]*user[- ]?agent[ \t]*(?:[: \t])([^#]*)(?:#.*)?", re.IGNORECASE)


def own_rules(robots: bytes, agent: str) -> bytes:
    """Return a robots.txt in which all groups that do not count for `agent` are one agent's: of some thousand agents
    with some thousand rules each, Protego would keep each rule of each. Linear in the length.

    >>> own_rules(b"User-agent: a\\nUser-agent: Headrace\\nDisallow: /x\\nUser-agent: *\\nAllow: /", "headrace (+me)")
    b'User-agent: /\\nUser-agent: headrace\\nDisallow: /x\\nUser-agent: /\\nAllow: /'
    """
    lines = robots.decode("utf-8", "ignore").splitlines()
    told = {number: match[1].strip().lower() for number, line in enumerate(lines) if (match := _AGENT.fullmatch(line))}
    counts = max(told.values(), key=lambda name: _score(name, agent.lower()), default="*")
    for number, name in told.items():
        # No agent is called "/".
        lines[number] = f"User-agent: {name if name == counts else '/'}"
    return "\n".join(lines).encode()


def _score(name: str, agent: str) -> int:
    """Return how well a name of robots.txt says this agent: as a word of it, the longest best; any agent 1."""
    if name == "*":
        return 1
    name = name.replace("*", "")
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
        crawler.signals.connect(self._robots_parsed, signal=signals.robots_parsed)

    def _robots_parsed(self, robotparser: Any, request: Request) -> None:
        asked_s = robotparser.crawl_delay(self._agent)
        host = urlsplit(request.url).hostname or ""
        slots = self.crawler.engine.downloader.per_slot_settings
        declared_s = slots.get(host, {}).get("delay", 0.0)
        delay_min_s = self.delay_min_s[host] = max(
            self.delay_min_s.get(host, declared_s), min(float(asked_s or 0.0), DELAY_MAX_S)
        )
        if asked_s and delay_min_s > 0:
            # A delay between requests is meant between all of them, however many the source would send at once.
            slots[host] = {**slots.get(host, {}), "delay": delay_min_s, "concurrency": 1}
            slot = self.crawler.engine.downloader.slots.get(host)
            if slot is not None:
                slot.delay, slot.concurrency = max(slot.delay, delay_min_s), 1

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
