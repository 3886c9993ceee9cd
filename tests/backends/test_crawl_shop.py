"""Goal: the crawler brings the demo's whole catalogue, and afterwards only what has changed.

Method: the shop's site and declaration, the crawler as a process with its log a file.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from crawl_world import Crawler
from ingest_world import HandClock

from headrace.contract.crawl import located
from headrace.examples.shop.catalogue import PART, ROUND, TURN_S, Catalogue, Site, load_items
from headrace.examples.shop.shop import CATALOGUE


def test_the_demos_catalogue_is_crawled_and_then_only_its_changes(tmp_path: Path) -> None:
    clock, catalogue = HandClock(), Catalogue(load_items(None))
    site = Site(catalogue, "127.0.0.1", 0, clock)
    crawl = located(CATALOGUE, {"PORT_CATALOGUE": site.url.rsplit(":", 1)[1]})
    crawler = Crawler(tmp_path, msgspec.structs.replace(crawl, every_ms=1_000, delay_ms=0))
    try:
        said = crawler.run()
        assert said["versions_total/catalogue"] == len(catalogue) == len(crawler.newest())
        assert {tuple(values) for values in crawler.newest().values()} == {("music", "price")}
        time.sleep(1.0)
        said = crawler.run()
        assert "pages_total/taken" not in said and "versions_total/catalogue" not in said
        clock.ms += ROUND * TURN_S * 1_000
        time.sleep(1.0)
        said = crawler.run()
        assert 0 < said["versions_total/catalogue"] <= len(catalogue) / PART
    finally:
        crawler.kill()
        site.close()
