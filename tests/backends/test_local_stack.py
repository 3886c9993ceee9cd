"""A local stack heals: what is killed with -9 comes back, and what a killed supervisor leaves is taken over. One of its
processes can be restarted, and the others go on.

Goal: after kill -9 of broker, NameNode, DataNode, and then of the supervisor itself, data written before is there and
nothing runs twice. Method: real processes in a folder whose name has spaces.
"""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from headrace.backends.blobs_hdfs import HdfsBlobs
from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local import readiness
from headrace.deploy.local import stack as local_stack
from headrace.deploy.local.layout import Layout
from headrace.deploy.local.supervise import Supervisor, orphans

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


def write(layout: Layout, topic: str, text: bytes) -> None:
    """Leave something in the log and in the store."""
    assert layout.webhdfs
    KafkaAdmin(layout.brokers, timeout_s=180).ensure_topics([TopicSpec(topic, 1)])
    producer = KafkaProducer(layout.brokers)
    producer.send(topic, 0, text)
    assert producer.flush(180) == 0
    HdfsBlobs(layout.webhdfs, "/heal", patience_s=120).put("kept", text)


def check(layout: Layout, topic: str, texts: list[bytes]) -> None:
    """All of it is there."""
    assert layout.webhdfs
    reader, found = KafkaReader(layout.brokers, timeout_s=180), list[bytes | None]()
    reader.assign({(topic, 0): 0})
    deadline = time.monotonic() + 180
    while len(found) < len(texts) and time.monotonic() < deadline:
        found += [record.value for record in reader.poll(10, 0.5)]
    reader.close()
    assert found == texts
    assert HdfsBlobs(layout.webhdfs, "/heal", patience_s=120).get("kept") == texts[-1]


def test_what_is_killed_comes_back_with_its_data(stack: Layout) -> None:
    write(stack, "heal-1", b"before")
    before = {p.name: p.pid for p in Supervisor(stack).processes()}
    assert set(before) == {"kafka", "namenode", "datanode"}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid) for pid in before.values() if psutil.pid_exists(pid)], timeout=10)
    # The clients' own patience bridges the gap: no call here is told that something was away.
    write(stack, "heal-1", b"after")
    check(stack, "heal-1", [b"before", b"after"])
    after = {p.name: p.pid for p in Supervisor(stack).processes()}
    assert not set(before.values()) & set(after.values())


def test_a_killed_supervisor_leaves_nothing_that_up_does_not_take_over(stack: Layout) -> None:
    write(stack, "heal-2", b"before")
    old = orphans(stack.home)
    assert len(old) == 4, "supervisord, broker, NameNode, DataNode"
    for process in old:
        if "headrace.deploy.local.supervisord" in process.cmdline():
            process.kill()
    said: list[str] = []
    local_stack.start(stack, Topics().specs(2), said.append, stages=False)
    assert any("ended 3 processes" in line for line in said)
    assert not [p for p in old if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not readiness.kafka_trouble(stack.brokers, 10.0)
    check(stack, "heal-2", [b"before"])
    assert len(orphans(stack.home)) == 4


def test_restart_gives_one_process_a_new_pid_and_leaves_the_others(stack: Layout) -> None:
    write(stack, "heal-3", b"before")
    before = {p.name: p.pid for p in Supervisor(stack).processes()}
    with pytest.raises(ConfigRejected, match="no process millrace here; there are"):
        local_stack.restart(stack, ["datanode", "millrace"], print)
    assert {p.name: p.pid for p in Supervisor(stack).processes()} == before
    said: list[str] = []
    local_stack.restart(stack, ["datanode"], said.append)
    after = {p.name: p.pid for p in Supervisor(stack).processes()}
    assert {name for name in before if after[name] != before[name]} == {"datanode"}
    assert [line.split(" after ")[0] for line in said] == ["hdfs is ready"]
    check(stack, "heal-3", [b"before"])
