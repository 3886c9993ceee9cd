"""A full disk under the local stack's servers, and everything at once; needs root and a loop device.

Goal: a Kafka that dies on a full disk has all its topics when there is room again; `headrace chaos --stage all` closes
its account. Method: a small disk of the test's own, filled to the last byte; the verb itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.contract.config import Config
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import TopicSpec, read_range
from headrace.deploy.local import readiness
from headrace.deploy.local.chaos.own_stack import own_stack
from headrace.deploy.local.chaos.small_disk import SmallDisk, lacking
from headrace.deploy.local.supervise import Supervisor

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(1_500)]

SIZE_BYTES = 4 << 30
FULL_S = 6.0
READY_S = 90.0
RECORDS = 50
MORE_TOPICS = 40


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if reason := lacking(tmp_path, SIZE_BYTES):
        pytest.skip(reason)
    one = SmallDisk(tmp_path, SIZE_BYTES)
    yield one
    one.unmount()


def test_a_kafka_killed_on_a_full_disk_has_its_topics_when_there_is_room_again(disk: SmallDisk) -> None:
    topics = Topics()
    with own_stack(Path(), Config(), [], lambda _: None, home=disk.mount / "home") as layout:
        admin, producer = KafkaAdmin(layout.brokers), KafkaProducer(layout.brokers)
        # Recovery writes an index entry for every 4 KiB of KRaft's own topic: without some there is nothing to damage.
        for number in range(MORE_TOPICS):
            admin.ensure_topics([TopicSpec(name=f"more-{number}", partitions=2)])
        before = {name: admin.topic_id(name) for name in (topics.events, topics.samples, topics.steps)}
        for number in range(RECORDS):
            producer.send(topics.steps, 0, f"{number}".encode())
        producer.flush(30)
        disk.fill()
        os.kill(Supervisor(layout).pids()["kafka"], signal.SIGKILL)
        time.sleep(FULL_S)
        disk.free()
        assert not readiness.kafka_trouble(layout.brokers, READY_S)
        reader = KafkaReader(layout.brokers)
        values = [record.value for record in read_range(reader, topics.steps)]
        reader.close()
        producer.close()
        assert {name: KafkaAdmin(layout.brokers).topic_id(name) for name in before} == before
        assert values == [f"{number}".encode() for number in range(RECORDS)]


def test_a_whole_stack_survives_every_fault_there_is(tmp_path: Path) -> None:
    if reason := lacking(tmp_path):
        pytest.skip(reason)
    command = [sys.executable, "-m", "headrace.cli.main", "chaos", "--stage", "all", "--kills", "6", "--rate", "200"]
    ran = subprocess.run([*command, "--seed", "7"], capture_output=True, text=True, timeout=1_400, check=False)
    assert ran.returncode == 0, ran.stdout[-4_000:] + ran.stderr[-2_000:]
    assert "the account closes" in ran.stdout
