"""The crawler in the fault matrix: its memory in SQLite, a site that changes, and a Scrapy that does what it promises.

The memory was lost before: values of a crawler whose clock was ahead are served, and somebody decided to begin afresh.
The checker reads every partition by the rule that the join follows, and compares it with what the memory settled, which
SQLite itself notes, in the same transactions. Readers take a version that is sent again for the one that they have.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import msgspec
from crawl_world import ExtractionHere
from fault_matrix import Hangs, Killed, Process, StageRow
from fault_stages import LaggingProducer, asked_of_log
from scrapy.exceptions import DownloadTimeoutError
from scrapy.http import Request, Response
from stream_world import Blobs as MemoryBlobs
from twisted.python.failure import Failure

from headrace.backends.clock import VirtualClock
from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.backends.log.memory import MemoryLog
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.formats.events import EXTERNAL, ExternalValue, decode_batch, encode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.frontier import GONE, Body, Found, Frontier, Settled, Version
from headrace.contract.interfaces.log import Admin, Producer, Reader
from headrace.ingest.crawl.answers import body_name
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.crawl_stage import CrawlRun
from headrace.ingest.crawl.outbox_sender import _batch, _served
from headrace.ingest.crawl.spider import CrawlSpider
from headrace.stream.join.external_lookup import ExternalLookup

PARTITIONS = 2
TOPICS = Topics()
CRAWL = Crawl(
    name="shop",
    kind="json",
    joins="item",
    key=Extract(at="key"),
    rows="rows",
    fields={"price": Extract(at="price", type="int64")},
    follow=(Follow(at="pages"),),
    start=("http://site/",),
    hosts=("slow",),
    every_ms=1_000,
    timeout_ms=500,
)
CONFIG = CrawlConfig(retry_first_ms=800, retry_max_ms=800, bodies_per_page=1)
CHANGES_S = 1.2
"""When the site changes; a page of it goes then, and another one is slow until then."""
AHEAD = Version(1, "shop", "a", 50_000, "of another crawler", '{"price":-1}', "http://site/a")
AHEAD_EPOCH = 900_000
NOTE = """
create table if not exists history(key text, crawl_time_ms integer, version text, "values" text);
create trigger if not exists noted after insert on outbox begin
    insert into history values (new.key, new.crawl_time_ms, new.version, new."values"); end;
"""


class Site(Protocol):
    """What a crawler asks of a site, by way of Scrapy."""

    def fetch(self, url: str, etag: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body."""


class ShopSite:
    """A site that changes once."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self._began_s = clock, clock.monotonic()

    def fetch(self, url: str, etag: str) -> tuple[int, dict[str, str], bytes]:
        """Answer as of now."""
        has_changed = self._clock.monotonic() - self._began_s >= CHANGES_S
        if url == "http://slow/" and not has_changed:
            return 503, {"Retry-After": "1"}, b""
        if url == "http://site/gone" and has_changed:
            return 404, {}, b""
        name = url.rpartition("/")[2] or ("slow" if "slow" in url else "")
        if not name:
            body = {"rows": [], "pages": ["/a", "/b", "/gone", "http://slow/"]}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        is_new = has_changed and name == "a"
        now = f'"{name}{is_new}"'
        if etag == now:
            return 304, {}, b""
        body = {"rows": [{"key": name, "price": 2 if is_new else 1}]}
        return 200, {"Content-Type": "application/json", "ETag": now}, json.dumps(body).encode()


class PromisedScrapy:
    """Each request is called back once, with an answer or a failure, within its timeout. What a callback raises is
    logged and goes no further, as what the spider's `start` raises."""

    def __init__(self, deps: CrawlDependencies, process: Process, site: Any) -> None:
        self._deps, self._process, self._site = deps, process, site

    async def __call__(self, run: CrawlRun) -> None:
        """Crawl until the spider's `start` and all requests have ended."""
        spider = CrawlSpider(self._deps, run.scheduler, run.answers, run.shutdown)
        requests: list[asyncio.Future[None]] = []
        try:
            async for request in spider.start():
                requests.append(asyncio.ensure_future(self._ask(request)))
        except Exception:
            pass
        if requests:
            await asyncio.wait(requests)

    async def _ask(self, request: Request) -> None:
        called: Any
        try:
            called = request.callback, await self._fetch(request)
        except Killed:
            return
        except BaseException as error:
            called = request.errback, Failure(error)
        try:
            await called[0](called[1])
        except BaseException:
            return

    async def _fetch(self, request: Request) -> Response:
        await asyncio.sleep(0)
        clock = self._process.clock
        until_s = clock.monotonic() + request.meta["download_timeout"]
        self._process.in_thread = True
        try:
            etag = (request.headers.get("If-None-Match") or b"").decode()
            status, headers, body = self._site.fetch(request.url, etag)
        except Hangs:
            self._process.in_thread = False
            while clock.monotonic() < until_s:
                await asyncio.sleep(0)
            raise DownloadTimeoutError("no answer") from None
        finally:
            self._process.in_thread = False
        return Response(request.url, status, headers, body, request=request)


class CrawlDriven:
    """A crawler's process, as the matrix drives it."""

    def __init__(self, world: CrawlWorld, run: CrawlRun) -> None:
        self.world, self.run, self.is_done = world, run, False

    async def work(self) -> None:
        """It works by itself."""

    async def tick(self) -> None:
        self.is_done = self.run.check()

    async def finish(self) -> None:
        await self.run.finish()

    def is_busy(self) -> bool:
        return not self.is_done and self.world.is_busy(self.run)


class CrawlWorld:
    """What outlives a crawler: the log, the store, its memory's file, the site."""

    def __init__(self) -> None:
        self.clock, self.log, self.blobs = VirtualClock(10_000), MemoryLog(lambda: 0), MemoryBlobs()
        self.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))
        self.folder = tempfile.TemporaryDirectory()
        self.site = ShopSite(self.clock)
        self.frontier: SqliteFrontier | None = None
        self.process: Process | None = None
        self.prepare()

    def prepare(self) -> None:
        """Let another crawler, whose memory is lost, have been before."""
        for partition in range(PARTITIONS):
            self.append(partition, [AHEAD])
        self.log.append(TOPICS.features, 0, b"1", b"item/9", {})
        self.log.append(TOPICS.features, 0, _served(AHEAD, AHEAD_EPOCH), b"external/shop/a", {})

    def append(self, partition: int, versions: list[Version]) -> None:
        self.log.append(TOPICS.events, partition, encode_batch(_batch(versions, AHEAD_EPOCH)), None, {"kind": EXTERNAL})

    def open(self) -> SqliteFrontier:
        if self.frontier is not None:
            self.frontier.close()
        self.frontier = SqliteFrontier(Path(self.folder.name) / "f.sqlite", bodies_per_page=CONFIG.bodies_per_page)
        self.frontier._db.execute("pragma synchronous=off")
        self.frontier._db.executescript(NOTE)
        return self.frontier

    def dependencies(self, process: Process) -> CrawlDependencies:
        self.process = process
        asked_of_log(process, self.log)
        # From here on the crawler's loop is watched.
        process.is_starting = False
        return CrawlDependencies(
            crawls=(CRAWL,),
            config=CONFIG,
            topics=TOPICS,
            partitions=PARTITIONS,
            frontier=process.wrap(Frontier, self.open()),
            bodies=process.wrap(Blobs, self.blobs),
            producer=process.wrap(Producer, LaggingProducer(self.log)),
            metrics=MemoryMetrics(),
            extraction=ExtractionHere(),
            clock=self.clock,
            open_reader=lambda: process.wrap(Reader, self.log.reader()),
            begin_afresh=True,
        )

    def start(self, process: Process) -> CrawlDriven:
        deps = self.dependencies(process)
        run = CrawlRun(deps, process.watchdog)
        run.begin_crawl(PromisedScrapy(deps, process, process.wrap(Site, self.site)))
        return CrawlDriven(self, run)

    def close(self) -> None:
        if self.frontier is not None:
            self.frontier.close()
        self.folder.cleanup()

    def rows(self, query: str) -> list[Any]:
        assert self.frontier is not None
        return self.frontier._db.execute(query).fetchall()

    def is_busy(self, run: CrawlRun) -> bool:
        return bool(self.rows("select 1 from outbox limit 1") or run.scheduler._in_flight or self.lacking())

    def lacking(self) -> str:
        """Say what the crawler has not fetched yet. An address that failed is waited for by nobody while the site is
        away; the next process finds it there again."""
        newest = dict(self.rows("select key, version from entities"))
        told = dict(self.rows('select key, "values" from history order by rowid'))
        if self.is_away() and self.rows("select 1 from pages where failures > 0"):
            return ""
        wanted = {"a": '{"price":2}', "b": '{"price":1}', "slow": '{"price":1}'}
        lacks = sorted(key for key, values in wanted.items() if key not in told or told[key] != values)
        return f"not fetched: {lacks}" if lacks or newest.get("gone", GONE) != GONE else ""

    def is_away(self) -> bool:
        process = self.process
        return process is not None and process.cell is not None and process.met and process.cell.call.interface is Site

    def trouble(self) -> str:
        if self.rows("select 1 from outbox"):
            return "versions wait in the outbox"
        expected: defaultdict[str, list[tuple[int, str, str | None]]] = defaultdict(list)
        for version in self.before():
            expected[version.key].append((version.crawl_time_ms, version.version, version.values))
        for key, at_ms, digest, values in self.rows("select * from history order by rowid"):
            expected[key].append((at_ms, digest, values))
        for partition in range(PARTITIONS):
            lookup = ExternalLookup((CRAWL,))
            for record in self.log.partitions(TOPICS.events)[partition]:
                lookup.take(decode_batch(record.value or b""))
            read = {k: [(v.at_ms, v.digest, v.text) for v in vs] for k, vs in lookup._versions["shop"].items()}
            if read != dict(expected):
                return f"partition {partition} reads {read}, settled was {dict(expected)}"
        return self.served_trouble(expected) or self.body_trouble() or self.lacking()

    def before(self) -> list[Version]:
        """Return what other crawlers wrote before."""
        return [AHEAD]

    def served_trouble(self, expected: dict[str, list[tuple[int, str, str | None]]]) -> str:
        served: dict[str, Any] = {}
        for record in self.log.partitions(TOPICS.features)[0]:
            if (key := (record.key or b"").decode()).startswith("external/"):
                value = msgspec.json.decode(record.value, type=ExternalValue) if record.value else None
                served[key.rpartition("/")[2]] = (value.crawl_time_ms, bytes(value.values).decode()) if value else None
        newest = {key: (v[-1][0], v[-1][2]) if v[-1][2] is not None else None for key, v in expected.items()}
        return "" if served == newest else f"served is {served}, settled was {newest}"

    def body_trouble(self) -> str:
        needed = {body_name(digest) for (digest,) in self.rows("select digest from bodies")}
        left = {body_name(digest) for (digest,) in self.rows("select digest from unneeded")}
        lost, forgotten = needed - self.blobs.items.keys(), self.blobs.items.keys() - needed - left
        return f"bodies {lost} are not in the store; {forgotten} are left there" if lost or forgotten else ""


class AgainWorld(CrawlWorld):
    """A crawler that has bodies of an earlier declaration, which it extracts again."""

    def prepare(self) -> None:
        """Store bodies whose values were extracted otherwise, and sent."""
        frontier = self.open()
        frontier.next_epoch(1)
        frontier.set_starts("shop", [Found(f"http://site/{name}") for name in "abc"])
        for page in frontier.due(0, ["shop"], [], 3):
            name = page.url[-1]
            self.blobs.put(body_name(name), gzip.compress(json.dumps({"rows": [{"key": name, "price": 1}]}).encode()))
            body = Body(name, page.url, "application/json")
            settled = Settled(at_ms=1, due_ms=2**40, rows=[(name, "old", '{"price":9}')], body=body)
            frontier.settle(page, settled, pages_max=9, keys_max=9, depth_max=1)
        for partition in range(PARTITIONS):
            self.append(partition, frontier.outbox(0, 9))
        frontier.sent(9)

    def before(self) -> list[Version]:
        """Everything is in the history: its crawler was this one."""
        return []

    def start(self, process: Process) -> CrawlDriven:
        run = CrawlRun(self.dependencies(process), process.watchdog)
        run.begin_again(lambda _changed: None)
        return CrawlDriven(self, run)

    def is_busy(self, run: CrawlRun) -> bool:
        return True

    def lacking(self) -> str:
        told = dict(self.rows('select key, "values" from history order by rowid'))
        return "" if told == dict.fromkeys("abc", '{"price":1}') else f"told is {told}"

    def append(self, partition: int, versions: list[Version]) -> None:
        """As the crawler did, in an epoch before."""
        self.log.append(TOPICS.events, partition, encode_batch(_batch(versions, 1)), None, {"kind": EXTERNAL})
        if partition == 0:
            for version in versions:
                self.log.append(TOPICS.features, 0, _served(version, 1), f"external/shop/{version.key}".encode(), {})


_AGAIN = "`headrace crawl --extract-again` asks it: the row crawl-again"
_ONLY_CRAWL = "extraction of stored bodies asks no site, and notes nothing of addresses"
_OF_ADDRESSES = (
    *("due", "next_due_ms", "settle", "not_modified", "failed", "gone", "wait_for", "pages", "has_body"),
    *("may_be_stored", "unneeded", "deleted"),
)
_CLOSED = {
    "Admin.topic_id": "it stores nothing that was made of a topic",
    "Admin.retention_ms": "the sink alone asks it: the row sink",
    "Admin.delete_before": "the trainer alone deletes: tests/simulation/trainer/test_steps_archive.py",
    "Producer.flush": "the process flushes by closing",
    "Producer.close": "the command closes it when the stage has ended",
    "Blobs.list": "a body has its digest's name; nobody lists them",
}
ROWS = (
    StageRow(
        "crawl",
        (Admin, Frontier, Blobs, Producer, Reader, Site),
        CrawlWorld,
        {
            **_CLOSED,
            "Frontier.newest_bodies": _AGAIN,
            "Frontier.extracted_again": _AGAIN,
            "Blobs.get": _AGAIN,
        },
        share=6,
    ),
    StageRow(
        "crawl-again",
        (Admin, Frontier, Blobs, Producer),
        AgainWorld,
        {
            **_CLOSED,
            "Frontier.take_over": "its memory is there",
            **{f"Frontier.{name}": _ONLY_CRAWL for name in _OF_ADDRESSES},
            "Blobs.put": _ONLY_CRAWL,
            "Blobs.delete": _ONLY_CRAWL,
        },
        share=6,
    ),
)
