"""The shop's catalogue as a site of its own: what a crawler finds, and the logs don't have.

| path | what |
|---|---|
| `/robots.txt` | what a crawler may ask for |
| `/sitemap.xml` | every shelf with the time of its last change |
| `/shelf/N.json` | a hundred items: author, tag, music, price |
| `/`, `/item/ID` | the same for people |

Every answer has an ETag and, but for `/item`, a Last-Modified; asked with them again, an unchanged page is a 304.
Prices change with time and by nothing else: a page is a pure function of the items and the clock, so a restarted
shop serves what it would have served.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Sequence
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.csv

from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.clock import Clock
from headrace.examples.shop.traffic import SYNTHETIC_VIDEOS, VIDEOS

SHELF = 100
TURN_S = 10
"""Prices change at whole turns; shelves take turns, ROUND turns each, and a fifth of a shelf's items changes."""
ROUND, PART = 10, 5
_NO_MUSIC = "none"
_JSON, _XML, _HTML, _TEXT = "application/json", "application/xml", "text/html; charset=utf-8", "text/plain"


class Item(msgspec.Struct, frozen=True):
    """One video as the catalogue knows it; `music` is the kind of its sound, which no log line carries."""

    id: int
    author: int
    tag: str
    music: str


class Page(msgspec.Struct, frozen=True):
    """An answer of the site; `modified_s` is 0 where it is not known."""

    body: bytes
    content_type: str
    modified_s: int = 0

    @property
    def etag(self) -> str:
        """Return the page's strong validator: a digest of its body."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'


class Catalogue:
    """The site's content: pages by path and time, computed from nothing else."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._shelves = [items[at : at + SHELF] for at in range(0, len(items), SHELF)]
        self._items = {item.id: (shelf, item) for shelf, held in enumerate(self._shelves) for item in held}

    def __len__(self) -> int:
        return len(self._items)

    def page(self, path: str, host: str, now_s: int) -> Page | None:
        """Return what `path` shows at a time, None where there is nothing; `host` is how the site was asked for."""
        name, _, rest = path.lstrip("/").partition("/")
        if path == "/robots.txt":
            return Page(f"User-agent: *\nDisallow: /cart\nSitemap: http://{host}/sitemap.xml\n".encode(), _TEXT)
        if path == "/sitemap.xml":
            return self._sitemap(host, now_s)
        if path == "/":
            return self._index(now_s)
        number = rest.removesuffix(".json") if name == "shelf" and rest.endswith(".json") else rest
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            return None
        if name == "shelf" and rest.endswith(".json") and int(number) < len(self._shelves):
            return self._shelf(int(number), now_s)
        return self._item(int(number), now_s) if name == "item" and int(number) in self._items else None

    def _sitemap(self, host: str, now_s: int) -> Page:
        changed = [_changed_s(shelf, now_s) for shelf in range(len(self._shelves))]
        lines = [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">',
        ]
        lines += [
            f"<url><loc>http://{host}/shelf/{shelf}.json</loc><lastmod>{_w3c(at_s)}</lastmod></url>"
            for shelf, at_s in enumerate(changed)
        ]
        return Page("\n".join([*lines, "</urlset>\n"]).encode(), _XML, max(changed, default=0))

    def _shelf(self, shelf: int, now_s: int) -> Page:
        revision = _revision(shelf, now_s)
        shown = {"shelf": shelf, "items": [_plain(item, revision) for item in self._shelves[shelf]]}
        return Page(msgspec.json.encode(shown), _JSON, _changed_s(shelf, now_s))

    def _index(self, now_s: int) -> Page:
        shelves = "".join(f'<li><a href="/shelf/{n}.json">shelf {n}</a></li>' for n in range(len(self._shelves)))
        changed = max((_changed_s(n, now_s) for n in range(len(self._shelves))), default=0)
        return Page(f"<h1>{len(self):,} videos</h1><ul>{shelves}</ul>".encode(), _HTML, changed)

    def _item(self, number: int, now_s: int) -> Page:
        shelf, item = self._items[number]
        shown = _plain(item, _revision(shelf, now_s))
        rows = "".join(f"<dt>{name}</dt><dd class={name}>{value}</dd>" for name, value in shown.items())
        return Page(f"<h1>Video {number}</h1><dl>{rows}</dl>".encode(), _HTML)


def load_items(folder: Path | None) -> list[Item]:
    """Return KuaiRand's videos from `folder`, or generated ones when there is no folder; by id."""
    if folder is None:
        return _synthetic()
    table = pyarrow.csv.read_csv(folder / VIDEOS).sort_by("video_id")
    music = table["music_type"].cast(pa.int64()).cast(pa.string()).fill_null(_NO_MUSIC)
    columns = (table["video_id"], table["author_id"], table["tag"].fill_null(""), music)
    return [Item(*row) for row in zip(*(column.to_pylist() for column in columns), strict=True)]


def _synthetic(seed: int = 7) -> list[Item]:
    random = np.random.default_rng(seed)
    author_V, tag_V = random.integers(400, size=SYNTHETIC_VIDEOS), random.integers(60, size=SYNTHETIC_VIDEOS)
    music_V = random.choice(["9", "4", _NO_MUSIC], size=SYNTHETIC_VIDEOS, p=(0.8, 0.15, 0.05))
    return [Item(v, int(author_V[v]), str(tag_V[v]), str(music_V[v])) for v in range(SYNTHETIC_VIDEOS)]


def _revision(shelf: int, now_s: int) -> int:
    """Return how often a shelf has changed."""
    return (now_s // TURN_S + shelf) // ROUND


def _changed_s(shelf: int, now_s: int) -> int:
    """Return when it changed last, Unix seconds."""
    return (_revision(shelf, now_s) * ROUND - shelf) * TURN_S


def _plain(item: Item, revision: int) -> dict[str, Any]:
    """Return an item on a shelf of this revision; its price is drawn by its id and how often it has changed."""
    usual, now = _share(f"{item.id}"), _share(f"{item.id}/{(revision + item.id) // PART}")
    return {**msgspec.structs.asdict(item), "price": round((1 + 9 * usual) * (0.8 + 0.4 * now), 2)}


def _share(text: str) -> float:
    """Return a number from 0 to 1 that looks drawn and is the text's own."""
    return zlib.crc32(text.encode()) / 2**32


def _w3c(at_s: int) -> str:
    return str(np.datetime64(at_s, "s")) + "Z"


class Site:
    """Serves a catalogue on a port from a thread of its own, until `close`."""

    def __init__(self, catalogue: Catalogue, host: str, port: int, clock: Clock) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Connections that ask nothing for so long are closed: a thread each is what they cost.
            timeout = 60

            def do_GET(self) -> None:
                _answer(self, catalogue, clock.now_ms() // 1_000)

            def do_HEAD(self) -> None:
                _answer(self, catalogue, clock.now_ms() // 1_000)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: the crawler counts what it asked."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigRejected(
                f"the catalogue's port {port} is taken ({error}); `headrace doctor` says by whom, PORT_BASE= moves it."
            ) from error
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="catalogue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _answer(request: BaseHTTPRequestHandler, catalogue: Catalogue, now_s: int) -> None:
    page = catalogue.page(request.path, request.headers.get("Host") or "localhost", now_s)
    if page is None:
        page, status = Page(b"no such page\n", _TEXT), 404
    else:
        status = 304 if _is_known(request, page) else 200
    request.send_response(status)
    if status != 404:
        request.send_header("ETag", page.etag)
        request.send_header("Cache-Control", "no-cache")
    if page.modified_s and status != 404:
        request.send_header("Last-Modified", formatdate(page.modified_s, usegmt=True))
    if status != 304:
        request.send_header("Content-Type", page.content_type)
        request.send_header("Content-Length", str(len(page.body)))
    request.end_headers()
    if status != 304 and request.command == "GET":
        request.wfile.write(page.body)


def _is_known(request: BaseHTTPRequestHandler, page: Page) -> bool:
    """Say whether the asker has this page already: by ETag or, where it sends none, by Last-Modified."""
    known = request.headers.get("If-None-Match")
    if known is not None:
        return page.etag in (tag.strip().removeprefix("W/") for tag in known.split(","))
    since = request.headers.get("If-Modified-Since")
    return since is not None and page.modified_s > 0 and since == formatdate(page.modified_s, usegmt=True)
