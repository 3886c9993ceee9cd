"""A site that changes while it is crawled, and remembers what it sent.

It serves every source that the project declares, under its names, fields and types, as pages of JSON whose rows change
at moments drawn from a seed; no version of a row ever comes back. It knows what it has sent, and what the crawler has
*acknowledged*: a crawler that asks with the ETag of a body has settled that body.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import msgspec

from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import HOST
from headrace.process.awake import awake_s
from headrace.process.background import Background

PAGES, KEYS = 20, 20
"""Pages a source, keys a page: 400 of the 1,000 entities that the load's impressions name."""
CHANGE_S, CHANGED_MAX = 0.05, 5
"""A page changes so often, and at most so many of its rows at once."""
EVERY_MS, DELAY_MS, PARALLEL = 1_000, 10, 2
_ASK_S = 0.1


Name = tuple[str, str]
"""Source and key of an entity."""


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
        self._background = Background()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to serve and to change."""
        start = self._background.thread
        self._threads = [start("site", lambda: self._server.serve_forever(0.1)), start("site-changes", self._change)]

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
        self._background.check()
        until = awake_s() + timeout_s
        while True:
            with self._lock:
                left = sum(page.etag not in page.acknowledged for page in self.pages.values())
            if not left or awake_s() > until:
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
