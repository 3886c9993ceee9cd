"""`headrace crawl` on a real broker, killed with -9 again and again while it crawls.

Goal: every partition holds the same versions in the same order once repeats are ignored, none is missing, the topic
`features` agrees, and hardly a page is asked for twice. Method: a stack of its own with Kafka alone, a local site, the
verb itself as a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from crawl_world import NEVER_S, Site, eventually, item, links

from headrace.backends.log.kafka import KafkaReader
from headrace.cli.project_folder import load_project
from headrace.contract.formats.events import EXTERNAL, ExternalValue, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.deploy.local.chaos.own_stack import own_stack
from headrace.deploy.local.layout import Layout
from headrace.stream.join.external_lookup import ExternalLookup

pytestmark = [pytest.mark.real, pytest.mark.timeout(280)]

PROJECT = """
from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import FeatureSpec, Numeric
PROJECT = Project(
    impression=ImpressionType(tag="shop.impression", key="user_id", fields={{"user_id": "int64", "item_id": "int64"}}),
    feedback=(FeedbackType(name="click", tag="shop.click"),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    crawls=(Crawl(name="catalogue", kind="html", joins="item_id", start=("{url}/",), follow=(Follow(url="/item/"),),
                  key=Extract(at=".price::attr(data-id)", type="int64"), delay_ms=20, parallel=4, every_ms={every_ms},
                  fields={{"price": Extract(at=".price::text", type="float64", pattern=r"([\\d.]+)")}}),),
    features=FeatureSpec(features=(Numeric(field="external.catalogue.price"),)),
)
"""
PAGES, KILLS, ON_THEIR_WAY = 150, 4, 8


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()
    one.pages = {"/": (200, {}, links(*(f"/item/{n}" for n in range(PAGES))))}
    one.pages |= {f"/item/{n}": item(n, n + 0.5) for n in range(PAGES)}
    yield one
    one.close()


@pytest.fixture
def layout(tmp_path: Path, site: Site, request: pytest.FixtureRequest) -> Iterator[Layout]:
    every_ms = getattr(request, "param", 3_600_000)
    (tmp_path / "project.py").write_text(PROJECT.format(url=site.url, every_ms=every_ms))
    (tmp_path / "headrace.toml").write_text("[log]\npartitions = 3\n")
    config, _ = load_project(tmp_path)
    with own_stack(tmp_path, config, ("kafka", "ingest"), print) as made:
        yield made


def start(layout: Layout, *words: str) -> subprocess.Popen[str]:
    env = os.environ | {"PORT_BASE": str(layout.port_base), "HEADRACE_HOME": str(layout.home)}
    env |= {"HEADRACE_BROKERS": layout.brokers, "HEADRACE_STORE": layout.store, "HEADRACE_PROJECT": str(layout.project)}
    command = [sys.executable, "-m", "headrace.cli.main", "crawl", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(layout: Layout) -> None:
    """Crawl what is left."""
    process = start(layout, "--once")
    try:
        said, _ = process.communicate(timeout=NEVER_S)
        assert process.returncode == 0, said
    finally:
        process.kill()
        process.communicate()


def test_a_killed_crawler_loses_no_version(layout: Layout, site: Site) -> None:
    for kill in range(1, KILLS + 1):
        process = start(layout)
        least = kill * PAGES // (KILLS + 1)
        try:
            eventually(lambda least=least: sum(site.asked.values()) >= least)
        finally:
            process.kill()
            process.communicate()
        time.sleep(0.1)
    finish(layout)
    again = sum(times - 1 for path, times in site.asked.items() if path != "/robots.txt")
    assert again <= ON_THEIR_WAY * KILLS
    check(layout, {str(n): n + 0.5 for n in range(PAGES)})


@pytest.mark.long
@pytest.mark.parametrize("layout", [2_000], indirect=True)
def test_twenty_kills_while_prices_change(layout: Layout, site: Site) -> None:
    for kill in range(20):
        site.pages |= {f"/item/{n}": item(n, kill * 1_000 + n + 0.5) for n in range(PAGES)}
        process = start(layout)
        least = sum(site.asked.values()) + PAGES // 3
        try:
            eventually(lambda least=least: sum(site.asked.values()) >= least)
        finally:
            process.kill()
            process.communicate()
    time.sleep(2.0)
    finish(layout)
    check(layout, {str(n): 19_000 + n + 0.5 for n in range(PAGES)})


def check(layout: Layout, expected: dict[str, float]) -> None:
    """See that every partition means the same, that `features` agrees, and that both are what the site says."""
    _, project = load_project(layout.project)
    memories: dict[int, ExternalLookup] = {}
    orders: dict[int, list[str]] = {}
    for record in read_range(KafkaReader(layout.brokers), Topics().events):
        if record.headers["kind"] == EXTERNAL:
            batch = decode_batch(record.value or b"")
            memories.setdefault(record.partition, ExternalLookup(project.crawls)).take(batch)
            orders.setdefault(record.partition, []).extend(batch["key"].to_pylist())
    # Sent again or not: each partition means the same.
    states = [memory.to_plain()[2] for memory in memories.values()]
    assert len(states) == 3 and states[0] == states[1] == states[2]
    prices = {key: msgspec.json.decode(versions[-1][2])["price"] for _, key, versions in states[0]}
    assert prices == expected
    first_seen = [list(dict.fromkeys(order)) for order in orders.values()]
    assert first_seen[0] == first_seen[1] == first_seen[2]
    served = {}
    for record in read_range(KafkaReader(layout.brokers), Topics().features):
        key = (record.key or b"").decode()
        assert record.value is not None
        served[key] = msgspec.json.decode(msgspec.json.decode(record.value, type=ExternalValue).values)["price"]
    assert served == {f"external/catalogue/{key}": price for key, price in prices.items()}
