"""Goal: a page that is too dear, or that ends the process that reads it, is refused by name, and the next page is read.
Method: the real processes, with bounds that a test can reach; signals from outside where no page sends them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from crawl_world import eventually

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl, Extract
from headrace.contract.errors import Unavailable
from headrace.ingest.crawl import extraction_pool
from headrace.ingest.crawl.extract import Document, Extracted
from headrace.ingest.crawl.extraction_pool import ExtractionPool

URL = "https://shop.example/"
CRAWL = Crawl(
    name="shop", kind="html", joins="item_id", start=(URL,), rows=".a .r", key=Extract(at="::attr(id)"),
    fields={"p": Extract(at="::text")},
)  # fmt: skip
SMALL = Document(URL, b"<div class=a><b class=r id=7>x</b></div>")
DEAR = Document(URL, ("<div class=a>" * 1_000 + "<b class=r id=x></b>" * 9_000).encode())
"""Takes a minute of CPU time, and is below the bound on the steps of its search."""


@pytest.fixture
def pool() -> Iterator[ExtractionPool]:
    one = ExtractionPool(CrawlConfig(extract_cpu_ms=1_000, extract_memory_bytes=2**27))
    yield one
    one.close()


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "extraction_process" in " ".join(one.cmdline())]


def keys(found: Extracted) -> list[str]:
    return [row.key for row in found.rows]


def test_a_page_beyond_its_cpu_time_is_refused_and_the_next_one_is_read(pool: ExtractionPool) -> None:
    async def work() -> None:
        assert keys(await pool.extract(SMALL, CRAWL)) == ["7"]
        (before,) = children()
        assert (await pool.extract(DEAR, CRAWL)).left_out == {"extraction_cpu": 1}
        assert keys(await pool.extract(SMALL, CRAWL)) == ["7"]
        (after,) = children()
        assert before != after
        for _ in range(3):
            await pool.extract(SMALL, CRAWL)
        assert children() == [after], "a process reads many pages"

    asyncio.run(work())
    pool.close()
    assert not children()


def test_cpu_time_is_a_pages_own(pool: ExtractionPool) -> None:
    half = Document(URL, ("<div class=a>" * 100 + "<b class=r id=x></b>" * 1_100).encode())

    async def work() -> None:
        for _ in range(8):
            assert not (await pool.extract(half, CRAWL)).left_out["extraction_cpu"]

    asyncio.run(work())


@pytest.mark.parametrize("rows", [20_000, 60_000, 150_000, 400_000])
def test_a_page_is_read_whole_or_refused_for_its_memory(pool: ExtractionPool, rows: int) -> None:
    body = b"<div class=a>" + b"".join(b"<b class=r id=%d></b>" % n for n in range(rows))

    async def work() -> None:
        found = await pool.extract(Document(URL, body), CRAWL)
        assert found.left_out["extraction_memory"] or len(found.rows) + found.left_out["too_many"] == rows
        assert rows < 400_000 or found.left_out == {"extraction_memory": 1}
        assert keys(await pool.extract(SMALL, CRAWL)) == ["7"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGSEGV, "extraction_crashed"), (signal.SIGKILL, "extraction_killed")]
)
def test_a_process_that_dies_over_a_page_is_the_refusal_of_the_page(number: signal.Signals, reason: str) -> None:
    pool = ExtractionPool(CrawlConfig(extract_cpu_ms=600_000))

    async def work() -> Extracted:
        await pool.extract(SMALL, CRAWL)
        (child,) = children()
        reading = asyncio.ensure_future(pool.extract(DEAR, CRAWL))
        before_s = child.cpu_times().user
        while child.cpu_times().user < before_s + 0.2:
            await asyncio.sleep(0.02)
        child.send_signal(number)
        return await reading

    try:
        assert asyncio.run(work()).left_out == {reason: 1}
    finally:
        pool.close()


def test_a_page_that_gets_no_cpu_time_is_let_go_without_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ExtractionPool(CrawlConfig(extract_cpu_ms=600_000))
    now_s = [0.0]
    monkeypatch.setattr(extraction_pool, "awake_s", lambda: now_s[0])
    monkeypatch.setattr(extraction_pool, "_LOOK_S", 0.01)

    async def work() -> Extracted:
        await pool.extract(SMALL, CRAWL)
        (child,) = children()
        child.suspend()
        reading = asyncio.ensure_future(pool.extract(SMALL, CRAWL))
        await asyncio.sleep(0.1)
        assert not reading.done()
        now_s[0] += 20 * 600 + 61
        return await reading

    try:
        assert asyncio.run(work()).left_out == {"extraction_stalled": 1}
        assert not children()
    finally:
        pool.close()


def test_dear_pages_of_one_source_hold_up_no_other() -> None:
    pool = ExtractionPool(CrawlConfig(extract_cpu_ms=600_000, extract_processes=2))
    other = Crawl(**{**{f: getattr(CRAWL, f) for f in CRAWL.__struct_fields__}, "name": "other"})

    async def work() -> None:
        dear = [asyncio.ensure_future(pool.extract(DEAR, CRAWL)) for _ in range(4)]
        await asyncio.sleep(0)
        for _ in range(5):
            assert keys(await pool.extract(SMALL, other)) == ["7"]
        assert len(children()) == 2 and not any(one.done() for one in dear)
        for one in dear:
            one.cancel()
        await asyncio.wait(dear)
        assert len(children()) == 1

    try:
        asyncio.run(work())
    finally:
        pool.close()
    assert not children()


def test_a_process_that_does_not_begin_stops_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    for executable, said in ((python, "does not begin"), (tmp_path / "none", "no process")):
        monkeypatch.setattr(sys, "executable", str(executable))
        pool = ExtractionPool(CrawlConfig())
        with pytest.raises(Unavailable, match=said):
            asyncio.run(pool.extract(SMALL, CRAWL))
        pool.close()


PARENT = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from test_extraction_pool import CRAWL, DEAR, SMALL, CrawlConfig, ExtractionPool
async def work():
    pool = ExtractionPool(CrawlConfig(extract_cpu_ms=600_000))
    await pool.extract(SMALL, CRAWL)
    print("read", flush=True)
    await pool.extract(DEAR if sys.argv[1] == "busy" else SMALL, CRAWL)
    await asyncio.sleep(600)
asyncio.run(work())
"""


@pytest.mark.parametrize("doing", ["busy", "idle"])
def test_no_process_outlives_a_crawler_that_is_killed(doing: str) -> None:
    """By its end of the pipe where it waits for a page, by a signal of Linux where it reads one."""
    if doing == "busy" and sys.platform != "linux":
        pytest.skip("prctl is Linux's")
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    code = PARENT.format(folder=str(Path(__file__).parent))
    parent = subprocess.Popen(
        [sys.executable, "-c", code, doing], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"read\n"
        (child,) = psutil.Process(parent.pid).children()
        before_s = child.cpu_times().user
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        if doing == "busy":
            eventually(lambda: child.cpu_times().user > before_s + 0.2)
        assert child.is_running(), "who stops the unit means the crawler"
        parent.kill()
    assert eventually(lambda: not child.is_running())
