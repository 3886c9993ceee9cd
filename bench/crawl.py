"""Pages/s of the crawler against a local site: with no limits, asked again with validators, and within rate limits.

Method: a site in a process of its own (an asyncio server that answers item pages from memory, an index with all
links) and the crawler in another, with its frontier and its bodies on disk and a log in memory. The peer is Scrapy
alone on the same site in the same run: a spider that follows the same links, extracts the same fields and keeps
nothing. Sides take turns; figures are medians. Time counts from the site's first request to its last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness.figures import Figure, show

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.formats.topics import Topics

PARTITIONS = 4
PARALLEL = 16
EVERY_MS = 3_600_000
PAD = "<p>" + "lorem ipsum dolor sit amet " * 300 + "</p>"
"""About 8 KB a page."""


async def serve(pages: int) -> None:
    """Answer until standard input ends; print the port, and for each line read what was asked since the last one."""
    times: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                path = head.split(" ", 2)[1]
                if path != "/robots.txt":
                    times.append(time.monotonic())
                writer.write(_answer(path, head, pages))
        except (asyncio.IncompleteReadError, OSError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps([len(times), times[-1] - times[0]] if times else [0, 0.0]), flush=True)
        times.clear()


def _answer(path: str, head: str, pages: int) -> bytes:
    status, etag = "200 OK", ""
    if path == "/":
        body = "".join(f'<a href="/item/{n}">i</a>' for n in range(pages))
    elif path.startswith("/item/"):
        number = path.rsplit("/", 1)[1]
        etag = f'ETag: "{number}"\r\n'
        body = f'<h1 class=name>Item {number}</h1><b class=price data-id="{number}">EUR {number}.5</b>{PAD}'
        if f'"{number}"' in head:
            status, body = "304 Not Modified", ""
    else:
        status, body = "404 Not Found", ""
    lead = f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\n{etag}Content-Length: {len(body)}\r\n\r\n"
    return (lead + body).encode()


def declared(url: str, pages: int, delay_ms: int, every_ms: int) -> Crawl:
    """Return the source; `every_ms` is longer than a run, so that each page is asked for once in it."""
    return Crawl(
        name="catalogue",
        kind="html",
        joins="item_id",
        start=(f"{url}/",),
        follow=(Follow(url="/item/"),),
        key=Extract(at=".price::attr(data-id)", type="int64"),
        fields={
            "name": Extract(at=".name::text"),
            "price": Extract(at=".price::text", type="float64", pattern=r"([\d.]+)"),
        },
        every_ms=every_ms,
        pages_max=pages + 1,
        delay_ms=delay_ms,
        parallel=PARALLEL if delay_ms == 0 else 1,
    )


def crawl(folder: Path, url: str, pages: int, delay_ms: int) -> None:
    """Crawl what is due, once."""
    from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
    from headrace.ingest.crawl.crawl_stage import CrawlStage
    from headrace.ingest.crawl.extraction_pool import ExtractionPool

    log = MemoryLog()
    log.admin().ensure_topics(Topics().specs(PARTITIONS))
    _all_due(folder / "frontier.sqlite")
    frontier = SqliteFrontier(folder / "frontier.sqlite")
    source = declared(url, pages, delay_ms, EVERY_MS)
    config = CrawlConfig(requests_max=2 * PARALLEL)
    pool = ExtractionPool(config)
    stage = CrawlStage(
        CrawlDependencies(
            crawls=(source,),
            config=config,
            extraction=pool,
            topics=Topics(),
            partitions=PARTITIONS,
            frontier=frontier,
            bodies=FileBlobs(folder / "store"),
            producer=log.producer(),
            metrics=MemoryMetrics(),
            clock=SystemClock(),
            open_reader=log.reader,
        )
    )
    stage.run(threading.Event(), lambda _: None, once=True)
    pool.close()
    frontier.close()


def _all_due(file: Path) -> None:
    """Make every page that a former run knows due now, as if its time had passed."""
    if file.exists():
        with closing(sqlite3.connect(file)) as db, db:
            db.execute("update pages set due_ms = 0")


def scrapy_alone(url: str) -> None:
    """Follow and extract with a spider of Scrapy's own, as its tutorial writes one."""
    import scrapy
    from scrapy.crawler import AsyncCrawlerProcess

    class Items(scrapy.Spider):
        name = "items"

        async def start(self) -> AsyncIterator[Any]:
            yield scrapy.Request(f"{url}/")

        def parse(self, response: Any) -> Iterator[Any]:
            if (key := response.css(".price::attr(data-id)").get()) is not None:
                price = response.css(".price::text").re_first(r"([\d.]+)")
                yield {"key": int(key), "name": response.css(".name::text").get(), "price": float(price or 0)}
            for link in response.css("a::attr(href)").getall():
                yield response.follow(link, self.parse)

    process = AsyncCrawlerProcess(
        {
            "ROBOTSTXT_OBEY": True,
            "CONCURRENT_REQUESTS": 2 * PARALLEL,
            "CONCURRENT_REQUESTS_PER_DOMAIN": PARALLEL,
            "LOG_ENABLED": False,
            "TELNETCONSOLE_ENABLED": False,
        }
    )
    process.crawl(Items)
    process.start()


class Site:
    """The site's process."""

    def __init__(self, pages: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", "site", str(pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = f"http://127.0.0.1:{self._line()}"

    def rate(self) -> float:
        """Return requests/s since the last question."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        count, seconds = json.loads(self._line())
        return (count - 1) / seconds if count > 1 else 0.0

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def child(*words: object) -> None:
    """Run one side in a process of its own: Twisted's reactor runs once."""
    subprocess.run([sys.executable, __file__, "--child", *map(str, words)], check=True, timeout=600)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few pages instead of three of many")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _as_child(args.child)
        return
    rounds, pages, limited, delay_ms = (1, 400, 60, 50) if args.quick else (3, 3_000, 400, 20)
    rates: dict[str, list[float]] = {"first": [], "again": [], "limited": [], "scrapy": []}
    for number in range(rounds):
        site = Site(pages)
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            for name in ("first", "again"):
                child("crawl", folder, site.url, pages, 0)
                rates[name].append(site.rate())
        child("scrapy", site.url)
        rates["scrapy"].append(site.rate())
        site.close()
        site = Site(limited)
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            child("crawl", folder, site.url, limited, delay_ms)
            rates["limited"].append(site.rate())
        site.close()
        print(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:,.0f}/s" for name, found in rates.items()))
    show(_figures({name: statistics.median(found) for name, found in rates.items()}, 1_000 / delay_ms))


def _as_child(words: list[str]) -> None:
    kind, rest = words[0], words[1:]
    if kind == "site":
        asyncio.run(serve(int(rest[0])))
    elif kind == "crawl":
        crawl(Path(rest[0]), rest[1], int(rest[2]), int(rest[3]))
    else:
        scrapy_alone(rest[0])


def _figures(median: dict[str, float], limit: float) -> list[Figure]:
    peer = median["scrapy"]
    return [
        Figure(name, round(median[side]), "pages/s", "Scrapy alone", round(peer), round(median[side] / peer, 2))
        for name, side in (("crawl_pages_per_second", "first"), ("crawl_unchanged_per_second", "again"))
    ] + [
        Figure(
            "crawl_limited_pages_per_second",
            round(median["limited"], 1),
            "pages/s",
            "the declared limit",
            limit,
            round(median["limited"] / limit, 2),
        )
    ]


if __name__ == "__main__":
    main()
