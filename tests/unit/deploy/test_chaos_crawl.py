"""Goal: the crawler's account sees what is lost, twice, made up, old or mixed, and closes on what is right.

Method: the changing site over real HTTP, asked as a crawler asks; what it sent goes to a log that is tampered with.
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import EXTERNAL_SCHEMA, ExternalValue, encode_batch
from headrace.contract.interfaces.log import Record
from headrace.deploy.local.chaos.changing_site import ChangingSite
from headrace.deploy.local.chaos.crawl_account import CrawlAccount, closes, count, count_stored
from headrace.deploy.local.chaos.plan import STORE, victims_of
from headrace.ingest.crawl.extract import Document, extract

PARTITIONS = 2
SOURCE = Crawl(
    name="shelf",
    kind="html",
    joins="item_id",
    start=("http://shop.example/",),
    key=Extract(at=".id::text"),
    fields={"price": Extract(at=".p::text", type="float64"), "tags": Extract(at=".t::text", type="list[string]")},
)


@pytest.fixture
def site() -> Iterator[ChangingSite]:
    one = ChangingSite([SOURCE], {"shelf": "int64"}, 7)
    one.start()
    yield one
    one.close()


class Asker:
    """Asks as the crawler does, and keeps what changed: rows of `events`, in order."""

    def __init__(self, site: ChangingSite) -> None:
        self.site, self.source = site, site.sources()[0]
        self.etags: dict[str, str] = {}
        self.newest: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []

    def ask(self, path: str) -> None:
        request = urllib.request.Request(self.site.url + path, headers={"If-None-Match": self.etags.get(path, "")})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
                body, self.etags[path] = answer.read(), answer.headers["ETag"]
        except urllib.error.HTTPError as error:
            assert error.code == 304
            error.close()
            return
        read = extract(Document(self.site.url + path, body, "application/json"), self.source)
        assert not read.left_out
        for row in read.rows:
            if self.newest.get(row.key) != row.values:
                self.newest[row.key] = row.values
                self.rows.append(version(row.key, row.values, at_ms=1_000 + len(self.rows)))

    def all_pages(self) -> None:
        for path in self.site.pages:
            self.ask(path)


def version(key: str, values: str, *, at_ms: int, epoch: int = 1) -> dict[str, Any]:
    digest = hashlib.sha256(values.encode()).hexdigest()[:16]
    row = {"source": "shelf", "key": key, "crawl_time_ms": at_ms, "epoch": epoch, "version": digest}
    return {**row, "values": values, "url": "u"}


@pytest.fixture
def asker(site: ChangingSite) -> Asker:
    """A crawler that has all that the site shows at last, and that the site knows to have it."""
    one = Asker(site)
    one.ask("/shelf/")
    one.all_pages()
    before = changes(site)
    while changes(site) < before + 10:
        time.sleep(0.01)
    one.all_pages()
    assert site.rest(0.0) > 0, "the newest bodies are sent, and nothing says that they have arrived"
    # Once for what changed until the rest, once more to say that it has arrived.
    one.all_pages()
    one.all_pages()
    assert site.rest(0.0) == 0
    return one


def changes(site: ChangingSite) -> int:
    return sum(sum(page.changes.values()) for page in site.pages.values())


def record(partition: int, rows: list[dict[str, Any]]) -> Record:
    batch = pa.RecordBatch.from_pylist(rows, schema=EXTERNAL_SCHEMA)
    return Record("events", partition, 0, None, encode_batch(batch), {"kind": "external"}, 0)


def features(asker: Asker) -> list[Record]:
    found = []
    for key, values in asker.newest.items():
        value = msgspec.json.encode(ExternalValue(1, 1, msgspec.Raw(values.encode())))
        found.append(Record("features", 0, 0, f"external/shelf/{key}".encode(), value, {}, 0))
    return found


def drawn(asker: Asker, *parts: list[dict[str, Any]], served: list[Record] | None = None) -> CrawlAccount:
    account = CrawlAccount()
    events = [record(p, rows) for p, rows in enumerate(parts) if rows]
    count(asker.site, events, features(asker) if served is None else served, PARTITIONS, account)
    return account


def wrong(account: CrawlAccount) -> dict[str, int]:
    names = ("unsettled", "lost", "twice", "made_up", "out_of_order", "differing", "stale", "mixed", "bodies_changed")
    return {name: getattr(account, name) for name in names if getattr(account, name)}


def test_what_was_crawled_once_closes(asker: Asker) -> None:
    account = drawn(asker, asker.rows, asker.rows)
    assert wrong(account) == {} and closes(account)
    assert account.sent == account.acknowledged == account.logged == len(asker.rows) > 400


def test_sent_again_after_a_kill_is_a_repeat(asker: Asker) -> None:
    again = [*asker.rows[:-30], *({**row, "epoch": 2} for row in asker.rows[-50:])]
    account = drawn(asker, again, again)
    assert wrong(account) == {} and account.repeated_in_log == PARTITIONS * 20


Tamper = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def _twice(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, other = rows[0], {**rows[-1], "key": rows[0]["key"]}
    back = {**first, "crawl_time_ms": 10**6 + 1}
    return [first, {**other, "crawl_time_ms": 10**6}, back, *rows[1:]]


@pytest.mark.parametrize(
    ("tamper", "seen"),
    [
        (lambda rows: rows[1:], {"lost"}),
        (lambda rows: rows[:-1], {"lost", "stale"}),
        (_twice, {"twice", "made_up"}),
        (lambda rows: [*rows, version("0", '{"price":0.25,"tags":[]}', at_ms=10**6)], {"made_up"}),
        (lambda rows: [{**row, "epoch": 1 if at else 2} for at, row in enumerate(rows)], {"lost", "stale"}),
    ],
    ids=["the first lost", "the last lost", "twice", "made up", "a ghost's"],
)
def test_a_tampered_log_does_not_close(asker: Asker, tamper: Tamper, seen: set[str]) -> None:
    rows = tamper(asker.rows)
    account = drawn(asker, rows, rows)
    assert seen <= wrong(account).keys() and not closes(account)
    assert "differing" not in wrong(account)
    account = drawn(asker, asker.rows, rows)
    assert account.differing == 1


def test_a_partition_without_any_lost_all(asker: Asker) -> None:
    assert drawn(asker, asker.rows, []).lost == len(asker.rows)


def test_old_values_in_features_are_seen(asker: Asker) -> None:
    assert drawn(asker, asker.rows, asker.rows, served=features(asker)[1:]).stale == 1


def test_stored_samples_are_held_against_the_log(asker: Asker) -> None:
    versions = count(asker.site, [record(0, asker.rows)], [], PARTITIONS, CrawlAccount())
    row = asker.rows[3]
    values = msgspec.json.decode(row["values"])

    def stored(item: int, at_ms: int, price: float, seen_ms: int) -> CrawlAccount:
        columns = {"external.shelf.price": [price], "external.shelf.tags": [values["tags"]]}
        columns |= {"external.shelf.crawl_time_ms": [at_ms], "item_id": [item], "event_time_ms": [seen_ms]}
        account = CrawlAccount()
        count_stored([SOURCE], pa.table(columns), versions, account)
        return account

    at_ms = row["crawl_time_ms"]
    right = stored(int(row["key"]), at_ms, values["price"], at_ms)
    assert (right.joined, right.mixed) == (1, 0)
    assert stored(int(row["key"]), at_ms, values["price"] + 1, at_ms).mixed == 1
    assert stored(int(row["key"]), at_ms, values["price"], at_ms - 1).mixed == 1
    assert stored(int(row["key"]) + 1, at_ms, values["price"], at_ms).mixed == 1
    assert stored(int(row["key"]), 0, 0.0, at_ms).joined == 0


def test_the_crawlers_store_is_killed_with_it() -> None:
    assert victims_of(["sink", "crawl"], 2) == ["sink", "crawl", *STORE]
    assert victims_of(["hdfs"], 1) == list(STORE)
    assert victims_of(["sink"], 1) == ["sink"]


def test_who_declares_nothing_has_nothing_to_kill() -> None:
    with pytest.raises(ConfigRejected, match="declares no crawls"):
        ChangingSite([], {}, 1)
