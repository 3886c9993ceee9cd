"""Goal: what an answer leaves in the crawler's memory and store. Method: answers by hand, the real memory, a clock that
stands.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers_world import CRAWL, World, outcomes, rows
from crawl_world import ExtractionHere

from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.ingest.crawl.answers import body_name
from headrace.ingest.crawl.extract import Document, Extracted

BOUNDS = "keys_max", "pages_max"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    one.frontier.close()


def test_a_document_that_cannot_be_read_is_asked_for_without_validators(world: World) -> None:
    a = CRAWL.start[0]
    world.answer(a, rows("1"))
    assert (world.page(a).etag, world.page(a).last_modified) == ('"1"', "yesterday")
    world.answer(a, b'[{"k": ')
    assert (world.page(a).etag, world.page(a).last_modified) == ("", "")


def test_a_document_with_one_nan_is_read(world: World) -> None:
    world.answer(CRAWL.start[0], b'[{"k": "1", "v": NaN}, {"k": "2", "v": "x"}]')
    assert world.values() == {"1": '{"v":null}', "2": '{"v":"x"}'}


def test_bodies_of_a_page_that_is_gone_go_unless_another_needs_them(world: World) -> None:
    a, b = CRAWL.start
    world.answer(a, rows("1"))
    world.answer(a, rows("1", "2"))
    world.answer(b, rows("1", "2"))
    assert len(world.blobs.items) == 2
    world.answer(a, status=404)
    (body,) = world.frontier.newest_bodies("shop")
    assert (body.url, list(world.blobs.items)) == (b, [body_name(body.digest)])
    world.answer(b, status=410)
    assert not world.blobs.items and not world.frontier.newest_bodies("shop")


def test_an_entity_ends_with_the_page_that_had_it_last(world: World) -> None:
    a, b = CRAWL.start
    world.answer(a, rows("1", "2"))
    world.answer(b, rows("1"))
    world.answer(a, status=404)
    assert world.values() == {"1": '{"v":"x"}', "2": None}


def test_keys_max_counts_what_lives(tmp_path: Path) -> None:
    def plain(world: World) -> dict[str, str | None]:
        return {key: None if values is None else json.loads(values)["v"] for key, values in world.values().items()}

    crawl = Crawl(**{**{f: getattr(CRAWL, f) for f in CRAWL.__struct_fields__}, "keys_max": 2})
    world = World(tmp_path, crawl)
    a, b = crawl.start
    world.answer(a, rows("1", "2", "3"))
    assert plain(world) == {"1": "x", "2": "x"}
    world.answer(b, rows("4"))
    world.answer(a, status=404)
    world.answer(b, rows("4", "1", "5", v="y"))
    assert plain(world) == {"1": "y", "2": None, "4": "y"}
    world.frontier.close()
    again = World(tmp_path, crawl)
    again.answer(b, rows("6"))
    assert "6" not in again.values()
    again.answer(b, status=404)
    again.answer(b, rows("6"))
    assert again.values()["6"] == '{"v":"x"}'
    again.frontier.close()


def test_what_is_beyond_a_bound_is_counted_told_once_a_day_and_taken_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {f: getattr(CRAWL, f) for f in CRAWL.__struct_fields__}
    crawl = Crawl(**{**fields, "keys_max": 2, "pages_max": 3, "follow": (Follow(at="[].to"),)})
    world = World(tmp_path, crawl)

    def over() -> tuple[float, float]:
        counted = [world.metrics.counters["beyond_bound_total", f"shop {bound}"] for bound in BOUNDS]
        return counted[0], counted[1]

    a, b = crawl.start
    body = json.dumps([{"k": key, "v": "x", "to": f"http://site/{key}"} for key in "123"]).encode()
    assert over() == (0, 0), "the series begins at 0, so that an alert sees its first count"
    world.answer(a, body)
    assert over() == (1, 2) and world.urls() == ["http://site/1", a, b]
    assert (world.page(a).etag, world.page(a).last_modified) == ("", ""), "304 would keep them away for good"
    world.answer(a, body)
    assert over() == (2, 4)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "source shop has reached keys_max",
        "source shop has reached pages_max",
    ]
    world.clock.advance(86_400)
    world.answer(a, body)
    assert len(caplog.records) == 4
    world.answer("http://site/1", rows("1"))
    world.answer("http://site/1", status=404)
    world.answer(a, json.dumps([{"k": "3", "v": "x", "to": "http://site/3"}]).encode())
    assert world.values() == {"1": None, "2": '{"v":"x"}', "3": '{"v":"x"}'} and "http://site/3" in world.urls()
    assert over() == (3, 6) and world.page(a).etag == '"1"'
    world.frontier.close()


SITE = Crawl(
    name="shop", kind="json", joins="item_id", start=("http://site/",), rows="rows", key=Extract(at="k"),
    fields={"v": Extract(at="v")}, follow=(Follow(at="pages"),),
)  # fmt: skip
OLD, NEW = "http://site/old", "http://site/new"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[World]:
    """Return a site whose start leads to one page."""
    one = World(tmp_path, SITE)
    one.answer("http://site/", b'{"rows": [], "pages": ["/old"]}')
    yield one
    one.frontier.close()


def document(*keys: str) -> bytes:
    return json.dumps({"rows": [{"k": key, "v": "x"} for key in keys]}).encode()


@pytest.mark.parametrize("hops", [(301,), (308,), (301, 308)])
def test_a_page_that_moved_for_good_is_the_new_address(site: World, hops: tuple[int, ...]) -> None:
    site.answer(OLD, document("1"))
    site.answer(OLD, document("1"), at=NEW + "#top", hops=hops)
    assert site.urls() == ["http://site/", NEW] and site.frontier.pages("shop") == 2
    assert {body.url for body in site.frontier.newest_bodies("shop")} == {"http://site/", NEW}
    assert len(site.blobs.items) == 2
    # A page that still links to the old address brings it back; that it is gone then ends nothing.
    site.answer("http://site/", b'{"rows": [], "pages": ["/old", "/new"]}')
    site.answer(OLD, status=404)
    assert site.values() == {"1": '{"v":"x"}'} and site.urls() == ["http://site/", NEW]
    site.answer(NEW, status=404)
    assert site.values() == {"1": None} and site.urls() == ["http://site/"]


def test_what_is_not_on_the_new_address_ends_with_the_old_one(site: World) -> None:
    site.answer(OLD, document("1", "2"))
    site.answer(OLD, document("2"), at=NEW, hops=(301,))
    assert site.urls() == ["http://site/", NEW, OLD] and site.values() == {"1": '{"v":"x"}', "2": '{"v":"x"}'}
    site.answer(OLD, status=404)
    assert site.values() == {"1": None, "2": '{"v":"x"}'} and site.urls() == ["http://site/", NEW]


@pytest.mark.parametrize(("url", "at", "hops"), [(OLD, NEW, (302,)), (OLD, NEW, (301, 307)), (OLD, OLD, (301, 301))])
def test_a_page_that_did_not_move_for_good_stays(site: World, url: str, at: str, hops: tuple[int, ...]) -> None:
    site.answer(url, document("1"), at=at, hops=hops)
    assert site.urls() == ["http://site/", OLD]


def test_a_start_that_moved_stays_a_start(site: World) -> None:
    site.answer("http://site/", document("1"), at=NEW, hops=(301,))
    assert site.urls() == ["http://site/", OLD] and site.values() == {"1": '{"v":"x"}'}


class Refusing(ExtractionHere):
    """Refuses what has a word, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.memory, self.reasons = 1, {b"dear": "extraction_cpu", b"killed": "extraction_killed"}

    async def extract(self, document: Document, crawl: Crawl) -> Extracted:
        self.asked.append(document.body)
        reason = next((reason for word, reason in self.reasons.items() if word in document.body), "")
        return Extracted(left_out=Counter({reason: 1})) if reason else await super().extract(document, crawl)

    def bounds(self) -> tuple[int, int]:
        return 1_000, self.memory


def test_a_refused_body_is_not_read_again_until_it_changes_also_by_the_next_crawler(tmp_path: Path) -> None:
    extraction = Refusing()
    world = World(tmp_path, extraction=extraction)
    a = CRAWL.start[0]
    world.answer(a, rows("1"))
    for _ in range(2):
        world.answer(a, rows("1", v="dear"))
    assert len(extraction.asked) == 2 and outcomes(world) == {"taken": 1, "extraction_cpu": 2}
    assert world.values() == {"1": '{"v":"x"}'}, "it keeps what it had"
    assert (world.page(a).etag, world.page(a).failures) == ("", 0)
    world.frontier.close()
    world = World(tmp_path, extraction=extraction)
    world.answer(a, rows("1", v="dear"))
    assert len(extraction.asked) == 2 and outcomes(world) == {"extraction_cpu": 1}
    world.answer(a, rows("1", v="y"))
    assert world.values() == {"1": '{"v":"y"}'} and world.page(a).refused == ""
    world.answer(a, rows("1", v="dear"))
    extraction.memory, extraction.reasons = 2, {}
    world.answer(a, rows("1", v="dear"))
    assert world.values() == {"1": '{"v":"dear"}'}, "other bounds, another try"
    world.frontier.close()


def test_a_page_over_which_the_process_was_killed_is_tried_thrice(tmp_path: Path) -> None:
    extraction = Refusing()
    world = World(tmp_path, extraction=extraction)
    a, b = CRAWL.start
    for _ in range(4):
        world.answer(a, rows("1", v="killed"))
    assert len(extraction.asked) == 3 and outcomes(world) == {"extraction_killed": 4}
    extraction.reasons = {b"killed": "extraction_stalled"}
    for _ in range(5):
        world.answer(b, rows("1", v="killed"))
    assert len(extraction.asked) == 8 and world.page(b).refused == "" and world.page(b).failures == 5
    world.frontier.close()


def test_a_file_of_an_earlier_version_is_gone_on_from(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.answer(CRAWL.start[0], rows("1"))
    world.frontier._db.execute("alter table pages drop column refused")
    world.frontier.close()
    world = World(tmp_path)
    assert world.page(CRAWL.start[0]).refused == "" and world.values() == {"1": '{"v":"x"}'}
    world.frontier.close()
