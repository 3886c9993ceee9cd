"""Which addresses are asked for now: those that are due, within the bounds of the crawler and of each host."""

from __future__ import annotations

import asyncio
from collections import Counter

from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.frontier import Page
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies

HOST_STILL_MAX_S = 2 * 3_600.0 + 6 * 600.0
"""A host's queue moves within the longest delay, an hour, and a request within the longest timeout, 600 s, for itself
and each of a few redirects; the delay twice, for robots.txt."""
_GAUGES_S = 1.0
_REST_S, _REST_MAX_S = 0.1, 1.0
"""Time between two looks for what is due: while something is, and at most."""


class Scheduler:
    """Chooses addresses and remembers which are in flight; `once`: be done when nothing is left of what was due at
    the start."""

    def __init__(self, deps: CrawlDependencies, *, once: bool) -> None:
        self._config, self._frontier, self._metrics, self._clock = deps.config, deps.frontier, deps.metrics, deps.clock
        self._sources = [crawl.name for crawl in deps.crawls]
        # Twice as many as the host may be asked at once: Scrapy has the next one at hand when one is answered.
        self._in_flight_max = {host: 2 * crawl.parallel for crawl in deps.crawls for host in crawl.all_hosts()}
        self._in_flight: dict[tuple[str, str], str] = {}
        """(source, address) to host, of what was asked for and is not settled."""
        self._moved_s: dict[str, float] = {}
        """Of each host with something in flight, when something was asked for or settled last."""
        self._until_ms = deps.clock.now_ms() if once else None
        self._gauges_s = 0.0
        self.freed = asyncio.Event()
        """Set when a request is settled: the next one may be within the bounds."""

    def choose(self) -> list[Page]:
        """Return addresses to ask for now: due, within the bounds, and not asked for already."""
        free = self._config.requests_max - len(self._in_flight)
        if free <= 0 or self._frontier.waiting() >= self._config.outbox_max:
            return []
        loads = Counter(self._in_flight.values())
        busy = [host for host, load in loads.items() if load >= self._in_flight_max.get(host, 2)]
        limit = free + len(self._in_flight)
        chosen: list[Page] = []
        for page in self._frontier.due(self._due_ms(), self._sources, busy, limit):
            if (page.source, page.url) in self._in_flight or loads[page.host] >= self._in_flight_max.get(page.host, 2):
                continue
            loads[page.host] += 1
            self._in_flight[page.source, page.url] = page.host
            self._moved_s.setdefault(page.host, self._clock.monotonic())
            chosen.append(page)
            if len(chosen) == free:
                break
        return chosen

    def settled(self, page: Page) -> None:
        """Note that a request is settled, well or not."""
        self._in_flight.pop((page.source, page.url), None)
        self._moved_s[page.host] = self._clock.monotonic()
        if page.host not in self._in_flight.values():
            del self._moved_s[page.host]
        self.freed.set()

    def check(self) -> None:
        """Raise `Unavailable` where requests to a host stand still: no address of it would ever be asked for again."""
        now_s = self._clock.monotonic()
        for host, moved_s in self._moved_s.items():
            if now_s - moved_s > HOST_STILL_MAX_S:
                raise Unavailable(
                    f"of the requests to {host} none was answered, and none was given up, in {now_s - moved_s:.0f} s; "
                    f"{HOST_STILL_MAX_S:.0f} s are allowed. The stage stops, and the next start asks again."
                )

    def is_done(self) -> bool:
        """Say whether a run that ends by itself has nothing left that is due."""
        if self._until_ms is None or self._in_flight:
            return False
        next_ms = self._frontier.next_due_ms(self._sources)
        return next_ms is None or next_ms > self._until_ms

    def rest_s(self) -> float:
        """Return when to look next, in seconds from now: what is due by then is asked for when it is."""
        next_ms = self._frontier.next_due_ms(self._sources)
        left_s = _REST_MAX_S if next_ms is None else (next_ms - self._clock.now_ms()) / 1_000
        return min(max(left_s, _REST_S), _REST_MAX_S)

    def _due_ms(self) -> int:
        """Return up to when an address is due: a run that ends by itself asks for each at most once."""
        return self._clock.now_ms() if self._until_ms is None else self._until_ms

    def set_gauges(self) -> None:
        """Set how many addresses are known, once a second."""
        now_s = self._clock.monotonic()
        if now_s >= self._gauges_s:
            self._gauges_s = now_s + _GAUGES_S
            for name in self._sources:
                self._metrics.set("pages_known", self._frontier.pages(name), source=name)
