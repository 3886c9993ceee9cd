"""The shop's catalogue site.

Goal: the crawler's declaration reads the site as it is, prices change with time alone, and unchanged pages are not sent
again. Method: the pages at times of a hand-set clock, over real HTTP, through the crawler's own extraction.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ingest_world import HandClock

from headrace.contract.crawl import located
from headrace.contract.errors import ConfigRejected
from headrace.examples.shop.catalogue import PART, ROUND, SHELF, TURN_S, Catalogue, Site, load_items
from headrace.examples.shop.shop import CATALOGUE, PROJECT
from headrace.examples.shop.traffic import SYNTHETIC_VIDEOS, synthetic
from headrace.ingest.crawl.extract import Document, extract

HOST = "127.0.0.1:8091"
NOW_S = 1_700_000_000
HERE = located(CATALOGUE, {"PORT_CATALOGUE": "8091"})


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue(load_items(None))


def crawled(catalogue: Catalogue, now_s: int) -> dict[str, str]:
    """Return key to values, by the sitemap and the shelves that it names."""
    found: dict[str, str] = {}
    sitemap = catalogue.page("/sitemap.xml", HOST, now_s)
    assert sitemap is not None
    links = extract(Document(f"http://{HOST}/sitemap.xml", sitemap.body, sitemap.content_type, True), HERE).links
    for link in links:
        page = catalogue.page(link.url.removeprefix(f"http://{HOST}"), HOST, now_s)
        assert page is not None
        read = extract(Document(link.url, page.body, page.content_type), HERE)
        assert not read.left_out
        found |= {row.key: row.values for row in read.rows}
    return found


def test_every_video_of_the_visits_is_found_with_every_declared_field(catalogue: Catalogue) -> None:
    found = crawled(catalogue, NOW_S)
    assert len(found) == len(catalogue) == SYNTHETIC_VIDEOS
    assert not any("null" in values for values in found.values())
    shown = set(synthetic(PROJECT.impression.fields, rows=5_000).features["video_id"].to_pylist())
    assert {str(video) for video in shown} <= found.keys()


def test_kuairands_videos_are_served_where_there_is_data(shared: Path) -> None:
    found = crawled(Catalogue(load_items(shared / "data" / "kuairand")), NOW_S)
    assert len(found) == 7_583
    assert {values.split('"')[3] for values in found.values()} == {"4", "7", "8", "9", "11", "none"}


def test_prices_change_a_fifth_of_a_shelf_at_a_time_and_by_the_clock_alone(catalogue: Catalogue) -> None:
    first, again, later = (crawled(catalogue, at_s) for at_s in (NOW_S, NOW_S, NOW_S + ROUND * TURN_S))
    assert first == again == crawled(Catalogue(load_items(None)), NOW_S)
    changed = sum(first[key] != later[key] for key in first)
    assert 0.95 * len(first) / PART <= changed <= len(first) / PART


def test_a_page_changes_exactly_when_it_says_so(catalogue: Catalogue) -> None:
    before = catalogue.page("/shelf/3.json", HOST, NOW_S)
    assert before is not None
    for at_s in range(NOW_S, NOW_S + 2 * ROUND * TURN_S, TURN_S):
        page = catalogue.page("/shelf/3.json", HOST, at_s)
        assert page is not None and NOW_S - ROUND * TURN_S < page.modified_s <= at_s
        assert (page.etag == before.etag) == (page.modified_s == before.modified_s)


@pytest.fixture
def site(catalogue: Catalogue) -> Iterator[tuple[Site, HandClock]]:
    clock = HandClock()
    clock.ms = NOW_S * 1_000
    one = Site(catalogue, "127.0.0.1", 0, clock)
    yield one, clock
    one.close()


def get(site: Site, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(site.url + path, headers={n.replace("_", "-"): v for n, v in headers.items()})
    try:
        answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, dict(answer.headers), answer.read()


def test_an_unchanged_page_is_not_sent_again(site: tuple[Site, HandClock]) -> None:
    served, clock = site
    status, headers, body = get(served, "/shelf/0.json")
    assert status == 200 and len(body) > 40 * SHELF
    etag, modified = headers["ETag"], headers["Last-Modified"]
    assert get(served, "/shelf/0.json", If_None_Match=etag)[0] == 304
    assert get(served, "/shelf/0.json", If_None_Match=f'"other", W/{etag}')[0] == 304
    assert get(served, "/shelf/0.json", If_Modified_Since=modified)[0] == 304
    assert get(served, "/shelf/0.json", If_None_Match='"other"', If_Modified_Since=modified)[0] == 200
    clock.ms += ROUND * TURN_S * 1_000
    assert get(served, "/shelf/0.json", If_None_Match=etag)[0] == 200
    assert get(served, "/shelf/0.json", If_Modified_Since=modified)[0] == 200


def test_robots_people_and_what_is_not_there(site: tuple[Site, HandClock]) -> None:
    served, _ = site
    assert b"Disallow: /cart" in get(served, "/robots.txt")[2]
    assert b"2,000 videos" in get(served, "/")[2]
    assert b"<dd class=price>" in get(served, "/item/7")[2]
    for path in (
        "/item/2000",
        "/shelf/20.json",
        "/shelf/-1.json",
        "/item/x",
        "/cart",
        f"/shelf/{10**4_000}.json",
    ):
        assert get(served, path)[0] == 404, path


def test_a_taken_port_is_refused_by_number(site: tuple[Site, HandClock], catalogue: Catalogue) -> None:
    port = int(site[0].url.rsplit(":", 1)[1])
    with pytest.raises(ConfigRejected, match=str(port)):
        Site(catalogue, "127.0.0.1", port, site[1])


def test_a_crawled_field_is_a_feature_of_the_model_and_the_price_is_not() -> None:
    inputs = {name for feature in PROJECT.features.features for name in feature.inputs()}
    assert {name for name in inputs if name.startswith("external.")} == {"external.catalogue.music"}
    with pytest.raises(ConfigRejected, match="PORT_CATALOGUE"):
        located(CATALOGUE, {})
