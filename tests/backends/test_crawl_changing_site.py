"""Goal: the account of `headrace chaos --stage crawl` closes on the real crawler, killed with -9 while a site changes.

Method: chaos's site, the crawler as a process with its real frontier and store, its log a file; no Kafka, which
`headrace chaos` adds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pyarrow as pa
from crawl_process import PARTITIONS
from crawl_world import Crawler, eventually

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.formats.events import EXTERNAL_SCHEMA, encode_batch
from headrace.contract.interfaces.log import Record
from headrace.deploy.local.chaos.crawl_account import ChangingSite, CrawlAccount, closes, count

KILLS, RECEIPT_S = 3, 0.3
SOURCES = [
    Crawl(
        name=name,
        kind="html",
        joins="item_id",
        start=("http://shop.example/",),
        key=Extract(at=".id::text"),
        fields={"price": Extract(at=".p::text", type=kind)},
    )
    for name, kind in (("shelf", "float64"), ("words", "list[string]"))
]


def records(crawler: Crawler) -> list[Record]:
    found = []
    for line in crawler.records():
        if line["topic"] == "events":
            value = encode_batch(pa.RecordBatch.from_pylist(line["rows"], schema=EXTERNAL_SCHEMA))
            found.append(Record("events", line["partition"], 0, None, value, {"kind": "external"}, 0))
        else:
            value = json.dumps(line["value"], ensure_ascii=False, separators=(",", ":")).encode()
            found.append(Record("features", 0, 0, line["key"].encode(), value, {}, 0))
    return found


def test_every_version_that_a_killed_crawler_settled_is_in_the_log_once(tmp_path: Path) -> None:
    site = ChangingSite(SOURCES, dict.fromkeys(("shelf", "words"), "int64"), 5)
    site.start()
    crawler = Crawler(tmp_path, *site.sources(), receipt_s=RECEIPT_S)
    try:
        for kill in range(1, KILLS + 1):
            crawler.begin()
            # Killed in the middle of the pages, with versions on their way.
            eventually(lambda least=kill * 30: sum(len(page.sent) for page in site.pages.values()) >= least)
            crawler.kill()
        crawler.begin()
        account = CrawlAccount(unsettled=site.rest(60.0))
        time.sleep(1.0 + RECEIPT_S)
        crawler.stop()
        written = records(crawler)
        events, features = ([r for r in written if r.topic == topic] for topic in ("events", "features"))
        count(site, events, features, PARTITIONS, account)
        assert closes(account), msgspec.structs.asdict(account)
        assert account.acknowledged >= 400 * len(SOURCES) and account.made_up == 0
        assert crawler.run("again")["changed"] == 0
    finally:
        crawler.kill()
        site.close()
