"""Goal: two real workers share the partitions, the rules change, one is killed with -9 right after and another joins:
each sample comes out once, by the rules its impression was read under.

Method: `headrace stream` processes and `headrace spec apply` on a real broker and a real store; the checker reads
`samples` by position and compares with one pass of the pure join over `events`. The ledger's rejoin goes through the
change too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import msgspec
import pyarrow as pa
import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.cli.project_folder import load_project
from headrace.contract.config import port
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    decode_batch,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.metrics_text import parse
from headrace.deploy.local.readiness import http_get
from headrace.replay.ledger.rejoin import rejoin
from headrace.stream.join.join import JoinState
from headrace.stream.rule_changes import first_rules

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
CHANGED_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Cross, FeatureSpec, Rate

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64", "device": "string"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=2_000, correct_ms=4_000, correction_weight=2.0),),
    features=FeatureSpec(
        counters=(Counter(name="u", key="user"), Counter(name="m", key="user", window_ms=60_000)),
        features=(
            Categorical(field="item"),
            Cross(fields=("item", "device")),
            Rate(of="counter.u.click", over="counter.u.impression"),
            Rate(of="counter.m.click", over="counter.m.impression"),
        ),
    ),
).checked()
"""


def test_each_sample_once_across_kill_and_rebalance(stack: Layout, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT_FILE)
    (tmp_path / "headrace.toml").write_text(
        f"[log]\npartitions = {PARTITIONS}\ngeneration = {TOPICS.generation}\n[join]\nsnapshot_ms = 500\n"
    )
    KafkaAdmin(stack.brokers, timeout_s=60).ensure_topics(TOPICS.specs(PARTITIONS))
    # Both find no rules and write the first ones at the same time.
    workers = [start(stack, tmp_path, number) for number in range(2)]
    try:
        append(stack, tmp_path, workers)
        expected = joined(stack, tmp_path)
        deadline = time.monotonic() + 240
        while (found := taken(stack)) != expected and time.monotonic() < deadline:
            time.sleep(2)
        differ = [metric(stack, number, "headrace_stream_rules_differ") for number in (1, 2)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert len(expected) > 2_000
    assert found == expected
    assert differ == [0.0, 0.0], "a worker of before a change is in line with the log, like one of after it"
    assert len({row[-3] for row in expected}) == 2, "samples of two feature specs"
    assert sum(bool(row[-1]) for row in expected) > 20, "late clicks correct what was told"
    account_closes(stack, tmp_path)


def start(stack: Layout, project: Path, number: int) -> subprocess.Popen[bytes]:
    """Start a worker with its own home and ports, on the same store."""
    with (project / f"worker{number}.log").open("ab") as log:
        env = env_of(stack, project, number)
        return subprocess.Popen(headrace("stream", project), env=env, stdout=subprocess.DEVNULL, stderr=log)


def headrace(verb: str, project: Path, *more: str) -> list[str]:
    """Return a command line of a verb."""
    return [str(Path(sys.executable).with_name("headrace")), verb, *more, "--project", str(project)]


def metric(stack: Layout, number: int, name: str) -> float:
    """Return a metric of a worker that lives."""
    at = port("metrics_stream", stack.port_base + 60 * (number + 1))
    status, body = http_get(f"http://{HOST}:{at}/metrics")
    assert status == 200, body
    return parse(body.decode())[name]


def env_of(stack: Layout, project: Path, number: int) -> dict[str, str]:
    """Return the environment of a process of its own on the stack's broker and store."""
    env = os.environ | {
        "PORT_BASE": str(stack.port_base + 60 * (number + 1)),
        "HEADRACE_HOME": str(project / f"{number}"),
    }
    env |= {"HEADRACE_BROKERS": stack.brokers, "HEADRACE_STORE": stack.store, "HEADRACE_WEBHDFS": str(stack.webhdfs)}
    return env


def change_rules(stack: Layout, project: Path) -> None:
    """Edit the project's file, and put it in force; a second time does nothing."""
    (project / "project.py").write_text(CHANGED_FILE)
    said = []
    for _ in range(2):
        made = subprocess.run(
            headrace("spec", project, "apply", "--json"), env=env_of(stack, project, 9), capture_output=True, check=True
        )
        said.append(msgspec.json.decode(made.stdout))
    assert [one["applied"] for one in said] == [True, False]
    assert said[0]["number"] == 2 and any("device" in line for line in said[0]["changes"])


def await_first_rules(stack: Layout) -> None:
    """Return when a worker has written the rules that the log begins with."""
    deadline = time.monotonic() + 120
    reader = KafkaReader(stack.brokers)
    while not reader.end_offsets(TOPICS.rules)[0]:
        assert time.monotonic() < deadline, "no worker wrote the first rules"
        time.sleep(0.2)
    reader.close()


def append(stack: Layout, project: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    """Append events for some 25 s; on the way change the rules, kill one worker with -9 and start another one."""
    _, shop = load_project(project)
    await_first_rules(stack)
    producer, random = KafkaProducer(stack.brokers), Random(5)
    now_ms, count = 1_700_000_000_000, 0
    shown, clicked = impression_schema(shop), feedback_schema(shop, shop.feedback[0])
    for step in range(250):
        if step == 95:
            assert producer.flush(60) == 0
            change_rules(stack, project)
            _, shop = load_project(project)
            shown = impression_schema(shop)
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
                row |= {"event_time_ms": now_ms, "user": partition, "item": random.randrange(50)}
                rows.append(row | {"device": random.choice(["phone", "desk"])})
            clicks = [row | {"event_id": f"c{row['event_id']}"} for row in random.sample(rows, 3)]
            # Some answer what was shown 4 s ago, after the window; under the new rules they correct it.
            old = f"i{count - 805}"
            late = [{**clicks[0], "event_id": f"late{old}", "request_id": f"r{old[1:]}"}] if count > 805 else []
            clicks += late
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
    reader = KafkaReader(stack.brokers)
    began = first_rules(shop, list(read_range(reader, TOPICS.rules)))
    joins = [JoinState(began, config.join, silent_ms=10_000, partition=p) for p in range(PARTITIONS)]
    emitted = [e.batch for r in read_range(reader, TOPICS.events) if (e := joins[r.partition].take(r)) is not None]
    reader.close()
    return rows_of(emitted)


def account_closes(stack: Layout, project: Path) -> None:
    """Join once more as the ledger does, from the rules that the log begins with."""
    config, shop = load_project(project)
    reader = KafkaReader(stack.brokers)
    began = first_rules(shop, list(read_range(reader, TOPICS.rules)))
    expected, _ = rejoin(began, config, read_range(reader, TOPICS.events))
    reader.close()
    task = expected.tasks["click"]
    assert task.closes() and task.late > 20
    assert len(joined(stack, project)) == expected.samples.num_rows


def taken(stack: Layout) -> list[tuple[object, ...]]:
    """Return what a reader takes of `samples`, by position."""
    reader, position = KafkaReader(stack.brokers), [START] * PARTITIONS
    batches = []
    for record in read_range(reader, TOPICS.samples):
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
    names = ("partition", "offset", "rank", "event_id", "label", "feedback_id", "slots", "numeric", "device")
    names += ("spec", "weight", "correction")
    return sorted(
        tuple(tuple(v) if isinstance(v, list) else v for v in (row.get(name) or 0 for name in names))
        for batch in batches
        for row in batch.to_pylist()
    )  # fmt: skip
