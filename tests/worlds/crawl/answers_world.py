"""A crawler's memory and store, a clock that stands, and answers by hand."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from crawl_world import ExtractionHere
from scrapy.http import Request, Response
from stream_world import Blobs

from headrace.backends.clock import VirtualClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, Extract
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.frontier import Found, Page
from headrace.ingest.crawl.answers import Answers
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies, Extraction
from headrace.process.waits import Waits

CRAWL = Crawl(
    name="shop", kind="json", joins="item_id", start=("http://site/a", "http://site/b"), rows="[]",
    key=Extract(at="k"), fields={"v": Extract(at="v")},
)  # fmt: skip


class World:
    """A crawler's memory and store, and answers by hand."""

    def __init__(
        self,
        folder: Path,
        crawl: Crawl = CRAWL,
        extraction: Extraction | None = None,
        blobs: Blobs | None = None,
        **config: Any,
    ) -> None:
        self.frontier, self.blobs, self.clock = (
            SqliteFrontier(folder / "f.sqlite"),
            blobs or Blobs(),
            VirtualClock(1_000),
        )
        starts = [Found(url) for url in crawl.start] + [Found(url, sitemap=True) for url in crawl.sitemaps]
        self.frontier.set_starts("shop", starts)
        log, self.metrics = MemoryLog(), MemoryMetrics()
        self.deps = deps = CrawlDependencies(
            crawls=(crawl,), config=CrawlConfig(**config), topics=Topics(), partitions=1, frontier=self.frontier,
            extraction=extraction or ExtractionHere(),
            bodies=self.blobs, producer=log.producer(), metrics=self.metrics, clock=self.clock,
            open_reader=log.reader,
        )  # fmt: skip
        self.answers = Answers(deps, Waits(self.clock))

    def page(self, url: str) -> Page:
        return next(page for page in self.frontier.due(2**60, ["shop"], [], 99) if page.url == url)

    def urls(self) -> list[str]:
        """Return all addresses that are known and not gone."""
        return sorted(page.url for page in self.frontier.due(2**60, ["shop"], [], 99) if not page.gone)

    def answer(self, url: str, body: bytes = b"", status: int = 200, **told: Any) -> None:
        """Answer a page; the rest as `response`."""
        asyncio.run(self.answers.take(self.page(url), self.response(url, body, status, **told), 0.1))
        self.clock.advance(1.0)

    def response(
        self, url: str, body: bytes = b"", status: int = 200, at: str = "", hops: tuple[int, ...] = (), **headers: str
    ) -> Response:
        """Return an answer; `at` and `hops` say where redirects led to, and their statuses."""
        request = Request(url, meta={"redirect_reasons": list(hops)} if hops else {})
        told = {"Content-Type": "application/json", "ETag": '"1"', "Last-Modified": "yesterday"}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        return Response(at or url, status, told, body, request=request)

    def fail(self, url: str, error: BaseException) -> None:
        """Let a page give no answer."""
        self.answers.take_failure(self.page(url), error)

    def due(self) -> list[str]:
        """Return what is asked for now, hosts that wait left out."""
        return sorted(page.url for page in self.frontier.due(self.clock.now_ms(), ["shop"], [], 99))

    def values(self) -> dict[str, str | None]:
        """Return what was written last of each key."""
        return {one.key: one.values for one in self.frontier.outbox(0, 999)}


def rows(*keys: str, v: str = "x") -> bytes:
    return json.dumps([{"k": key, "v": v} for key in keys]).encode()


def outcomes(world: World) -> dict[str, float]:
    return {reason: count for (name, reason), count in world.metrics.counters.items() if name == "pages_total"}
