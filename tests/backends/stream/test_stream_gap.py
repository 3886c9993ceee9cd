"""Goal: a worker that takes a partition over reads what the state lacks, not the window; a gap is refused and named.

Method: `headrace stream` on a real broker, a window of an hour. It is killed with -9 and another one goes on; then, as
retention would, the records that the state wants next are deleted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import confluent_kafka as ck
import pytest
from confluent_kafka.admin import AdminClient

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
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import read_range
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.metrics_text import parse

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

TOPICS, START_MS, MINUTES = Topics(generation=9), 1_700_000_000_000, 50
PROJECT_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="c"),),
    tasks=(Task(name="click", feedback="click", window_ms=3_600_000),),
    features=FeatureSpec(features=(Categorical(field="item"),)),
).checked()
"""


class Place:
    """One partition of a generation of its own, a store on disk, and whoever works there."""

    def __init__(self, stack: Layout, folder: Path) -> None:
        (folder / "project.py").write_text(PROJECT_FILE)
        toml = f"[log]\npartitions = 1\ngeneration = {TOPICS.generation}\n[join]\nsnapshot_ms = 500\n"
        (folder / "headrace.toml").write_text(toml)
        self.stack, self.folder, self.started = stack, folder, 0
        self.producer = KafkaProducer(stack.brokers)
        KafkaAdmin(stack.brokers, timeout_s=60).ensure_topics(TOPICS.specs(1))
        _, self.project = load_project(folder)

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """Start a worker with ports and local files of its own."""
        self.started += 1
        base = self.base = self.stack.port_base + 60 * (self.started + 4)
        env = os.environ | {"PORT_BASE": str(base), "HEADRACE_HOME": str(self.folder / str(self.started))}
        env |= {"HEADRACE_BROKERS": self.stack.brokers, "HEADRACE_STORE": f"file:{self.folder}/store"}
        command = [str(Path(sys.executable).with_name("headrace")), "stream", "--project", str(self.folder), *flags]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def minute(self, minute: int) -> None:
        """Append ten impressions of this minute and its punctuation: two records."""
        now_ms = START_MS + 60_000 * minute
        rows = [
            {"event_id": f"i{minute}.{n}", "request_id": f"r{minute}.{n}", "place": 0, "key": "1", "user": 1, "item": n}
            for n in range(10)
        ]
        batch = batch_from_rows([row | {"event_time_ms": now_ms} for row in rows], impression_schema(self.project))
        self.producer.send(TOPICS.events, 0, encode_batch(batch), headers={"kind": "impression"})
        time = encode_punctuation(Punctuation("g", 1, now_ms))
        self.producer.send(TOPICS.events, 0, time, headers={"kind": "punctuation"})

    def click(self, minute: int) -> None:
        """Append a click on an impression of that minute."""
        row = {"event_id": f"c{minute}", "request_id": f"r{minute}.0", "place": 0, "key": "1"}
        row |= {"event_time_ms": START_MS + 60_000 * MINUTES, "user": 1}
        batch = batch_from_rows([row], feedback_schema(self.project, self.project.feedback[0]))
        self.producer.send(TOPICS.events, 0, encode_batch(batch), headers={"kind": "feedback", "type": "click"})

    def stored(self) -> int:
        """Return the offset of the newest state; -1 without one."""
        folder = self.folder / "store" / "blobs" / "state" / "stream" / f"g{TOPICS.generation}" / "0"
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=-1)

    def samples(self) -> list[dict]:
        """Return all rows of `samples`."""
        reader = KafkaReader(self.stack.brokers)
        rows = [row for r in read_range(reader, TOPICS.samples) for row in decode_batch(r.value or b"").to_pylist()]
        reader.close()
        return rows

    def read(self) -> float:
        """Return how many records the newest worker has read."""
        url = f"http://127.0.0.1:{port('metrics_stream', self.base)}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return parse(answer.read().decode()).get("headrace_stream_records_read_total", 0.0)

    def trim(self, upto: int) -> None:
        """Delete the records below offset `upto`."""
        admin = AdminClient({"bootstrap.servers": self.stack.brokers})
        (gone,) = admin.delete_records([ck.TopicPartition(TOPICS.events, 0, upto)]).values()
        assert gone.result(30).low_watermark == upto


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_goes_on_from_the_state_and_a_gap_is_refused_by_name(stack: Layout, tmp_path: Path) -> None:
    place = Place(stack, tmp_path)
    first = place.start()
    for minute in range(MINUTES):
        place.minute(minute)
    assert place.producer.flush(30) == 0
    until(lambda: place.stored() == 2 * MINUTES - 1)
    first.kill()
    first.communicate()

    # The second one has 500 impressions of 50 minutes from the state, and answers the first of them.
    place.click(0)
    assert place.producer.flush(30) == 0
    second = place.start()
    until(lambda: len(place.samples()) == 1)
    (sample,) = place.samples()
    assert (sample["event_id"], sample["label"], sample["impression_offset"]) == ("i0.0", 1.0, 0)
    assert place.read() == 1
    second.terminate()
    _, words = second.communicate(timeout=30)
    assert f"going on from offset {2 * MINUTES}" in words
    state = place.stored()
    assert state == 2 * MINUTES

    for minute in range(MINUTES, MINUTES + 5):
        place.minute(minute)
    assert place.producer.flush(30) == 0
    place.trim(state + 4)
    third = place.start()
    _, words = third.communicate(timeout=90)
    assert third.returncode == 1
    assert f"the state goes on from offset {state + 1}, the log begins at {state + 4}" in words
    assert "log.generation" in words
    assert place.stored() == state
    assert len(place.samples()) == 1

    # The store is emptied: what the group acknowledged is known by nobody, and only a person goes on.
    shutil.rmtree(tmp_path / "store")
    fourth = place.start()
    _, words = fourth.communicate(timeout=90)
    assert fourth.returncode == 1
    assert "nothing is stored of this partition" in words and "headrace stream --begin-afresh" in words
    assert place.stored() == -1
    fifth = place.start("--begin-afresh")
    until(lambda: place.stored() == 2 * (MINUTES + 5))
    fifth.terminate()
    _, words = fifth.communicate(timeout=30)
    assert f"beginning afresh at offset {state + 4}" in words
    place.producer.close()
