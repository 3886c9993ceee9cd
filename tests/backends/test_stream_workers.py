"""Goal: two real workers share the partitions, one is killed with -9 and another joins: each sample comes out once.

Method: `headrace stream` processes on a real broker and a real store; the checker reads `samples` by position and
compares with one pass of the pure join over `events`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

from headrace.backends.log_kafka import KafkaAdmin, KafkaProducer, KafkaReader
from headrace.cli.runtime import load_project
from headrace.contract.events import (
    Punctuation,
    batch_from_rows,
    decode_batch,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.positions import START, Position
from headrace.contract.sample import parse_position
from headrace.contract.topics import Topics
from headrace.deploy.local.layout import Layout
from headrace.replay.scan import read_all
from headrace.stream.join import JoinState

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

TOPICS, PARTITIONS = Topics(generation=7), 2
PROJECT_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Rate

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=3_000),),
    features=FeatureSpec(
        counters=(Counter(name="u", key="user"),),
        features=(Categorical(field="item"), Rate(of="counter.u.click", over="counter.u.impression")),
    ),
).checked()
"""


def test_each_sample_once_across_kill_and_rebalance(stack: Layout, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT_FILE)
    (tmp_path / "headrace.toml").write_text(
        f"[log]\npartitions = {PARTITIONS}\ngeneration = {TOPICS.generation}\n[join]\nsnapshot_ms = 500\n"
    )
    KafkaAdmin(stack.brokers, timeout_s=60).ensure_topics(TOPICS.specs(PARTITIONS))
    workers = [start(stack, tmp_path, number) for number in range(2)]
    try:
        append(stack, tmp_path, workers)
        expected = joined(stack, tmp_path)
        deadline = time.monotonic() + 240
        while (found := taken(stack)) != expected and time.monotonic() < deadline:
            time.sleep(2)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert len(expected) > 2_000
    assert found == expected


def start(stack: Layout, project: Path, number: int) -> subprocess.Popen[bytes]:
    """Start a worker with its own home and ports, on the same store."""
    env = os.environ | {
        "PORT_BASE": str(stack.port_base + 60 * (number + 1)),
        "HEADRACE_HOME": str(project / f"{number}"),
    }
    env |= {"HEADRACE_BROKERS": stack.brokers, "HEADRACE_STORE": stack.store, "HEADRACE_WEBHDFS": str(stack.webhdfs)}
    command = [str(Path(sys.executable).with_name("headrace")), "stream", "--project", str(project)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def append(stack: Layout, project: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    """Append events for some 25 s; kill one worker with -9 on the way and start another one."""
    _, shop = load_project(project)
    producer, random = KafkaProducer(stack.brokers), Random(5)
    now_ms, count = 1_700_000_000_000, 0
    shown, clicked = impression_schema(shop), feedback_schema(shop, shop.feedback[0])
    for step in range(250):
        if step == 100:
            workers[0].send_signal(signal.SIGKILL)
        if step == 150:
            workers.append(start(stack, project, 2))
        now_ms += 100
        for partition in range(PARTITIONS):
            rows = []
            for _ in range(10):
                count += 1
                row = {"event_id": f"i{count}", "request_id": f"r{count}", "place": 0, "key": str(partition)}
                rows.append(row | {"event_time_ms": now_ms, "user": partition, "item": random.randrange(50)})
            clicks = [row | {"event_id": f"c{row['event_id']}"} for row in random.sample(rows, 3)]
            for kind, batch in (
                ({"kind": "impression"}, batch_from_rows(rows, shown)),
                ({"kind": "feedback", "type": "click"}, batch_from_rows(clicks, clicked)),
            ):
                producer.send(TOPICS.events, partition, encode_batch(batch), headers=kind)
            end_ms = now_ms if step < 249 else now_ms + 60_000
            value = encode_punctuation(Punctuation("g", 1, end_ms))
            producer.send(TOPICS.events, partition, value, headers={"kind": "punctuation"})
        producer.poll(0.0)
        time.sleep(0.1)
    assert producer.flush(60) == 0


def joined(stack: Layout, project: Path) -> list[tuple[object, ...]]:
    """Return the samples that one undisturbed pass makes."""
    config, shop = load_project(project)
    joins = [JoinState(shop, config.join, silent_ms=10_000, partition=p) for p in range(PARTITIONS)]
    reader = KafkaReader(stack.brokers)
    emitted = [e.batch for r in read_all(reader, TOPICS.events) if (e := joins[r.partition].take(r)) is not None]
    reader.close()
    return rows_of(emitted)


def taken(stack: Layout) -> list[tuple[object, ...]]:
    """Return what a reader takes of `samples`, by position."""
    reader, position = KafkaReader(stack.brokers), [START] * PARTITIONS
    batches = []
    for record in read_all(reader, TOPICS.samples):
        own = position[record.partition]
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
        if after > own or last <= own:
            continue
        batch = decode_batch(record.value or b"")
        places = zip(batch["offset"].to_pylist(), batch["rank"].to_pylist(), strict=True)
        batches.append(batch.filter(pa.array([Position(*place) > own for place in places])))
        position[record.partition] = last
    reader.close()
    return rows_of(batches)


def rows_of(batches: list[pa.RecordBatch]) -> list[tuple[object, ...]]:
    """Return what a sample is, in order of partition and position."""
    names = ("partition", "offset", "rank", "event_id", "label", "feedback_id", "slots", "numeric")
    return sorted(
        tuple(tuple(v) if isinstance(v, list) else v for v in (row[name] for name in names))
        for batch in batches
        for row in batch.to_pylist()
    )  # fmt: skip
