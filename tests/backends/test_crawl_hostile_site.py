"""Goal: what a hostile site answers is refused by name and costs the crawler nothing else; what it answers whole is
read once. Method: a site that lies, the crawler as a process, counts from outside."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import brotli
import psutil
import pytest
from crawl_world import NEVER_S, Answer, Crawler, Site, catalogue, eventually, item, links

ROBOTS = {"Content-Type": "text/plain"}


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    several = [Site(), Site()]
    yield several
    for one in several:
        one.close()


def html(text: str) -> Answer:
    return 200, {}, text.encode()


def dear(number: int) -> Answer:
    return html(f"<b class=price data-id={number}>1</b>" + "<div class=a>" * 1_000 + "<i class=r></i>" * 9_000)


def crawl(folder: Path, site: Site, pages: dict[str, Any], **changes: Any) -> tuple[dict[str, float], Crawler]:
    """Crawl these pages once; return what came of them, and the crawler."""
    site.pages |= {"/": (200, {}, links(*pages)), **pages}
    crawler = Crawler(folder, catalogue(site, **changes), retry_first_ms=60_000)
    try:
        said = crawler.run()
    finally:
        crawler.kill()
    return {
        name: count for name, count in said.items() if name.startswith(("pages_total/", "left_out_total/"))
    }, crawler


def test_what_is_no_whole_answer_of_a_declared_place_is_named_and_gives_nothing(
    sites: list[Site], tmp_path: Path
) -> None:
    site, other = sites
    other.pages = {"/private": item(99, 1.0)}
    packed, squeezed = (pack(item(21, 1.0)[2] * 9) for pack in (gzip.compress, brotli.compress))
    pages = {
        "/item/port": (302, {"Location": f"{other.url}/private"}, b""),
        "/item/password": (302, {"Location": site.url.replace("//", "//me:secret@") + "/item/ok"}, b""),
        "/item/gzip": (200, {"Content-Encoding": "gzip"}, packed[:-5]),
        "/item/brotli": (200, {"Content-Encoding": "br"}, squeezed[:-5]),
        "/item/unasked": (304, {}, b""),
        "/item/deep": html("<div>" * 3_000 + "<b class=price data-id=22>1</b>"),
        "/item/links": html(f'<a href="/item/{"u" * 100_000}"></a><b class=price data-id=23>1</b>'),
        "/item/hex": (200, {"Content-Type": "text/html; charset=hex"}, item(24, 1.0)[2]),
        "/item/whole": (200, {"Content-Encoding": "gzip"}, gzip.compress(item(25, 1.0)[2])),
        "/item/ok": item(26, 1.0),
    }
    said, crawler = crawl(tmp_path, site, pages)
    assert said == {
        "pages_total/off_host": 2, "pages_total/torn": 2, "pages_total/status_3xx": 1, "pages_total/too_deep": 1,
        "pages_total/taken": 5, "left_out_total/too_deep": 1, "left_out_total/link_too_long": 1,
        "left_out_total/no_key": 1,
    }  # fmt: skip
    assert sorted(crawler.newest()) == ["23", "24", "25", "26"] and not other.asked


def test_a_robots_txt_leads_to_no_place_that_is_not_declared(sites: list[Site], tmp_path: Path) -> None:
    site, other = sites
    site.pages["/robots.txt"] = (301, {"Location": f"{other.url}/robots.txt"}, b"")
    said, _ = crawl(tmp_path, site, {"/item/1": item(1, 1.0)})
    assert said == {"pages_total/robots_unreadable": 1} and not other.asked


def test_a_robots_txt_of_very_many_agents_is_read(sites: list[Site], tmp_path: Path) -> None:
    """Protego kept each rule of each agent: minutes for this one, and tens of GB."""
    robots = "".join(f"User-agent: a{n}\n" for n in range(20_000)) + "".join(f"Disallow: /{n}\n" for n in range(20_000))
    sites[0].pages["/robots.txt"] = (200, ROBOTS, f"{robots}User-agent: *\nDisallow: /item/2\n".encode())
    said, crawler = crawl(tmp_path, sites[0], {"/item/1": item(1, 1.0), "/item/2": item(2, 1.0)})
    assert list(crawler.newest()) == ["1"] and said["pages_total/robots"] == 1


def test_headers_without_an_end_are_let_go(sites: list[Site], tmp_path: Path) -> None:
    """All of them were kept, until the time of the request was over."""
    sent = [0]

    def endless(site: Site, handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):
            while sent[0] < 2**26:
                sent[0] += handler.wfile.write(b"X-A: b\r\n" * 10_000)

    said, crawler = crawl(tmp_path, sites[0], {"/item/1": endless, "/item/2": item(2, 1.0)}, timeout_ms=60_000)
    assert said["pages_total/failed"] == 1 and list(crawler.newest()) == ["2"] and sent[0] < 2**25


def test_a_page_that_is_too_dear_costs_itself_alone_and_once(sites: list[Site], tmp_path: Path) -> None:
    site = sites[0]
    pages = {"/item/dear": dear(1), "/item/2": item(2, 1.0), "/item/3": item(3, 1.0)}
    asks = {"rows": ".price, .a .r", "every_ms": 1_000}
    site.pages |= {"/": (200, {}, links(*pages)), **pages}
    crawler = Crawler(tmp_path, catalogue(site, **asks), extract_cpu_ms=1_000)
    try:
        said = crawler.run()
        assert said["pages_total/extraction_cpu"] == said["left_out_total/extraction_cpu"] == 1
        assert sorted(crawler.newest()) == ["2", "3"]
        crawler.begin()
        # The next crawler refuses the same body without reading it, and reads another.
        eventually(lambda: site.asked["/item/dear"] >= 2)
        site.pages["/item/dear"] = item(1, 2.0)
        eventually(lambda: "1" in crawler.newest())
        assert crawler.stop()["pages_total/extraction_cpu"] >= 1
    finally:
        crawler.kill()


def test_the_probes_answer_while_a_hostile_site_holds_everything(sites: list[Site], tmp_path: Path) -> None:
    """Each page is held until the probes have answered: what one of them stops would stop the test."""
    site, answered = sites[0], threading.Event()

    def held(lead: bytes, piece: bytes) -> Any:
        def page(site: Site, handler: Any) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + lead)
            with contextlib.suppress(OSError):
                while not answered.wait(0.01):
                    handler.wfile.write(piece)

        return page

    text = b"Content-Type: text/html\r\n"
    pages = {
        "/item/loris": held(b"", b"X-A: b\r\n"),
        "/item/slow": held(text + b"Content-Length: 99999\r\n\r\n", b"x"),
        "/item/endless": held(text + b"\r\n", b"x" * 1_000),
        "/item/bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"x" * 50_000_000)),
        "/item/links": html("".join(f"<a href=/item/{n}></a>" for n in range(100_000))),
    }
    site.pages |= {"/": (200, {}, links(*pages)), **pages}
    hostile = catalogue(site, parallel=8, pages_max=1_000_000, timeout_ms=600_000, bytes_max=2**28)
    crawler = Crawler(tmp_path, hostile)
    try:
        crawler.begin("probed")
        eventually(lambda: all(site.asked[path] for path in pages))
        port = int((tmp_path / "port").read_text())
        for _ in range(20):
            for path, said in (("readyz", b"ready\n"), ("healthz", b"alive\n")):
                with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=NEVER_S) as answer:
                    assert answer.read() == said
        eventually(lambda: sum(site.asked.values()) > 60)
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=NEVER_S) as answer:
            assert answer.status == 200
    finally:
        answered.set()
        crawler.kill()


@pytest.mark.parametrize("mode", ["stop", "kill"])
def test_a_crawler_that_ends_while_a_page_is_extracted_leaves_no_process(
    sites: list[Site], tmp_path: Path, mode: str
) -> None:
    site = sites[0]
    site.pages |= {"/": dear(1)}
    crawler = Crawler(tmp_path, catalogue(site, rows=".price, .a .r"), extract_cpu_ms=600_000)
    crawler.begin()
    assert crawler.process is not None
    parent = psutil.Process(crawler.process.pid)
    (child,) = eventually(parent.children)
    eventually(lambda: child.cpu_times().user > 2.0)
    crawler.kill() if mode == "kill" else crawler.stop()
    eventually(lambda: not child.is_running())
    site.pages["/"] = item(1, 1.0)
    crawler.run()
    assert list(crawler.newest()) == ["1"]
