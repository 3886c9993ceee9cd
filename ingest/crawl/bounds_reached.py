"""Tells of a source that has reached a declared bound: what the bound keeps out is counted, and logged once a day."""

from __future__ import annotations

import logging

from headrace.contract.crawl import Crawl
from headrace.contract.interfaces.frontier import Noted
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies

log = logging.getLogger("headrace.crawl")

_TELL_S = 86_400.0
"""Time between two lines about one bound. A document beyond it is read every hour, and says the same each time."""


class BoundsReached:
    """What `keys_max` and `pages_max` keep out, of all sources of one crawler."""

    def __init__(self, deps: CrawlDependencies) -> None:
        self._metrics, self._clock = deps.metrics, deps.clock
        self._told_s: dict[tuple[str, str], float] = {}
        for crawl in deps.crawls:
            # A series that begins with its first count has no increase, which the alert asks for.
            for bound in ("keys_max", "pages_max"):
                self._metrics.add("beyond_bound_total", 0, source=crawl.name, bound=bound)

    def note(self, crawl: Crawl, noted: Noted) -> None:
        """Count what an answer brought and a bound kept out."""
        self._over(crawl, "keys_max", noted.keys_over, f"entities of which {crawl.keys_max} may live")
        self._over(crawl, "pages_max", noted.links_over, f"links, and {crawl.pages_max} addresses are known")

    def _over(self, crawl: Crawl, bound: str, count: int, what: str) -> None:
        if not count:
            return
        self._metrics.add("beyond_bound_total", count, source=crawl.name, bound=bound)
        now_s = self._clock.monotonic()
        told_s = self._told_s.get((crawl.name, bound))
        if told_s is None or now_s - told_s >= _TELL_S:
            self._told_s[crawl.name, bound] = now_s
            log.warning(
                "source %s has reached %s: one document has %d more %s. They are left out until there is room: raise "
                "%s, or narrow what the source follows. Said once a day; headrace_crawl_beyond_bound_total counts it",
                crawl.name, bound, count, what, bound,
            )  # fmt: skip
