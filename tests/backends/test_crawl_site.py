"""Goal: the crawler is polite, bounded and exact on a hostile site. Method: a real site, the crawler as a process with
its real frontier and store, its log a file; the site is asked what it was asked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crawl_world import Crawler, Site, catalogue, eventually, gzipped, item, links

from headrace.contract.crawl import Crawl, Extract, Follow

XML = {"Content-Type": "application/xml"}


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    yield one
    one.close()


@pytest.fixture
def crawlers() -> Iterator[list[Crawler]]:
    started: list[Crawler] = []
    yield started
    for one in started:
        one.kill()


def made(crawlers: list[Crawler], folder: Path, *crawls: Crawl, **config: Any) -> Crawler:
    crawlers.append(Crawler(folder, *crawls, **config))
    return crawlers[-1]


def again(crawler: Crawler, crawl: Crawl) -> dict[str, Any]:
    """Run once more when all is due again."""
    time.sleep(crawl.every_ms / 1000)
    return crawler.run()


def test_every_partition_has_the_versions_in_one_order_and_serving_the_newest(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    site.pages = {"/": (200, {}, links(*(f"/item/{n}" for n in range(20))))}
    site.pages |= {f"/item/{n}": item(n, n + 0.5) for n in range(20)}
    crawler = made(crawlers, tmp_path, catalogue(site))
    crawler.run()
    assert crawler.newest() == {
        str(n): {"name": f"Item {n}", "price": n + 0.5, "tags": ["red", "new"]} for n in range(20)
    }
    assert crawler.versions(0) == crawler.versions(1) == crawler.versions(2)
    served = {r["key"]: r["value"]["values"] for r in crawler.records() if r["topic"] == "features"}
    assert served == {f"external/catalogue/{key}": values for key, values in crawler.newest().items()}


def test_only_what_changed_is_written_and_unchanged_pages_are_asked_with_their_etag(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    site.pages = {"/": (200, {}, links("/item/1", "/item/2", "/item/3"))}
    site.pages |= {"/item/1": item(1, 1.0, etag='"a"'), "/item/2": item(2, 2.0, etag='"a"'), "/item/3": item(3, 3.0)}
    crawl = catalogue(site, every_ms=1_000)
    crawler = made(crawlers, tmp_path, crawl)
    crawler.run()
    # 1: new etag, new content. 2: the same. 3: no etag, the same content. And once: a new etag, the same content.
    site.pages["/item/1"] = item(1, 1.25, etag='"b"')
    said = again(crawler, crawl)
    assert (said["pages_total/not_modified"], said["versions_total/catalogue"]) == (1, 1)
    site.pages["/item/2"] = item(2, 2.0, etag='"c"')
    said = again(crawler, crawl)
    assert "versions_total/catalogue" not in said
    versions = [(v["key"], v["values"]["price"]) for v in crawler.versions()]
    assert sorted(versions) == [("1", 1.0), ("1", 1.25), ("2", 2.0), ("3", 3.0)]
    times = [v["crawl_time_ms"] for v in crawler.versions() if v["key"] == "1"]
    assert times[0] < times[1]


def test_robots_txt_is_obeyed(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    robots = b"User-agent: *\nDisallow: /item/secret\n"
    site.pages = {"/robots.txt": (200, {"Content-Type": "text/plain"}, robots)}
    site.pages |= {"/": (200, {}, links("/item/1", "/item/2", "/item/3", "/item/secret"))}
    site.pages |= {f"/item/{n}": item(n, 1.0) for n in (1, 2, 3)}
    crawler = made(crawlers, tmp_path, catalogue(site), user_agent="headrace (+mailto:me@example.org)")
    said = crawler.run()
    assert site.asked["/item/secret"] == 0 and said["pages_total/robots"] == 1
    assert site.agents == {"headrace (+mailto:me@example.org)"} and site.asked["/robots.txt"] == 1


def test_a_site_is_asked_one_by_one_where_its_robots_txt_wants_a_delay(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    at_once, most = [0], [0]

    def page(site: Site, handler: Any) -> Any:
        with site.lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        with site.lock:
            at_once[0] -= 1
        return item(int(handler.path.rsplit("/", 1)[1]), 1.0)

    site.pages = {"/robots.txt": (200, {"Content-Type": "text/plain"}, b"User-agent: *\nCrawl-delay: 0.02\n")}
    site.pages |= {"/": (200, {}, links(*(f"/item/{n}" for n in range(12)))), "/item/*": page}
    crawler = made(crawlers, tmp_path, catalogue(site, parallel=8))
    crawler.run()
    assert len(crawler.newest()) == 12 and most == [1]


def test_a_robots_txt_that_fails_allows_nothing_and_then_something(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    site.pages = {"/robots.txt": (500, {}, b"oh"), "/": (200, {}, links(*(f"/item/{n}" for n in range(40))))}
    site.pages |= {"/item/*": lambda site, handler: item(int(handler.path.rsplit("/", 1)[1]), 1.0)}
    crawl = catalogue(site, every_ms=1_000)
    crawler = made(crawlers, tmp_path, crawl, retry_first_ms=100)
    said = crawler.run()
    assert said["pages_total/robots_unreadable"] == 1 and site.asked["/"] == 0
    site.pages["/robots.txt"] = (404, {}, b"none")
    again(crawler, crawl)
    assert len(crawler.newest()) == 40 and site.asked["/"] == 1
    site.pages["/robots.txt"] = (503, {}, b"oh")
    before = site.asked.copy()
    said = again(crawler, crawl)
    # The host is left alone: beside the first page only those that were on their way meet it, twice `parallel`.
    assert 1 <= said["pages_total/robots_unreadable"] <= 8 and site.asked["/robots.txt"] - before["/robots.txt"] <= 8
    assert site.asked - before == {"/robots.txt": site.asked["/robots.txt"] - before["/robots.txt"]}
    assert None not in crawler.newest().values()


def test_retry_after_holds_the_whole_host(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    """For a day, so that no busy machine is too slow to see it; test_crawl_hosts.py has how long."""
    site.pages = {"/": (200, {}, links(*(f"/item/{n}" for n in range(20))))}
    site.pages |= {"/item/*": (429, {"Retry-After": "86400"}, b"slow down")}
    crawler = made(crawlers, tmp_path, catalogue(site, parallel=1), retry_first_ms=1, retry_max_ms=1)
    said = crawler.run()
    # What was on its way when it came, twice `parallel`.
    assert 1 <= said["pages_total/status_429"] <= 2
    before = site.asked.copy()
    # The next crawler knows of it too.
    assert "pages_total/status_429" not in crawler.run() and site.asked == before


def test_a_failing_page_is_asked_again_with_growing_pauses(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    def third_time(site: Site, handler: Any) -> Any:
        return item(1, 1.0) if site.asked["/"] > 3 else (500, {}, b"oh")

    site.pages = {"/": third_time}
    crawler = made(crawlers, tmp_path, catalogue(site), retry_first_ms=200)
    crawler.begin("serve")
    eventually(lambda: crawler.newest())
    crawler.stop()
    times = site.times_s["/"]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(gaps) == 3 and all(gap >= least for gap, least in zip(gaps, (0.2, 0.4, 0.8), strict=True))


def test_hostile_answers_cost_bounds_and_nothing_else(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    def huge(site: Site, handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.end_headers()
        try:
            for _ in range(2_000):
                handler.wfile.write(b"x" * 65_536)
        except OSError:
            pass

    def slow(site: Site, handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                handler.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    names = ("loop", "huge", "bomb", "slow", "cut", "pdf", "latin", "off", "broken", "ok", "moved")
    site.pages = {"/": (200, {}, links(*(f"/item/{name}" for name in names)))}
    site.pages |= {
        "/item/loop": (302, {"Location": "/item/loop"}, b""),
        "/item/huge": huge,
        "/item/bomb": (200, {"Content-Encoding": "gzip"}, gzipped("x" * 50_000_000)),
        "/item/slow": slow,
        "/item/cut": (200, {"Transfer-Encoding": "chunked"}, b"ffff\r\nhalf"),
        "/item/pdf": (200, {"Content-Type": "application/pdf"}, b"%PDF-1.4"),
        "/item/latin": (
            200,
            {"Content-Type": "text/html; charset=iso-8859-1"},
            b"<h1 class=name>Caf\xe9</h1><b class=price data-id=7>1.0</b>",
        ),
        "/item/off": (302, {"Location": "http://localhost:1/item/9"}, b""),
        "/item/broken": (200, {}, b"<h1 class=name>A<b class=price data-id=8>2.5<div><p></b <<< &#xD800; \x00"),
        "/item/moved": (301, {"Location": "/item/ok"}, b""),
        "/item/ok": item(9, 9.0),
    }
    crawl = catalogue(site, bytes_max=1_000_000, timeout_ms=2_000)
    crawler = made(crawlers, tmp_path, crawl, retry_first_ms=60_000)
    said = crawler.run()
    newest = crawler.newest()
    assert newest["7"]["name"] == "Café" and newest["8"]["price"] == 2.5 and newest["9"]["price"] == 9.0
    assert set(newest) == {"7", "8", "9"}
    assert said["pages_total/redirects"] == 1 and site.asked["/item/loop"] <= 7
    assert said["pages_total/too_large"] == 2 and said["body_bytes_total"] < 1_000_000
    assert said["pages_total/wrong_type"] == 1 and said["pages_total/off_host"] == 1
    assert said["pages_total/timeout"] >= 1


def test_endless_links_end_at_the_bounds(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    def maze(site: Site, handler: Any) -> Any:
        number = int(handler.path.rsplit("/", 1)[1] or 0)
        return 200, {}, links(*(f"/item/{number * 10 + i}" for i in range(1, 10)))

    site.pages = {"/": (200, {}, links("/item/1")), "/item/*": maze}
    (tmp_path / "a").mkdir()
    made(crawlers, tmp_path / "a", catalogue(site, depth_max=2)).run()
    assert sum(site.asked.values()) == 1 + 1 + 1 + 9
    site.asked.clear()
    (tmp_path / "b").mkdir()
    made(crawlers, tmp_path / "b", catalogue(site, depth_max=1_000, pages_max=40)).run()
    assert sum(site.asked.values()) == 1 + 40


def test_feeds_json_and_sitemaps(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    rss = """<?xml version="1.0"?><rss version="2.0" xmlns:x="urn:x"><channel><title>t</title>
      <item><guid>n1</guid><title>One &amp; only</title><x:score>7</x:score></item>
      <item><guid>n2</guid><title>Two</title></item></channel></rss>"""
    page_1 = b'{"items": [{"id": 1, "price": {"eur": 2.5}}, {"id": 2, "price": null}], "next": "/api?page=2"}'
    index = f"<sitemapindex><sitemap><loc>{site.url}/map.xml.gz</loc></sitemap></sitemapindex>"
    urls = "".join(f"<url><loc>{site.url}/item/{n}</loc><lastmod>2026-11-0{n}</lastmod></url>" for n in (1, 2))
    site.pages = {
        "/feed": (200, {"Content-Type": "application/rss+xml"}, rss.encode()),
        "/api": (200, {"Content-Type": "application/json"}, page_1),
        "/api?page=2": (200, {"Content-Type": "application/json"}, b'{"items": [{"id": 3, "price": {"eur": 1}}]}'),
        "/index.xml": (200, XML, index.encode()),
        "/map.xml.gz": (200, {"Content-Type": "application/gzip"}, gzipped(f"<urlset>{urls}</urlset>")),
        "/item/1": item(1, 1.0),
        "/item/2": item(2, 2.0),
    }
    news = Crawl(
        name="news", kind="feed", joins="item_id", start=(f"{site.url}/feed",), delay_ms=0,
        key=Extract(at="guid::text"),
        fields={"title": Extract(at="title::text"), "score": Extract(at="score::text", type="int64")},
    )  # fmt: skip
    prices = Crawl(
        name="prices", kind="json", joins="item_id", start=(f"{site.url}/api",), delay_ms=0, rows="items",
        key=Extract(at="id"), fields={"eur": Extract(at="price.eur", type="float64")}, follow=(Follow(at="next"),),
    )  # fmt: skip
    pages = catalogue(site, start=(), sitemaps=(f"{site.url}/index.xml",))
    crawler = made(crawlers, tmp_path, news, prices, pages)
    crawler.run()
    rows = {(v["source"], v["key"]): v["values"] for v in crawler.versions()}
    assert rows["news", "n1"] == {"title": "One & only", "score": 7}
    assert rows["news", "n2"] == {"title": "Two", "score": None}
    assert [rows["prices", k]["eur"] for k in "123"] == [2.5, None, 1.0]
    assert rows["catalogue", "1"]["price"] == 1.0 and rows["catalogue", "2"]["price"] == 2.0


def test_an_entity_ends_with_its_page(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    site.pages = {"/": (200, {}, links("/item/1")), "/item/1": item(1, 1.0)}
    crawl = catalogue(site, every_ms=1_000)
    crawler = made(crawlers, tmp_path, crawl)
    crawler.run()
    site.pages["/item/1"] = (410, {}, b"gone")
    again(crawler, crawl)
    assert [v["values"] is None for v in crawler.versions()] == [False, True]
    assert [r["value"] is None for r in crawler.records() if r["topic"] == "features"] == [False, True]
    site.pages["/item/1"] = item(1, 1.0)
    again(crawler, crawl)
    assert [v["values"] is None for v in crawler.versions()] == [False, True, False]


def test_a_start_that_is_declared_no_more_is_asked_for_no_more(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    site.pages = {"/": (200, {}, links("/item/1")), "/old": (200, {}, links("/item/2"))}
    site.pages |= {f"/item/{n}": item(n, 1.0) for n in (1, 2)}
    crawl = catalogue(site, start=(f"{site.url}/", f"{site.url}/old"), every_ms=1_000)
    crawler = made(crawlers, tmp_path, crawl)
    crawler.run()
    before = site.asked.copy()
    crawler.declare(catalogue(site, every_ms=1_000))
    again(crawler, crawl)
    # What it led to is known by now, and asked for until it is gone.
    assert {path for path, times in site.asked.items() if times > before[path]} >= {"/", "/item/1", "/item/2"}
    assert site.asked["/old"] == before["/old"]


def test_stored_bodies_are_extracted_again_without_a_request(
    site: Site, crawlers: list[Crawler], tmp_path: Path
) -> None:
    site.pages = {"/": (200, {}, links("/item/1", "/item/2")), "/item/1": item(1, 1.0), "/item/2": item(2, 2.0)}
    crawler = made(crawlers, tmp_path, catalogue(site))
    crawler.run()
    asked = sum(site.asked.values())
    fields = {"cents": Extract(at=".price::text", type="int64", pattern=r"(\d+)")}
    crawler.declare(catalogue(site, fields=fields))
    assert crawler.run("again")["changed"] == 2 and crawler.run("again")["changed"] == 0
    assert crawler.newest() == {"1": {"cents": 1}, "2": {"cents": 2}}
    assert sum(site.asked.values()) == asked


def test_a_second_crawler_on_the_same_folder_is_refused(site: Site, crawlers: list[Crawler], tmp_path: Path) -> None:
    site.pages = {"/": item(1, 1.0)}
    crawler = made(crawlers, tmp_path, catalogue(site))
    crawler.begin()
    eventually(lambda: site.asked["/"])
    second = made(crawlers, tmp_path, catalogue(site))
    second.begin()
    assert second.process is not None
    _, errors = second.process.communicate(timeout=60)
    assert second.process.returncode == 1 and "belongs to a crawler that runs" in errors
    crawler.stop()


@pytest.mark.parametrize("receipt_s", [0.0, 1.0])
def test_a_killed_crawler_fetches_nothing_again_and_loses_no_version(
    site: Site, crawlers: list[Crawler], tmp_path: Path, receipt_s: float
) -> None:
    count = 120
    site.pages = {"/": (200, {}, links(*(f"/item/{n}" for n in range(count))))}
    site.pages |= {f"/item/{n}": item(n, float(n)) for n in range(count)}
    crawl = catalogue(site, delay_ms=10)
    crawler = made(crawlers, tmp_path, crawl, receipt_s=receipt_s)
    kills = 0
    for least in (20, 50, 80, 110):
        crawler.begin("serve")
        eventually(lambda least=least: sum(site.asked.values()) >= least)
        crawler.kill()
        kills += 1
    crawler.run()
    assert len(crawler.newest()) == count
    assert all(crawler.newest()[str(n)]["price"] == float(n) for n in range(count))
    # What was on its way when the process died, at most 8 requests a kill, is asked for once more; nothing else.
    twice = {path: times for path, times in site.asked.items() if times > 1 and path != "/robots.txt"}
    assert sum(times - 1 for times in twice.values()) <= 8 * kills
    for partition in range(3):
        rows = crawler.versions(partition)
        assert {row["key"] for row in rows} == {str(n) for n in range(count)}
        seen = {(row["key"], row["crawl_time_ms"], row["version"]) for row in rows}
        # A version that was sent again is the same one, crawl time included, unless its page was asked for again.
        assert len(seen) <= count + 8 * kills
