"""Goal: on a real broker and real stores, what is archived is what lay in the topic, and both are one log.

Method: records of every kind, a transaction that was aborted among them, and a join's traffic. In a folder the
archive's writer runs here; on HDFS `headrace sink` does, and is killed with -9 while it archives. Then the topic
forgets.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import confluent_kafka as ck
import pytest
from archive_joined import PARTITIONS, digest
from confluent_kafka.admin import AdminClient
from join_world import records, traffic

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import SystemClock
from headrace.backends.delta.leases import Leases
from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.archived import ArchivedReader
from headrace.backends.log.kafka import KafkaReader
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import ArchiveConfig
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import VerbatimRecord, read_range
from headrace.deploy.local.layout import Layout
from headrace.stream.sink.archive import EventArchive

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]
RAW = [("kind", b"foreign"), ("x", None), ("x", b"\xff\x00"), ("", b"")]
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
    """Topics of a generation of their own, and traffic for them."""

    def __init__(self, stack: Layout, generation: int) -> None:
        self.stack, self.generation, self.topics = stack, generation, Topics(generation)
        self.events = self.topics.events
        self.admin = KafkaAdmin(stack.brokers, timeout_s=60)
        self.admin.ensure_topics(self.topics.specs(PARTITIONS))
        self.waiting = {p: list(records(traffic(70 + p, 150), Random(p))) for p in range(PARTITIONS)}
        self.producer = ck.Producer({"bootstrap.servers": stack.brokers, "linger.ms": 0, "acks": "all"})

    def fill(self, count: int) -> None:
        for partition, waiting in self.waiting.items():
            for record in waiting[:count]:
                headers = [(name, text.encode()) for name, text in record.headers.items()]
                self.producer.produce(self.events, record.value, record.key, partition, headers=headers)
            del waiting[:count]
        self.producer.flush(30)

    def strange(self) -> None:
        """Append what a foreign writer may, and a transaction that ends in nothing."""
        self.producer.produce(self.events, None, None, 0, headers=RAW)
        self.producer.produce(self.events, b"", b"", 1)
        self.producer.flush(30)
        writer = ck.Producer({"bootstrap.servers": self.stack.brokers, "transactional.id": f"a{self.generation}"})
        writer.init_transactions(30)
        for partition in range(PARTITIONS):
            writer.begin_transaction()
            writer.produce(self.events, b"never", None, partition)
            writer.flush(30)
            writer.abort_transaction(30)

    def in_topic(self) -> dict[int, list[VerbatimRecord]]:
        reader = KafkaReader(self.stack.brokers, verbatim=True)
        found: dict[int, list[VerbatimRecord]] = {p: [] for p in range(PARTITIONS)}
        for record in read_range(reader, self.events):
            assert isinstance(record, VerbatimRecord)
            found[record.partition].append(record)
        reader.close()
        return found

    def ends(self) -> dict[int, int]:
        reader = KafkaReader(self.stack.brokers)
        found = reader.end_offsets(self.events)
        reader.close()
        return found

    def forget(self, share: float) -> None:
        """Delete the first records, as retention does."""
        wanted = [ck.TopicPartition(self.events, p, int(end * share)) for p, end in self.ends().items()]
        admin = AdminClient({"bootstrap.servers": self.stack.brokers})
        for future in admin.delete_records(wanted).values():
            future.result(30)

    def digest(self, archive: DeltaArchive | None, cuts: dict[int, int] | None = None) -> str:
        live = KafkaReader(self.stack.brokers)
        reader = live if archive is None else ArchivedReader(live, archive, self.events, holder="test", cuts=cuts)
        try:
            return digest(read_range(reader, self.events))
        finally:
            reader.close()


def archive_at(place: Place, uri: str, folder: Path) -> DeltaArchive:
    leases = Leases(FileBlobs(folder / "blobs"), SystemClock(), lease_ms=600_000, table="events")
    return DeltaArchive(
        *(uri, place.events),
        generation=place.generation,
        partitions=PARTITIONS,
        leases=leases,
        events_id=place.admin.topic_id(place.events),
    )


def check_one_log(place: Place, archive: DeltaArchive, whole: str) -> None:
    """Hold digests of what is joined from either, and from both, against that of the whole topic."""
    ends, random = place.ends(), Random(5)
    assert place.digest(archive) == whole
    assert place.digest(archive, ends) == whole
    for _ in range(2):
        assert place.digest(archive, {p: random.randrange(end) for p, end in ends.items()}) == whole
    for share in (0.4, 1.0):
        place.forget(share)
        assert place.digest(archive) == whole


def test_a_folder_has_what_lay_on_the_broker(stack: Layout, tmp_path: Path):
    place = Place(stack, 41)
    archive = archive_at(place, str(tmp_path / "events"), tmp_path)
    stage = EventArchive(
        *(ArchiveConfig(), place.events, archive, MemoryMetrics(), SystemClock()),
        open_reader=lambda: KafkaReader(stack.brokers, verbatim=True),
        partitions=lambda: range(PARTITIONS),
        kept_ms=-1,
    )
    for _ in range(4):
        place.fill(120)
        place.strange()
        assert stage._one_round(frozenset(range(PARTITIONS)))
    assert stage._one_round(frozenset(range(PARTITIONS)))
    state, topic = archive.state(), place.in_topic()
    assert state is not None
    for partition, span in state.whole.items():
        assert list(archive.read(state.version, partition, span)) == topic[partition]
        assert span == (0, place.ends()[partition])
    strange = next(record for record in topic[0] if record.value is None)
    assert (strange.raw_headers, strange.key, strange.time_kind) == (tuple(RAW), None, 2)
    check_one_log(place, archive, place.digest(None))
    place.strange()
    place.forget(1.0)
    reader = ArchivedReader(KafkaReader(stack.brokers), archive, place.events, holder="test")
    with pytest.raises(InvariantBroken, match="were forgotten before they were archived"):
        reader.assign({(place.events, 0): 0})
    reader.close()


@pytest.fixture
def sink(stack: Layout, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    (tmp_path / "project.py").write_text(PROJECT_FILE)
    toml = f"[log]\npartitions = {PARTITIONS}\ngeneration = 42\n[archive]\ncommit_ms = 1000\n[lake]\ncompact_ms = 0\n"
    (tmp_path / "headrace.toml").write_text(toml)
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        env = os.environ | {"PORT_BASE": str(stack.port_base + 60 * (len(started) + 4))}
        env |= {"HEADRACE_WEBHDFS": stack.webhdfs or "", "HEADRACE_BROKERS": stack.brokers}
        env |= {"HEADRACE_STORE": f"{stack.store}/{tmp_path.name}"}
        env |= {"HEADRACE_HOME": str(tmp_path / "home")}
        command = [str(Path(sys.executable).with_name("headrace")), "sink", "--project", str(tmp_path)]
        with (tmp_path / f"sink-{len(started)}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_sink_that_is_killed_archives_on_real_hdfs(
    stack: Layout, tmp_path: Path, sink: Callable[[], subprocess.Popen[str]]
):
    place = Place(stack, 42)
    archive = archive_at(place, f"{stack.store}/{tmp_path.name}/lake/events", tmp_path)
    random = Random(9)
    for _ in range(3):
        process = sink()
        before = archive.state()
        until_s = time.monotonic() + 60
        # It archives by then, and is killed somewhere in what follows.
        while (archive.state() == before) and time.monotonic() < until_s:
            place.fill(20)
            time.sleep(0.2)
        place.strange()
        time.sleep(random.random() * 2)
        process.kill()
        process.wait()
    place.fill(1_000)
    process = sink()
    until_s = time.monotonic() + 60
    ends = place.ends()
    topic = place.in_topic()
    last = {p: found[-1].offset + 1 for p, found in topic.items()}
    while time.monotonic() < until_s:
        state = archive.state()
        if state is not None and all(state.whole[p].end >= end for p, end in last.items()):
            break
        time.sleep(0.5)
    assert state is not None
    for partition in ends:
        assert list(archive.read(state.version, partition, state.whole[partition])) == topic[partition]
        assert state.whole[partition].begin == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    check_one_log(place, archive, place.digest(None))
