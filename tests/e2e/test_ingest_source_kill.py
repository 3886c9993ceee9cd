"""The broker that holds a foreign topic is killed with -9 under load, twice; the source goes on by itself.

Goal: every record written is in `events`, once after ids are dropped, and the group's positions reach the end. Method:
a stack of its own with one supervised gateway, a shipper's producer at 500 records/s, SIGKILL to the broker.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import confluent_kafka as ck
import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaReader
from headrace.cli.project_folder import load_project
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local.chaos.own_stack import own_stack
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor

pytestmark = [pytest.mark.real, pytest.mark.timeout(280)]

PROJECT = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import FeatureSpec
PROJECT = Project(
    impression=ImpressionType(tag="shop.impression", key="user_id", fields={"user_id": "int64", "item_id": "int64"}),
    feedback=(FeedbackType(name="click", tag="shop.click"),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(),
)
"""
SETTINGS = '[log]\npartitions = 2\n[[ingest.sources]]\ntopic = "weblogs"\ntag = "shop.impression"\n'
KILLS = 2
PHASE_S = 4.0


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "headrace.toml").write_text(SETTINGS)
    config, _ = load_project(tmp_path)
    with own_stack(tmp_path, config, ("kafka", "ingest"), print) as made:
        yield made


def appended(layout: Layout) -> list[tuple[str, int]]:
    """Return (event id, item) of everything in `events`."""
    reader, found = KafkaReader(layout.brokers), list[tuple[str, int]]()
    topic = Topics().events
    ends = reader.end_offsets(topic)
    reader.assign({(topic, p): 0 for p in ends})
    at = dict.fromkeys(ends, 0)
    while any(at[p] < ends[p] for p in ends):
        for record in reader.poll(500, 1.0):
            at[record.partition] = record.offset + 1
            if record.headers["kind"] != PUNCTUATION:
                rows = decode_batch(record.value or b"").to_pylist()
                found += [(row["event_id"], row["item_id"]) for row in rows]
    reader.close()
    return found


def test_a_broker_killed_under_load_loses_nothing(layout: Layout) -> None:
    KafkaAdmin(layout.brokers).ensure_topics([TopicSpec("weblogs", 3)])
    producer = ck.Producer(
        {"bootstrap.servers": layout.brokers, "enable.idempotence": True, "compression.type": "lz4", "log_level": 0}
    )
    written = 0
    for kill in range(KILLS + 1):
        until = time.monotonic() + PHASE_S
        while time.monotonic() < until:
            record = {"@timestamp": time.time(), "request_id": f"r{written}", "user_id": 1, "item_id": written}
            producer.produce("weblogs", json.dumps(record).encode())
            producer.poll(0.002)
            written += 1
        if kill < KILLS:
            os.kill(Supervisor(layout).pids()["kafka"], signal.SIGKILL)
    assert producer.flush(120) == 0
    deadline = time.monotonic() + 120
    while len(found := dict(appended(layout))) < written:
        assert time.monotonic() < deadline, f"{len(found)} of {written}"
        time.sleep(1)
    assert sorted(found.values()) == list(range(written))
    consumer = ck.Consumer({"bootstrap.servers": layout.brokers, "group.id": "headrace-weblogs"})
    parts = [ck.TopicPartition("weblogs", p) for p in range(3)]
    while sum(part.offset for part in consumer.committed(parts, timeout=20)) < written:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    consumer.close()
