"""A topic that shippers write is re-keyed into `events` by real gateways on a real broker.

Goal: every codec is read; a gateway that is killed, or a second one, loses nothing and makes nothing count twice once
events are told apart by id. Method: `headrace ingest` as processes, signals, and the log read back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import confluent_kafka as ck
import msgpack
import pytest
from local_world import CHECKOUT, free_base

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.group_kafka import KafkaGroup
from headrace.backends.log.kafka import KafkaReader
from headrace.contract.formats.dead_letters import decode_dead_letter
from headrace.contract.formats.events import PUNCTUATION, decode_batch
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.group import Claim, Fetched
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local.layout import Layout

pytestmark = pytest.mark.real

DEADLINE_S = 60.0
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


class World:
    """One user's folder, topics of their own, and gateways that read a foreign topic."""

    def __init__(self, brokers: str, folder: Path) -> None:
        self.brokers, self.folder = brokers, folder
        self.foreign = f"weblogs-{uuid.uuid4().hex[:8]}"
        self.topics = Topics(2 + uuid.uuid4().int % 1_000_000)
        self.gateways: list[subprocess.Popen[bytes]] = []
        KafkaAdmin(brokers).ensure_topics([TopicSpec(self.foreign, 3)])
        (folder / "project.py").write_text(PROJECT)

    def configure(self, **settings: str) -> None:
        """Write headrace.toml with one source of these settings."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in ({"topic": self.foreign} | settings).items()]
        log = f"[log]\npartitions = 2\ngeneration = {self.topics.generation}\n"
        (self.folder / "headrace.toml").write_text(f"{log}[[ingest.sources]]\n" + "\n".join(lines) + "\n")

    def start(self) -> subprocess.Popen[bytes]:
        """Start one more gateway process; return when it has its ports, so that the next finds others."""
        env = os.environ | {
            "HEADRACE_BROKERS": self.brokers,
            "HEADRACE_STORE": f"file:{self.folder}/store",
            "HEADRACE_HOME": str(self.folder / "home"),
            "PORT_BASE": str(free_base()),
        }
        command = [sys.executable, "-m", "headrace.cli.main", "ingest", "--project", str(self.folder)]
        said = self.folder / f"gateway-{len(self.gateways)}.log"
        with said.open("wb") as log:
            made = subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=log, stderr=log)
        self.gateways.append(made)
        deadline = time.monotonic() + DEADLINE_S
        while b"forward on" not in said.read_bytes():
            assert made.poll() is None and time.monotonic() < deadline, self.logs()
            time.sleep(0.05)
        return made

    def write(self, values: list[bytes], *, codec: str = "none", **settings: Any) -> None:
        """Append values with null keys, as shippers do, and wait for them."""
        producer = ck.Producer({"bootstrap.servers": self.brokers, "compression.type": codec, "linger.ms": 5})
        for value in values:
            producer.produce(self.foreign, value, **settings)
            producer.poll(0)
        assert producer.flush(30) == 0

    def appended(self, count: int) -> list[dict[str, Any]]:
        """Return the rows of `events` as soon as `count` different ids lie there."""
        return self._read(self.topics.events, 2, count)

    def letters(self, count: int) -> list[Any]:
        """Return the dead letters as soon as there are `count`."""
        return self._read(self.topics.dead_letters, 1, count)

    def committed(self) -> int:
        """Return the sum of the group's positions."""
        consumer = ck.Consumer({"bootstrap.servers": self.brokers, "group.id": f"headrace-{self.foreign}"})
        parts = consumer.committed([ck.TopicPartition(self.foreign, p) for p in range(3)], timeout=20)
        consumer.close()
        return sum(max(0, part.offset) for part in parts)

    def settle(self, count: int) -> None:
        """Wait until the group's positions have passed `count` records."""
        deadline = time.monotonic() + DEADLINE_S
        while (at := self.committed()) < count:
            assert time.monotonic() < deadline, f"{at} of {count} committed. {self.logs()}"
            time.sleep(0.2)
        assert at == count

    def _read(self, topic: str, partitions: int, count: int) -> list[Any]:
        reader, found, ids = KafkaReader(self.brokers), list[Any](), set[str]()
        deadline = time.monotonic() + DEADLINE_S
        KafkaAdmin(self.brokers).ensure_topics(self.topics.specs(2))
        reader.assign({(topic, p): 0 for p in range(partitions)})
        quiet = 0
        while len(ids) < count or quiet < 5:
            assert time.monotonic() < deadline, f"{len(ids)} of {count} events came. {self.logs()}"
            records = reader.poll(500, 0.1)
            rows = [row for record in records for row in _rows(topic, record.headers, record.value or b"")]
            found += rows
            ids |= {row["event_id"] if isinstance(row, dict) else row.event_id + str(row.raw) for row in rows}
            quiet = 0 if rows else quiet + 1
        reader.close()
        return found

    def logs(self) -> str:
        """Return what the gateways said."""
        return "\n".join(path.read_text(errors="replace")[-3_000:] for path in self.folder.glob("gateway-*.log"))

    def end(self) -> None:
        """End what still runs."""
        for gateway in self.gateways:
            if gateway.poll() is None:
                gateway.kill()
            gateway.wait(20)


def _rows(topic: str, headers: dict[str, str], value: bytes) -> list[Any]:
    if topic.startswith("dead"):
        return [decode_dead_letter(value)]
    return [] if headers["kind"] == PUNCTUATION else decode_batch(value).to_pylist()


@pytest.fixture
def world(stack: Layout, tmp_path: Path) -> Iterator[World]:
    """A fresh one for each test; its gateways end with it."""
    made = World(stack.brokers, tmp_path)
    yield made
    made.end()


def value(number: int, **more: Any) -> dict[str, Any]:
    """Return an impression's record as a shipper has it."""
    now_s = time.time()
    return {"@timestamp": round(now_s, 6), "request_id": f"r{number}", "user_id": number % 50, "item_id": number} | more


def test_every_codec_and_both_formats_are_read(world: World) -> None:
    world.configure(tag="shop.impression")
    codecs = ("none", "gzip", "snappy", "lz4", "zstd")
    for at, codec in enumerate(codecs):
        world.write([json.dumps(value(at * 100 + n)).encode() for n in range(100)], codec=codec)
    world.start()
    rows = world.appended(500)
    assert sorted(row["item_id"] for row in rows) == list(range(500))
    assert all(row["event_id"].startswith(f"{world.foreign}/") for row in rows)
    world.settle(500)


def test_msgpack_with_a_tag_field_and_what_cannot_be_read(world: World) -> None:
    world.configure(format="msgpack", tag_field="tag", tag="shop.nobody")
    good = [msgpack.packb(value(n, tag="shop.impression")) for n in range(10)]
    world.write([*good, b"\xc1 broken", msgpack.packb({"a": 1})], codec="snappy")
    world.start()
    assert len(world.appended(10)) == 10
    letters = sorted(world.letters(2), key=lambda letter: letter.reason)
    assert [letter.reason for letter in letters] == ["bad_chunk", "undeclared"]
    assert letters[0].raw == b"\xc1 broken" and letters[0].origin.startswith(f"kafka:{world.foreign}/")
    assert msgpack.unpackb(letters[1].raw)["a"] == 1 and letters[1].tag == "shop.nobody"
    world.settle(12)


def test_a_gateway_killed_in_the_middle_loses_nothing(world: World) -> None:
    world.configure(tag="shop.impression")
    world.start()
    total = 0
    for _ in range(3):
        world.write([json.dumps(value(total + n)).encode() for n in range(4_000)])
        total += 4_000
        deadline = time.monotonic() + DEADLINE_S
        while world.committed() < total - 3_900:
            assert time.monotonic() < deadline, world.logs()
            time.sleep(0.02)
        world.gateways[-1].send_signal(signal.SIGKILL)
        world.gateways[-1].wait(20)
        world.start()
    rows = world.appended(total)
    assert len({row["event_id"] for row in rows}) == total
    assert {row["item_id"] for row in rows} == set(range(total))
    world.settle(total)


def test_two_gateways_share_the_topic_and_one_leaves(world: World) -> None:
    world.configure(tag="shop.impression")
    first, second = world.start(), world.start()
    for at in range(10):
        world.write([json.dumps(value(at * 500 + n)).encode() for n in range(500)])
        if at == 5:
            world.appended(3_000)
            began = time.monotonic()
            first.send_signal(signal.SIGTERM)
            assert first.wait(20) == 0
            assert time.monotonic() - began < 5
    rows = world.appended(5_000)
    assert {row["item_id"] for row in rows} == set(range(5_000))
    assert len({row["event_id"] for row in rows}) == 5_000
    world.settle(5_000)
    assert second.poll() is None


def take(group: KafkaGroup, count: int) -> list[Fetched]:
    """Take until `count` records came, for at most 30 s."""
    found: list[Fetched] = []
    deadline = time.monotonic() + 30
    while len(found) < count and time.monotonic() < deadline:
        found += group.take(100)
        time.sleep(0.01)
    return found


def test_what_was_settled_is_not_read_again(world: World) -> None:
    world.write([b"%d" % n for n in range(20)], partition=0)
    group = KafkaGroup(world.brokers, world.foreign, "g")
    found = take(group, 20)
    assert [one.offset for one in found] == list(range(20))
    group.settle(found[0].claim, 12)
    group.close(10)
    again = KafkaGroup(world.brokers, world.foreign, "g")
    assert [one.offset for one in take(again, 8)] == list(range(12, 20))
    again.settle(Claim(world.foreign, 0, 999), 20)
    again.close(10)
    third = KafkaGroup(world.brokers, world.foreign, "g")
    assert [one.offset for one in take(third, 8)] == list(range(12, 20)), "a claim that is not held moved the position"
    third.close(10)


def test_latest_begins_behind_what_lies_there(world: World) -> None:
    world.write([b"old"] * 5, partition=0)
    group = KafkaGroup(world.brokers, world.foreign, "late", start="latest")
    deadline = time.monotonic() + 30
    while group.status().partitions < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    # The end is asked for when fetching begins, shortly after the assignment.
    time.sleep(1)
    world.write([b"new"] * 5, partition=0)
    assert [one.value for one in take(group, 5)] == [b"new"] * 5
    group.close(10)


def test_records_deleted_unread_are_counted_and_reading_goes_on(world: World) -> None:
    world.write([b"%d" % n for n in range(10)], partition=1)
    group = KafkaGroup(world.brokers, world.foreign, "gap")
    found = take(group, 10)
    group.settle(found[0].claim, 3)
    group.close(10)
    admin = ck.admin.AdminClient({"bootstrap.servers": world.brokers})
    for future in admin.delete_records([ck.TopicPartition(world.foreign, 1, 7)]).values():
        future.result(20)
    again = KafkaGroup(world.brokers, world.foreign, "gap")
    assert [one.offset for one in take(again, 3)] == [7, 8, 9]
    assert again.status().gap_records == 4
    again.close(10)


def test_a_topic_made_anew_is_read_from_its_beginning(world: World) -> None:
    world.write([b"%d" % n for n in range(5)], partition=2)
    earlier = ck.Consumer({"bootstrap.servers": world.brokers, "group.id": "anew", "enable.auto.commit": False})
    earlier.commit(offsets=[ck.TopicPartition(world.foreign, 2, 100)], asynchronous=False)
    earlier.close()
    group = KafkaGroup(world.brokers, world.foreign, "anew")
    assert [one.offset for one in take(group, 5)] == list(range(5))
    assert group.status().gap_records == 0
    group.close(10)


def test_a_full_queue_pauses_and_loses_nothing(world: World) -> None:
    world.write([b"%d" % n for n in range(5_000)])
    group = KafkaGroup(world.brokers, world.foreign, "full", queue_max=10)
    deadline = time.monotonic() + 30
    while not (first := group.take(1)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.5)
    deadline = time.monotonic() + 30
    while (lag := group.status().lag_records) is None and time.monotonic() < deadline:
        # Not every partition was asked for its end yet.
        time.sleep(0.02)
    assert lag is not None and 3_000 < lag < 5_000
    found = [*first, *take(group, 4_999)]
    assert sorted(int(one.value or b"") for one in found) == list(range(5_000))
    group.close(10)


def test_a_paused_partition_stops_no_other_and_goes_on_where_it_stopped(world: World) -> None:
    world.write([b"%d" % n for n in range(300)], partition=0)
    group = KafkaGroup(world.brokers, world.foreign, "paused", queue_max=200)
    first = group.take(5)
    deadline = time.monotonic() + 30
    while not first and time.monotonic() < deadline:
        first = group.take(5)
        time.sleep(0.02)
    claim = first[0].claim
    group.pause({claim})
    world.write([b"other"] * 500, partition=1)
    assert {one.claim.partition for one in take(group, 500)} == {1}
    group.pause(())
    rest = take(group, 300 - len(first))
    assert [int(one.value or b"") for one in rest] == list(range(len(first), 300))
    group.close(10)


def test_a_topic_that_is_made_later_is_waited_for(world: World) -> None:
    world.foreign = f"later-{uuid.uuid4().hex[:8]}"
    group = KafkaGroup(world.brokers, world.foreign, "later")
    time.sleep(1)
    assert group.take(1) == [] and group.status().partitions == 0
    KafkaAdmin(world.brokers).ensure_topics([TopicSpec(world.foreign, 2)])
    world.write([b"1", b"2"])
    assert sorted(one.value or b"" for one in take(group, 2)) == [b"1", b"2"]
    group.close(10)


def test_logs_of_a_server_over_raw_messages_become_events(world: World) -> None:
    mapping = """
from headrace.contract.mapping import AccessLog, Route
import msgspec
PROJECT = msgspec.structs.replace(PROJECT, mappings=(AccessLog(tag="nginx.access", routes=(Route(
    path="/item/{item_id}", event="shop.impression", fields={"user_id": "query:uid", "request_id": "query:rid"}),)),))
"""
    (world.folder / "project.py").write_text(PROJECT + mapping)
    world.configure(format="raw", tag="nginx.access", text_field="log")
    at = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
    paths = [f"/item/{n}?uid=3&rid=r{n}" for n in range(20)] + ["/favicon.ico"] * 5
    world.write([f'::1 - - [{at}] "GET {path} HTTP/1.1" 200 5 "-" "-"'.encode() for path in paths], codec="zstd")
    world.start()
    rows = world.appended(20)
    assert {row["item_id"] for row in rows} == set(range(20))
    assert all(row["event_id"].startswith(f"{world.foreign}/") for row in rows)
    world.settle(25)


@pytest.mark.long
@pytest.mark.timeout(280)
def test_gateways_that_come_and_go_lose_nothing(world: World) -> None:
    random = Random(5)
    world.configure(tag="shop.impression")
    alive, written = [world.start(), world.start()], 0
    for _ in range(10):
        for _ in range(5):
            world.write([json.dumps(value(written + n)).encode() for n in range(400)])
            written += 400
            time.sleep(0.2)
        leaving = alive.pop(random.randrange(len(alive)))
        leaving.send_signal(random.choice([signal.SIGKILL, signal.SIGTERM]))
        alive.append(world.start())
    rows = world.appended(written)
    assert {row["item_id"] for row in rows} == set(range(written))
    assert len({row["event_id"] for row in rows}) == written
    world.settle(written)
