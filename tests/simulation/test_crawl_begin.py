"""Goal: a crawler never begins with a memory that was lost or is damaged without a word, and no value goes back.

Method: the fault matrix' crawler, the file of whose memory is lost, emptied, damaged or kept from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fault_crawl import AHEAD_EPOCH, TOPICS, CrawlWorld
from fault_matrix import CURRENT, Process
from fault_stages import no_threads

from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.events import ExternalValue
from headrace.contract.interfaces.frontier import Found
from headrace.ingest.crawl.begin import begin, read_served
from headrace.ingest.crawl.scheduler import HOST_STILL_MAX_S, Scheduler
from headrace.process.waits import Waits


@pytest.fixture(autouse=True)
def _no_threads() -> Iterator[None]:
    with no_threads():
        yield


@pytest.fixture
def world() -> Iterator[CrawlWorld]:
    made = CrawlWorld()
    CURRENT.process = Process(made.clock)
    yield made
    made.close()


def begun(world: CrawlWorld, frontier: SqliteFrontier, *, begin_afresh: bool = False, now_ms: int = 7) -> int:
    """Begin, and return the epoch."""
    return asyncio.run(
        begin(
            frontier,
            Waits(world.clock),
            open_reader=world.log.reader,
            features=TOPICS.features,
            now_ms=now_ms,
            begin_afresh=begin_afresh,
        )
    )


def test_a_new_memory_beside_values_that_are_served_is_refused_and_only_a_person_decides(
    world: CrawlWorld, caplog: pytest.LogCaptureFixture
) -> None:
    frontier = world.open()
    with pytest.raises(InvariantBroken, match=r"1 crawled values.*headrace crawl --begin-afresh.*generation"):
        begun(world, frontier)
    assert frontier.is_new(), "refused again at the next start"
    with caplog.at_level(logging.WARNING):
        assert begun(world, frontier, begin_afresh=True) == AHEAD_EPOCH + 1
    assert "everything is fetched again" in caplog.messages[-1]
    assert begun(world, frontier) == AHEAD_EPOCH + 2, "a clock that is behind takes no epoch back"
    assert begun(world, frontier, now_ms=AHEAD_EPOCH + 99) == AHEAD_EPOCH + 99


def test_the_first_crawler_of_a_log_begins_by_itself(world: CrawlWorld) -> None:
    world.log.delete(TOPICS.features)
    world.log.admin().ensure_topics(TOPICS.specs(2))
    world.log.append(TOPICS.features, 0, b"3", b"item/1", {})
    assert begun(world, world.open()) == 7


def test_what_is_served_is_the_last_value_of_a_key_and_nothing_of_others(world: CrawlWorld) -> None:
    def put(key: str, value: bytes | None) -> None:
        world.log.append(TOPICS.features, 0, value, key.encode(), {})

    one = msgspec.json.encode(ExternalValue(5, 6, msgspec.Raw(b"{}")))
    for key, value in (("b/c", one), ("gone", one), ("gone", None), ("damaged", b"{"), ("a", one)):
        put(f"external/shop/{key}", value)
    put("user/external", b"1")
    served = read_served(world.log.reader, TOPICS.features)
    assert {key: value.epoch for key, value in served.items()} == {("shop", "b/c"): 6, ("shop", "a"): 6}


@pytest.mark.parametrize("how", ["no database", "a page is overwritten", "cut"])
def test_a_damaged_memory_is_refused_and_put_aside_only_when_a_person_decides(tmp_path: Path, how: str) -> None:
    path = tmp_path / "g1.sqlite"
    frontier = SqliteFrontier(path)
    frontier.set_starts("shop", [Found(f"http://site/{n}") for n in range(2_000)])
    frontier.next_epoch(5)
    frontier.close()
    data = path.read_bytes()
    torn = data[:8_192] + b"y" * 4_096 + data[12_288:]
    path.write_bytes({"no database": b"x" * 5_000, "cut": data[:50_000]}.get(how, torn))
    damaged = path.read_bytes()
    for _ in range(2):
        with pytest.raises(InvariantBroken, match=r"is damaged.*headrace crawl --begin-afresh"):
            SqliteFrontier(path)
    assert path.read_bytes() == damaged
    frontier = SqliteFrontier(path, begin_afresh=True)
    assert frontier.is_new() and frontier.pages("shop") == 0
    assert path.with_suffix(".damaged-1").read_bytes() == damaged
    frontier.next_epoch(9)
    frontier.close()
    frontier = SqliteFrontier(path, begin_afresh=True)
    assert not frontier.is_new(), "one that can be read is gone on from all the same"
    frontier.close()


def test_a_disk_that_does_not_give_the_file_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "g1.sqlite").mkdir()
    for begin_afresh in (False, True):
        with pytest.raises(Unavailable, match="unable to open"):
            SqliteFrontier(tmp_path / "g1.sqlite", begin_afresh=begin_afresh)


def test_a_host_whose_requests_stand_still_stops_the_stage(world: CrawlWorld) -> None:
    process = Process(world.clock)
    deps = replace(world.dependencies(process), frontier=world.frontier)
    deps.frontier.set_starts("shop", [Found("http://site/"), Found("http://slow/")])
    scheduler = Scheduler(deps, once=False)
    first, second = scheduler.choose()
    world.clock.advance(HOST_STILL_MAX_S - 1.0)
    scheduler.check()
    scheduler.settled(first)
    world.clock.advance(2.0)
    with pytest.raises(Unavailable, match=rf"requests to {second.host} none was answered"):
        scheduler.check()
    scheduler.settled(second)
    scheduler.check()


def test_a_scrapy_that_ends_by_itself_ends_the_stage(world: CrawlWorld) -> None:
    async def ends(_run: Any) -> None:
        return

    async def run() -> None:
        from headrace.ingest.crawl.crawl_stage import CrawlRun

        process = Process(world.clock)
        crawl = CrawlRun(world.dependencies(process), process.watchdog)
        crawl.begin_crawl(ends)
        while not crawl.check():
            await asyncio.sleep(0)

    with pytest.raises(Unavailable, match="Scrapy has ended the spider by itself"):
        asyncio.run(run())
