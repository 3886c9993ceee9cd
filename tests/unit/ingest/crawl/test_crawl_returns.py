"""Goal: pages that go and come back, and sites that lead in circles, are read when they are due, no sooner, no later;
of their bodies those are stored that a page needs. Method: answers by hand, the real memory, a clock that stands.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers_world import CRAWL, World, rows
from stream_world import Blobs

from headrace.contract.crawl import Crawl, Extract, Follow

HOUR_S = 3_600.0
START, ITEM = "http://site/", "http://site/item"
SHOP = Crawl(
    name="shop", kind="json", joins="item_id", start=(START,), rows="rows", key=Extract(at="k"),
    fields={"v": Extract(at="v")}, follow=(Follow(at="pages"),), pages_max=3,
)  # fmt: skip
MAPS = Crawl(
    name="shop", kind="json", joins="item_id", sitemaps=("http://site/a.xml",), key=Extract(at="k"),
    fields={"v": Extract(at="v")}, pages_max=99,
)  # fmt: skip


def document(*keys: str, pages: tuple[str, ...] = ()) -> bytes:
    return json.dumps({"rows": [{"k": key, "v": "x"} for key in keys], "pages": pages}).encode()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path, SHOP)
    one.answer(START, document(pages=("/item",)))
    yield one
    one.frontier.close()


@pytest.fixture
def maps(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path, MAPS)
    yield one
    one.frontier.close()


def test_a_page_that_is_back_is_read_again_though_nothing_leads_to_it_anew(site: World) -> None:
    """The page that leads to it answers 304: only the frontier knows of the one that was gone."""
    told = []
    for status in (200, 404, 200, 410, 200):
        site.answer(START, status=304)
        assert ITEM in site.due(), f"asked for again before {status}"
        site.answer(ITEM, document("1") if status == 200 else b"", status)
        told.append(site.values()["1"])
        site.clock.advance(HOUR_S)
    assert told == ['{"v":"x"}', None, '{"v":"x"}', None, '{"v":"x"}']
    times = [one.crawl_time_ms for one in site.frontier.outbox(0, 99)]
    assert times == sorted(set(times)) and len(times) == 5


def test_a_page_that_stays_gone_is_asked_for_ever_less(site: World) -> None:
    site.answer(ITEM, document("1"))
    pauses = []
    for _ in range(12):
        site.answer(ITEM, status=404)
        hours = next(n for n in range(1, 999) if site.clock.advance(HOUR_S) or ITEM in site.due())
        pauses.append(hours)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256, 256]
    assert site.values() == {"1": None} and not site.frontier.newest_bodies("shop")[1:]
    site.answer(ITEM, document("1"))
    site.answer(ITEM, status=404)
    site.clock.advance(HOUR_S)
    assert ITEM in site.due(), "the next time is a first time"


def test_a_page_that_is_gone_makes_room_for_one_that_is_not(site: World) -> None:
    site.answer(ITEM, status=404)
    site.answer(START, document(pages=("/b", "/c", "/d")))
    assert site.urls() == [START, "http://site/b", "http://site/c"]
    assert site.metrics.counters["beyond_bound_total", "shop pages_max"] == 1


def test_a_link_to_a_page_that_is_gone_is_tried_at_once(site: World) -> None:
    site.answer(ITEM, status=404)
    assert ITEM not in site.due()
    site.answer(START, document(pages=("/item",)))
    assert ITEM in site.due()


def xml(*names: str, changed: str = "", tag: str = "sitemap") -> bytes:
    parts = "".join(f"<{tag}><loc>http://site/{n}</loc><lastmod>{changed}</lastmod></{tag}>" for n in names)
    return f"<sitemapindex>{parts}</sitemapindex>".encode()


def test_sitemaps_that_name_each_other_with_a_new_date_each_time_are_read_once_in_their_time(maps: World) -> None:
    read = 0
    for _ in range(40):
        for url in maps.due():
            names = ("a.xml", "b.xml", "c.xml")
            maps.answer(url, xml(*names, changed=f"now {read}"), Content_Type="application/xml")
            read += 1
    # The index, what it leads to, and what of that was read before the others were known.
    assert read <= 3
    maps.clock.advance(HOUR_S)
    for _ in range(40):
        for url in maps.due():
            maps.answer(url, xml(*names, changed=f"now {read}"), Content_Type="application/xml")
            read += 1
    assert read <= 3 + 5, "each in its time, and once more where the index says that it has changed"


def test_a_sitemap_says_that_a_page_has_changed(maps: World) -> None:
    maps.answer("http://site/a.xml", xml("item", changed="1", tag="url"), Content_Type="application/xml")
    maps.answer(ITEM, rows("1"))
    assert maps.due() == []
    maps.answer("http://site/a.xml", xml("item", changed="2", tag="url"), Content_Type="application/xml")
    assert maps.due() == [ITEM]


def test_a_sitemap_that_moves_onto_a_document_leaves_that_its_validators(tmp_path: Path) -> None:
    feed = Crawl(
        name="shop", kind="feed", joins="item_id", start=("http://site/feed",), sitemaps=("http://site/a.xml",),
        key=Extract(at="guid::text"), fields={"v": Extract(at="title::text")},
    )  # fmt: skip
    one = World(tmp_path, feed)
    one.answer("http://site/a.xml", xml("b.xml"), Content_Type="application/xml")
    body = b"<rss><item><guid>1</guid><title>x</title></item></rss>"
    one.answer("http://site/b.xml", body, at="http://site/feed", hops=(301,), Content_Type="application/xml")
    assert one.page("http://site/feed").etag == "", "its own document was not read: 304 would keep it unread"
    one.frontier.close()


class SlowDelete(Blobs):
    """Deletes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def delete(self, name: str) -> None:
        self.begun.set()
        assert self.go.wait(30)
        super().delete(name)


def test_a_body_that_comes_back_while_it_is_deleted_is_stored(tmp_path: Path) -> None:
    blobs = SlowDelete()
    world = World(tmp_path, blobs=blobs)
    a, b = CRAWL.start
    world.answer(a, rows("1"))

    async def both() -> None:
        page_a, page_b = world.page(a), world.page(b)
        going = asyncio.ensure_future(world.answers.take(page_a, world.response(a, status=404), 0.1))
        await asyncio.to_thread(blobs.begun.wait)
        coming = asyncio.ensure_future(world.answers.take(page_b, world.response(b, rows("1")), 0.1))
        for _ in range(20):
            await asyncio.sleep(0)
        threading.Timer(0.05, blobs.go.set).start()
        await asyncio.wait([going, coming])
        going.result(), coming.result()

    asyncio.run(both())
    assert len(world.blobs.items) == 1 and world.frontier.newest_bodies("shop")
    world.frontier.close()


@pytest.mark.parametrize("fails", ["delete", "settle"])
def test_a_body_that_a_crash_left_in_the_store_goes_at_the_next_start(tmp_path: Path, fails: str) -> None:
    world = World(tmp_path)
    a, _ = CRAWL.start
    world.answer(a, rows("1"))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    if fails == "delete":
        world.blobs.delete = broken  # type: ignore[method-assign]
    else:
        world.frontier.settle = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="killed"):
        world.answer(a, rows("2"), 404 if fails == "delete" else 200)
    world.frontier.close()
    again = World(tmp_path, blobs=world.blobs)
    again.blobs.__dict__.pop("delete", None)
    asyncio.run(again.answers.delete_left())
    kept = {body.digest for body in again.frontier.newest_bodies("shop")}
    assert len(again.blobs.items) == len(kept) == (0 if fails == "delete" else 1)
    again.frontier.close()
