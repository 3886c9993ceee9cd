"""The crawler's share of tests by breaking: a site that changes and remembers, and the account of what came of it.

The site serves every source that the project declares, under its names, fields and types, as pages of JSON whose rows
change at moments drawn from a seed; no version of a row ever comes back. It knows what it has sent, and what the
crawler has *acknowledged*: a crawler that asks with the ETag of a body has settled that body.

1. Each version in an acknowledged body is in every partition of `events` exactly once, once readers' rules are applied.
2. No partition holds a version that was not sent, and all have the same versions in the same order.
3. When the site has come to rest, the log and `features` both end at what it shows.
4. Each stored sample's crawled columns are a version of the log, fetched no later than the impression.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import msgspec
import pyarrow as pa

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl, Extract, Follow
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import EXTERNAL, EXTERNAL_SCHEMA, ExternalValue, decode_batch
from headrace.contract.interfaces.log import Record
from headrace.deploy.local.layout import HOST

PAGES, KEYS = 20, 20
"""Pages a source, keys a page: 400 of the 1,000 entities that the load's impressions name."""
CHANGE_S, CHANGED_MAX = 0.05, 5
"""A page changes so often, and at most so many of its rows at once."""
EVERY_MS, DELAY_MS, PARALLEL = 1_000, 10, 2
_ASK_S = 0.1

Name = tuple[str, str]
"""Source and key of an entity."""


class CrawlAccount(msgspec.Struct, kw_only=True):
    """Versions of crawled entities, counted from outside. `closes` when all but the first five are 0."""

    sent: int = 0
    """Distinct versions in bodies that the site sent."""
    acknowledged: int = 0
    """Of these, in bodies whose ETag the crawler has sent back."""
    logged: int = 0
    """Distinct versions in the log."""
    repeated_in_log: int = 0
    """Rows that readers drop, a partition: sent again after a kill."""
    joined: int = 0
    """Stored samples that carry a crawled version."""
    unsettled: int = 0
    """Pages whose newest body the crawler has not acknowledged."""
    lost: int = 0
    twice: int = 0
    made_up: int = 0
    out_of_order: int = 0
    differing: int = 0
    """Partitions that do not hold what the first one holds."""
    stale: int = 0
    """Entities of which the log or `features` does not end at what the site shows."""
    mixed: int = 0
    """Stored samples with crawled columns that are no version of the log, or of after the impression."""
    bodies_changed: int = 0
    """Versions that the stored bodies, extracted again, would change; a body that is not there counts as one."""
    closes: bool = False


class Page(msgspec.Struct):
    """One page of the site: how often each of its rows has changed, and what was sent of it."""

    source: str
    changes: dict[str, int]
    sent: dict[str, dict[str, int]] = {}
    """What a body with this ETag held."""
    acknowledged: set[str] = msgspec.field(default_factory=set)
    etag: str = ""


class ChangingSite:
    """Serves on a free port from `start` to `close`; changes until `rest`."""

    def __init__(self, crawls: Sequence[Crawl], joined: Mapping[str, str], seed: int) -> None:
        """`joined`: the type of the impression's field that each source joins, by source."""
        if not crawls:
            raise ConfigRejected("STAGE=crawl: the project declares no crawls, so there is no crawler to kill.")
        self.crawls = {crawl.name: crawl for crawl in crawls}
        for crawl in crawls:
            if all(field.type == "bool" for field in crawl.fields.values()):
                raise ConfigRejected(
                    f"STAGE=crawl: {crawl.name} brings truth values alone; versions can't be told apart."
                )
        self.pages: dict[str, Page] = {}
        for crawl in crawls:
            lead = "s" if joined[crawl.name] == "string" else ""
            for number in range(PAGES):
                keys = [f"{lead}{number * KEYS + n}" for n in range(KEYS)]
                self.pages[f"/{crawl.name}/{number}"] = Page(crawl.name, dict.fromkeys(keys, 0))
        self._random, self._lock, self._resting = Random(seed), threading.Lock(), threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                """Say nothing: a killed crawler breaks connections."""

        self._server = Server((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self._server.server_port}"
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), name="site", daemon=True),
            threading.Thread(target=self._change, name="site-changes", daemon=True),
        ]

    def start(self) -> None:
        """Begin to serve and to change."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Serve no more."""
        self._resting.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def sources(self) -> list[Crawl]:
        """Return the project's sources as they are here: the same columns, another site."""
        return [
            Crawl(
                name=crawl.name,
                kind="json",
                joins=crawl.joins,
                start=(f"{self.url}/{crawl.name}/",),
                follow=(Follow(at="pages"),),
                rows="rows",
                key=Extract(at="key"),
                fields={name: Extract(at=name, type=one.type) for name, one in crawl.fields.items()},
                every_ms=EVERY_MS,
                delay_ms=DELAY_MS,
                parallel=PARALLEL,
            )
            for crawl in self.crawls.values()
        ]

    def rest(self, timeout_s: float) -> int:
        """Change no more; return how many pages are not acknowledged as they are, once none is or the time is over."""
        self._resting.set()
        self._threads[1].join()
        until = time.monotonic() + timeout_s
        while True:
            with self._lock:
                left = sum(page.etag not in page.acknowledged for page in self.pages.values())
            if not left or time.monotonic() > until:
                return left
            time.sleep(_ASK_S)

    def values(self, source: str, key: str, change: int) -> str:
        """Return what a row holds after so many changes, as the log writes it."""
        return msgspec.json.encode(_values(self.crawls[source], key, change)).decode()

    def _change(self) -> None:
        while not self._resting.wait(CHANGE_S):
            with self._lock:
                page = self._random.choice(list(self.pages.values()))
                for key in self._random.sample(list(page.changes), self._random.randint(1, CHANGED_MAX)):
                    page.changes[key] += 1
                page.etag = ""

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        known = request.headers.get("If-None-Match", "")
        with self._lock:
            status, etag, body = self._page(request.path, known)
        request.send_response(status)
        if etag:
            request.send_header("ETag", etag)
        if status != 304:
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if status != 304:
            request.wfile.write(body)

    def _page(self, path: str, known: str) -> tuple[int, str, bytes]:
        name = path.strip("/")
        if name in self.crawls:
            urls = [f"{self.url}{path}" for path, page in self.pages.items() if page.source == name]
            body = msgspec.json.encode({"pages": urls})
            return (304 if known == '"index"' else 200), '"index"', body
        page = self.pages.get(path)
        if page is None:
            return 404, "", b""
        crawl = self.crawls[page.source]
        rows = [{"key": key, **_values(crawl, key, change)} for key, change in page.changes.items()]
        body = msgspec.json.encode({"rows": rows})
        page.etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if known in page.sent:
            page.acknowledged.add(known)
        page.sent[page.etag] = dict(page.changes)
        return (304 if known == page.etag else 200), page.etag, body


def _values(crawl: Crawl, key: str, change: int) -> dict[str, Any]:
    """Return a row's fields; what `change` says comes back from every type but a truth value."""
    made = {
        "int64": change,
        "float64": change + 0.5,
        "string": f"{key} {change}",
        "bool": change % 2 == 1,
        "list[string]": [key, str(change)],
    }
    return {name: made[one.type] for name, one in crawl.fields.items()}


class Kept(msgspec.Struct):
    """What one partition says of crawled entities by readers' rules, in order: name, crawl time, values."""

    rows: list[tuple[Name, int, str]] = []
    dropped: int = 0


def by_partition(records: Iterable[Record]) -> dict[int, Kept]:
    """Return what each partition of `events` holds: no row of an older crawler, none that repeats, none from before."""
    found: dict[int, Kept] = {}
    epochs: dict[int, int] = {}
    newest: dict[tuple[int, Name], tuple[int, str]] = {}
    for record in records:
        if record.value is None or record.headers.get("kind") != EXTERNAL:
            continue
        kept = found.setdefault(record.partition, Kept())
        for row in decode_batch(record.value, EXTERNAL_SCHEMA).to_pylist():
            name, at_ms, version = (row["source"], row["key"]), row["crawl_time_ms"], row["version"]
            before_ms, before = newest.get((record.partition, name), (-1, ""))
            if row["epoch"] < epochs.get(record.partition, -1) or at_ms <= before_ms or version == before:
                kept.dropped += 1
                continue
            epochs[record.partition] = row["epoch"]
            newest[record.partition, name] = at_ms, version
            kept.rows.append((name, at_ms, row["values"] or ""))
    return found


def count(
    site: ChangingSite, events: Iterable[Record], features: Iterable[Record], partitions: int, account: CrawlAccount
) -> dict[tuple[Name, int], str]:
    """Fill what the log says; return its versions by entity and crawl time."""
    known, sent = _versions(site, acknowledged=True), _versions(site, acknowledged=False)
    account.sent, account.acknowledged = len(sent), len(known)
    parts = by_partition(events)
    first = parts.get(0, Kept())
    account.differing = sum(parts.get(p, Kept()).rows != first.rows for p in range(partitions))
    account.repeated_in_log = sum(kept.dropped for kept in parts.values())
    final = {
        (p.source, key): site.values(p.source, key, n) for p in site.pages.values() for key, n in p.changes.items()
    }
    logged: set[tuple[Name, int]] = set()
    for kept in parts.values():
        times: defaultdict[tuple[Name, int], int] = defaultdict(int)
        last: dict[Name, int] = {}
        for name, _, text in kept.rows:
            change = sent.get((name, text))
            if change is None:
                account.made_up += 1
                continue
            times[name, change] += 1
            account.out_of_order += change < last.get(name, -1)
            last[name] = change
        account.twice += sum(many - 1 for many in times.values())
        account.lost += sum((name, change) not in times for (name, _), change in known.items())
        account.stale += sum(site.values(*name, last.get(name, -1)) != text for name, text in final.items())
        logged |= times.keys()
    account.lost += len(known) * (partitions - len(parts))
    account.logged = len(logged)
    served: dict[str, str] = {}
    for record in features:
        key = (record.key or b"").decode()
        if record.value is not None and key.startswith(f"{PREFIX}/"):
            served[key] = bytes(msgspec.json.decode(record.value, type=ExternalValue).values).decode()
    account.stale += sum(served.get(f"{PREFIX}/{s}/{key}") != text for (s, key), text in final.items())
    return {(name, at_ms): text for name, at_ms, text in first.rows}


def _versions(site: ChangingSite, *, acknowledged: bool) -> dict[tuple[Name, str], int]:
    """Return the versions of sent bodies, or of acknowledged ones alone, with their change's number."""
    found: dict[tuple[Name, str], int] = {}
    for page in site.pages.values():
        for etag, rows in page.sent.items():
            if etag in page.acknowledged or not acknowledged:
                for key, change in rows.items():
                    found[(page.source, key), site.values(page.source, key, change)] = change
    return found


def count_stored(
    crawls: Iterable[Crawl], samples: pa.Table, versions: Mapping[tuple[Name, int], str], account: CrawlAccount
) -> None:
    """Fill what stored samples say; `samples` has each source's columns, what it joins, and `event_time_ms`."""
    for crawl in crawls:
        names = [f"{PREFIX}.{crawl.name}.{field}" for field in crawl.fields]
        time_name = f"{PREFIX}.{crawl.name}.{CRAWL_TIME}"
        for row in samples.select([*names, time_name, crawl.joins, "event_time_ms"]).to_pylist():
            at_ms = row[time_name]
            if not at_ms:
                continue
            account.joined += 1
            text = msgspec.json.encode({f: row[n] for f, n in zip(crawl.fields, names, strict=True)}).decode()
            is_version = versions.get(((crawl.name, str(row[crawl.joins])), at_ms)) == text
            account.mixed += not is_version or at_ms > row["event_time_ms"]


def stored_columns(crawls: Iterable[Crawl]) -> list[str]:
    """Return the columns that `count_stored` reads."""
    needed = {"event_time_ms"} | {crawl.joins for crawl in crawls}
    return sorted(needed | {name for crawl in crawls for name in crawl.columns()})


def closes(account: CrawlAccount) -> bool:
    """Say whether nothing is lost, twice, made up, out of place or old."""
    wrong = (account.unsettled, account.lost, account.twice, account.made_up, account.out_of_order, account.differing)
    return not any((*wrong, account.stale, account.mixed, account.bodies_changed)) and account.acknowledged > 0
