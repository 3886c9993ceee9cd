"""Goal: a host that is away costs one try now and then, whatever it has of pages, and ends nothing; what it asks for
holds until it asks for less. Method: answers and failures by hand, the real memory, a clock that stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from answers_world import World, outcomes, rows
from scrapy.exceptions import CannotResolveHostError, DownloadConnectionRefusedError, DownloadTimeoutError
from scrapy.http import Request
from scrapy.settings import Settings
from scrapy.signalmanager import SignalManager

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, Extract
from headrace.ingest.crawl.politeness import Throttle, Unreadable
from headrace.ingest.crawl.scrapy_run import scrapy_settings

OTHER = "http://other/"
PAGES = [f"http://site/{n}" for n in range(5)]
CRAWL = Crawl(
    name="shop", kind="json", joins="item_id", start=(*PAGES, OTHER), rows="[]", key=Extract(at="k"),
    fields={"v": Extract(at="v")}, every_ms=1_000,
)  # fmt: skip
AWAY = [CannotResolveHostError("no such name"), DownloadConnectionRefusedError("refused"), Unreadable("503")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path, CRAWL, retry_first_ms=5_000, retry_max_ms=60_000)
    for number, url in enumerate(PAGES):
        one.answer(url, rows(str(number)))
    one.clock.advance(10.0)
    yield one
    one.frontier.close()


def pause_s(world: World) -> int:
    """Return after how many seconds the host is asked again."""
    return next(n for n in range(1, 999) if world.clock.advance(1.0) or set(PAGES) & set(world.due()))


@pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
def test_a_host_that_is_away_is_left_alone_for_ever_longer_and_ends_nothing(world: World, error: Exception) -> None:
    before = world.values()
    pauses = []
    for _ in range(6):
        # Those that were on their way fail, too, and make it no longer.
        for url in sorted(set(PAGES) & set(world.due()))[:2]:
            world.fail(url, error)
        assert world.due() == [OTHER], "no page of it, and those of others"
        pauses.append(pause_s(world))
    assert pauses == [5, 10, 20, 40, 60, 60]
    assert world.values() == before and None not in before.values()
    (reason,) = set(outcomes(world)) - {"taken"}
    assert reason in ("no_address", "refused", "robots_unreadable")
    url = min(set(PAGES) & set(world.due()))
    world.answer(url, rows("0"))
    world.fail(url, error)
    assert pause_s(world) == 5, "an answer in between: it is a first time again"


def test_one_slow_page_holds_no_host_and_three_in_a_row_do(world: World) -> None:
    for _ in range(4):
        world.fail(PAGES[0], DownloadTimeoutError("slow"))
        assert PAGES[1] in world.due()
        world.answer(PAGES[1], rows("1"))
        world.clock.advance(10.0)
    for url in PAGES[:3]:
        assert PAGES[4] in world.due()
        world.fail(url, DownloadTimeoutError("slow"))
    assert world.due() == [OTHER]


def test_a_hold_is_not_shortened_by_a_page_that_was_on_its_way(world: World) -> None:
    world.answer(PAGES[0], status=429, Retry_After="600")
    world.answer(PAGES[1], status=503)
    assert pause_s(world) >= 598


@pytest.mark.parametrize("said", ["7", "Thu, 01 Jan 1970 00:00:19 GMT"])
def test_retry_after_holds_the_host_for_as_long_as_it_says(tmp_path: Path, said: str) -> None:
    world = World(tmp_path, CRAWL, retry_first_ms=1_000)
    world.clock.advance(10.0)
    before_s = world.clock.now_ms() / 1_000
    world.answer(PAGES[0], status=429, Retry_After=said)
    assert world.due() == [OTHER]
    wanted_s = int(said) if said.isdigit() else 19 - before_s
    assert 1 + pause_s(world) == wanted_s
    world.frontier.close()


def throttled(crawl: Crawl) -> tuple[Throttle, Any]:
    """Return a throttle and the downloader that it sets, of a crawler that asks nothing."""
    settings = Settings(scrapy_settings((crawl,), CrawlConfig()))
    slot = SimpleNamespace(delay=0.5, concurrency=crawl.parallel)
    downloader = SimpleNamespace(per_slot_settings=settings.getdict("DOWNLOAD_SLOTS"), slots={"site": slot})
    crawler: Any = SimpleNamespace(
        settings=settings, signals=SignalManager(), engine=SimpleNamespace(downloader=downloader)
    )
    return Throttle(crawler), downloader


def test_a_crawl_delay_that_a_robots_txt_takes_back_is_over() -> None:
    crawl = Crawl(**{f: getattr(CRAWL, f) for f in CRAWL.__struct_fields__ if f not in ("delay_ms", "parallel")},
                  delay_ms=500, parallel=4)  # fmt: skip
    throttle, downloader = throttled(crawl)
    slot = downloader.slots["site"]

    def robots(delay_s: float | None, place: str = "http://site") -> tuple[float, int, float]:
        parser = SimpleNamespace(crawl_delay=lambda agent: delay_s)
        throttle._robots_parsed(parser, Request(f"{place}/robots.txt"))
        return slot.delay, slot.concurrency, throttle.delay_min_s["site"]

    assert robots(600.0) == (600.0, 1, 600.0)
    assert robots(None, "http://site:8080") == (600.0, 1, 600.0), "another place of the host asks for nothing"
    assert robots(7.0) == (7.0, 1, 7.0)
    assert robots(None) == (0.5, 4, 0.5)
    assert downloader.per_slot_settings["site"]["delay"] == 0.5
    slot.delay = 3.0
    assert robots(None) == (3.0, 4, 0.5), "what AutoThrottle found stays"
