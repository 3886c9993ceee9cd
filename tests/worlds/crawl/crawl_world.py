"""A site of its own for the crawler's tests, hostile where a test wants it, and the crawler as a process beside it."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.ingest.crawl.extract import Document, Extracted, extract

SCRIPT = Path(__file__).parent / "crawl_process.py"
NEVER_S = 60.0
"""Longest wait for what must come; a busy machine is slow."""

Answer = tuple[int, dict[str, str], bytes]
Page = Callable[["Site", BaseHTTPRequestHandler], Answer | None]


class Site:
    """Answers by path, notes every request. `pages` may be changed while it serves."""

    def __init__(self) -> None:
        self.pages: dict[str, Page | Answer] = {}
        self.asked: Counter[str] = Counter()
        self.times_s: defaultdict[str, list[float]] = defaultdict(list)
        self.conditional: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path
        with self.lock:
            self.asked[path] += 1
            self.times_s[path].append(time.monotonic())
            self.times_s["*"].append(time.monotonic())
            self.agents.add(handler.headers.get("User-Agent", ""))
            if handler.headers.get("If-None-Match") or handler.headers.get("If-Modified-Since"):
                self.conditional[path] += 1
        page = self.pages.get(path) or self.pages.get(path.rsplit("/", 1)[0] + "/*") or (404, {}, b"none")
        answer = page(self, handler) if callable(page) else page
        if answer is None:
            handler.close_connection = True
            return
        status, headers, body = answer
        etag = headers.get("ETag")
        if status == 200 and etag and handler.headers.get("If-None-Match") == etag:
            status, body = 304, b""
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if "Content-Type" not in headers:
            handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def item(number: int, price: float, *, links: str = "", etag: str = "") -> Answer:
    """An item's page."""
    text = (
        f"<html><body><h1 class=name>Item {number}</h1><span data-id={number} class=price>EUR {price}</span>"
        f"<i class=tag>red</i><i class=tag>new</i>{links}</body></html>"
    )
    headers = {"ETag": etag} if etag else {}
    return 200, headers, text.encode()


def catalogue(site: Site, **changes: Any) -> Crawl:
    """The source of most tests: item pages reached by links from /."""
    plain: dict[str, Any] = {
        "name": "catalogue",
        "kind": "html",
        "joins": "item_id",
        "start": (f"{site.url}/",),
        "follow": (Follow(url=r"/item/"),),
        "key": Extract(at=".price::attr(data-id)", type="int64"),
        "fields": {
            "name": Extract(at=".name::text"),
            "price": Extract(at=".price::text", type="float64", pattern=r"([\d.]+)"),
            "tags": Extract(at=".tag::text", type="list[string]"),
        },
        "delay_ms": 0,
        "parallel": 4,
        "timeout_ms": 5_000,
    }
    return Crawl(**{**plain, **changes})


def links(*paths: str) -> bytes:
    return "".join(f'<a href="{path}">x</a>' for path in paths).encode()


class Crawler:
    """`crawl_process.py` on a folder that outlives it."""

    def __init__(self, folder: Path, *crawls: Crawl, receipt_s: float = 0.0, **config: Any) -> None:
        self.folder, self.receipt_s = folder, receipt_s
        self.log = folder / "log.jsonl"
        (folder / "crawls.json").write_bytes(msgspec.json.encode({"crawls": crawls, "config": config}))
        self.process: subprocess.Popen[str] | None = None

    def declare(self, *crawls: Crawl, **config: Any) -> None:
        (self.folder / "crawls.json").write_bytes(msgspec.json.encode({"crawls": crawls, "config": config}))

    def begin(self, mode: str = "serve") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self.folder), mode, str(self.receipt_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, mode: str = "once") -> dict[str, Any]:
        """Run to the end; return its counters."""
        self.begin(mode)
        return self.end()

    def end(self) -> dict[str, Any]:
        assert self.process is not None
        out, errors = self.process.communicate(timeout=NEVER_S)
        assert self.process.returncode == 0, errors
        assert "Traceback" not in errors and "Unhandled" not in errors, errors
        said: dict[str, Any] = json.loads(out)
        return said

    def stop(self) -> dict[str, Any]:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def records(self) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        # A killed process may have left half a line.
        lines = self.log.read_text().splitlines()
        whole: list[dict[str, Any]] = []
        for line in lines:
            try:
                whole.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return whole

    def versions(self, partition: int = 0) -> list[dict[str, Any]]:
        """Rows of `events` in one partition, in order, with their values read."""
        rows = [
            row for r in self.records() if r["topic"] == "events" and r["partition"] == partition for row in r["rows"]
        ]
        return [{**row, "values": row["values"] and json.loads(row["values"])} for row in rows]

    def newest(self) -> dict[str, Any]:
        """Values of each key, the newest."""
        return {row["key"]: row["values"] for row in self.versions()}


def eventually(what: Callable[[], Any]) -> Any:
    """Wait until `what` is true; return it."""
    until = time.monotonic() + NEVER_S
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def gzipped(text: str) -> bytes:
    return gzip.compress(text.encode())


class ExtractionHere:
    """Extracts at once, in the test's own process and without bounds: for tests of what is around it."""

    async def extract(self, document: Document, crawl: Crawl) -> Extracted:
        return extract(document, crawl)

    def bounds(self) -> tuple[int, int]:
        return 0, 0
