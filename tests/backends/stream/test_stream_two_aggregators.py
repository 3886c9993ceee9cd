"""Goal: a second aggregator beside the first, as in a rolling deploy, stops no value, nor does the first one's end.

Method: `headrace aggregate` processes on a real broker, with a store on a folder; punctuation goes on all the time.
Every value is counted again from the events at the end (replay/ledger/settled.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_world import free_base

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.cli.project_folder import load_project
from headrace.contract.formats.events import (
    AGGREGATE_SCHEMA,
    Punctuation,
    batch_from_rows,
    decode_batch,
    encode_batch,
    encode_punctuation,
    impression_schema,
)
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.deploy.local.layout import Layout
from headrace.replay.ledger.settled import check_settled

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

TOPICS, PARTITIONS = Topics(generation=8), 3
PROJECT_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="c", fields={"item": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=3_000),),
    features=FeatureSpec(
        counters=(Counter(name="m", key="item", window_ms=60_000),), features=(Categorical(field="item"),)
    ),
).checked()
"""


class Traffic:
    """Impressions of one item in every partition, and the time that goes on."""

    def __init__(self, stack: Layout, project: Path) -> None:
        self.producer, self.reader = KafkaProducer(stack.brokers), KafkaReader(stack.brokers)
        self.config, self.project = load_project(project)
        self.count, self.now_ms = 0, 1_700_000_000_000

    def go_on(self) -> None:
        self.now_ms += 500
        for partition in range(PARTITIONS):
            self.count += 1
            row = {"event_id": f"i{self.count}", "request_id": f"r{self.count}", "place": 0, "key": str(partition)}
            row |= {"event_time_ms": self.now_ms, "user": partition, "item": 7}
            value = encode_batch(batch_from_rows([row], impression_schema(self.project)))
            self.producer.send(TOPICS.events, partition, value, headers={"kind": "impression"})
            told = encode_punctuation(Punctuation("g", 1, self.now_ms))
            self.producer.send(TOPICS.events, partition, told, headers={"kind": "punctuation"})
        assert self.producer.flush(60) == 0

    def told(self) -> tuple[int, int]:
        """Return the newest time and the newest epoch that partition 0 has values of."""
        records = [r for r in read_range(self.reader, TOPICS.events) if r.partition == 0]
        values = [decode_batch(r.value or b"", AGGREGATE_SCHEMA) for r in records if r.headers["kind"] == "aggregate"]
        rows = [row for value in values for row in value.to_pylist()]
        return max((row["as_of_ms"] for row in rows), default=0), max((row["epoch"] for row in rows), default=0)

    def until_told(self, what: str) -> int:
        """Let time go on until values of it come; return their epoch."""
        self.go_on()
        wanted, end_s = self.now_ms, time.monotonic() + 90
        while time.monotonic() < end_s:
            self.go_on()
            time.sleep(0.3)
            newest_ms, epoch = self.told()
            if newest_ms >= wanted:
                return epoch
        raise AssertionError(f"no values {what}")


def test_values_flow_on_while_two_overlap_and_when_the_first_has_gone(stack: Layout, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT_FILE)
    (tmp_path / "headrace.toml").write_text(
        f"[log]\npartitions = {PARTITIONS}\ngeneration = {TOPICS.generation}\n[aggregate]\nsnapshot_ms = 500\n"
    )
    KafkaAdmin(stack.brokers, timeout_s=60).ensure_topics(TOPICS.specs(PARTITIONS))
    traffic, processes = Traffic(stack, tmp_path), list[subprocess.Popen[bytes]]()

    def start() -> None:
        words = [str(Path(sys.executable).with_name("headrace")), "aggregate", "--project", str(tmp_path)]
        words += ["--brokers", stack.brokers, "--store", f"file:{tmp_path}/store", "--port-base", str(free_base())]
        words += ["--home", str(tmp_path / f"home{len(processes)}")]
        with (tmp_path / f"{len(processes)}.log").open("ab") as said:
            processes.append(subprocess.Popen(words, env=os.environ, stdout=said, stderr=said))

    try:
        start()
        first = traffic.until_told("of the first")
        start()
        # The group forms anew when the second has joined it, which takes it some seconds.
        for _ in range(30):
            traffic.go_on()
            time.sleep(0.5)
        both = traffic.until_told("while there are two")
        assert [process.poll() for process in processes] == [None, None]
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(60) == 0
        second = traffic.until_told("of the second")
        start()
        processes[1].kill()
        third = traffic.until_told("of the third")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert first <= both < second < third
    records = list(read_range(traffic.reader, TOPICS.events))
    traffic.reader.close()
    counts = check_settled(traffic.project, traffic.config, records)
    assert counts.closes() and counts.values > 20, counts
