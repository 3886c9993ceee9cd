"""One suite for every log: real Kafka and the one in memory behave alike, to the receipt and to the error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import pytest

from headrace.backends.log.kafka import KafkaAdmin, KafkaProducer, KafkaReader
from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import ConfigRejected, InvariantBroken, Overloaded, Unavailable
from headrace.contract.interfaces.log import Admin, Producer, Reader, Record, TopicSpec
from headrace.deploy.local.layout import Layout


class World:
    """Makes the three faces of one log, and a fresh topic."""

    def __init__(self, producer: Callable[[int], Producer], reader: Callable[[], Reader], admin: Admin) -> None:
        self.producer, self.reader, self.admin = producer, reader, admin

    def topic(self, partitions: int = 2) -> str:
        """Create a topic of its own for a test."""
        name = f"test-{uuid.uuid4().hex}"
        self.admin.ensure_topics([TopicSpec(name, partitions)])
        return name


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.real)])
def world(request: pytest.FixtureRequest) -> World:
    """Each log in turn."""
    if request.param == "memory":
        log = MemoryLog()
        return World(log.producer, log.reader, log.admin())
    layout: Layout = request.getfixturevalue("stack")
    at = layout.brokers
    return World(lambda queue: KafkaProducer(at, queue_max=queue), lambda: KafkaReader(at), KafkaAdmin(at))


def read(reader: Reader, count: int, records_max: int = 100) -> list[Record]:
    """Poll until `count` records came, for at most 20 s."""
    found: list[Record] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        found += reader.poll(records_max, 0.2)
    return found


def test_records_come_back_whole_and_in_order(world: World) -> None:
    topic, producer, receipts = world.topic(), world.producer(1_000), list[tuple[Exception | None, int]]()
    for n in range(50):
        value, key = f"value {n}".encode(), f"key {n}".encode()
        headers = {"kind": "impression", "seq": str(n), "name": "größe"}
        producer.send(
            topic, 1, value, key=key, headers=headers, delivered=lambda error, at: receipts.append((error, at))
        )
    assert producer.flush(20) == 0
    assert receipts == [(None, n) for n in range(50)]
    reader = world.reader()
    reader.assign({(topic, 0): 0, (topic, 1): 0})
    records = read(reader, 50, records_max=7)
    assert [(r.topic, r.partition, r.offset) for r in records] == [(topic, 1, n) for n in range(50)]
    assert records[3].value == b"value 3" and records[3].key == b"key 3"
    assert records[3].headers == {"kind": "impression", "seq": "3", "name": "größe"}
    assert abs(records[3].timestamp_ms - time.time() * 1_000) < 60_000
    producer.close()
    reader.close()


def test_a_reader_begins_where_it_is_told(world: World) -> None:
    topic, producer, reader = world.topic(), world.producer(100), world.reader()
    for n in range(10):
        producer.send(topic, 0, b"%d" % n)
    producer.flush(20)
    reader.assign({(topic, 0): 7})
    assert [r.value for r in read(reader, 3)] == [b"7", b"8", b"9"]
    reader.assign({(topic, 0): 2})
    assert [r.value for r in read(reader, 8)] == [b"%d" % n for n in range(2, 10)]
    assert reader.begin_offsets(topic) == {0: 0, 1: 0}
    assert reader.end_offsets(topic) == {0: 10, 1: 0}
    reader.close()
    producer.close()


def test_a_tombstone_and_an_empty_value_differ(world: World) -> None:
    topic, producer, reader = world.topic(1), world.producer(100), world.reader()
    producer.send(topic, 0, None, key=b"gone")
    producer.send(topic, 0, b"", key=b"empty")
    producer.flush(20)
    reader.assign({(topic, 0): 0})
    assert [(r.key, r.value) for r in read(reader, 2)] == [(b"gone", None), (b"empty", b"")]
    reader.close()
    producer.close()


def test_a_record_of_twenty_megabytes_passes(world: World) -> None:
    topic, producer, reader = world.topic(1), world.producer(100), world.reader()
    value = bytes(range(256)) * 80_000
    producer.send(topic, 0, value)
    assert producer.flush(30) == 0
    reader.assign({(topic, 0): 0})
    assert [r.value == value for r in read(reader, 1)] == [True]
    reader.close()
    producer.close()


def test_an_offset_that_is_gone_stops_the_reader(world: World) -> None:
    topic, producer, reader = world.topic(1), world.producer(100), world.reader()
    producer.send(topic, 0, b"one")
    producer.flush(20)
    reader.assign({(topic, 0): 99})
    with pytest.raises(InvariantBroken, match="offset 99 is wanted"):
        read(reader, 1)
    reader.close()
    producer.close()


def test_a_full_queue_takes_nothing(world: World) -> None:
    topic, producer = world.topic(1), world.producer(3)
    with pytest.raises(Overloaded):
        for _ in range(50_000):
            producer.send(topic, 0, b"x" * 100)
    assert producer.flush(20) == 0
    producer.send(topic, 0, b"again")
    producer.close()


def test_topics_are_made_once_and_never_reshaped(world: World) -> None:
    topic = world.topic(2)
    world.admin.ensure_topics([TopicSpec(topic, 2)])
    with pytest.raises(ConfigRejected, match="2 partitions and the configuration says 3"):
        world.admin.ensure_topics([TopicSpec(topic, 3)])


def test_a_missing_topic_is_told(world: World) -> None:
    reader = world.reader()
    with pytest.raises(Unavailable):
        reader.end_offsets("no-such-topic")
    reader.close()


def test_retention_in_memory_stops_a_reader_that_is_behind() -> None:
    log = MemoryLog()
    log.admin().ensure_topics([TopicSpec("t", 1)])
    for n in range(5):
        log.append("t", 0, b"%d" % n, None, {})
    log.trim("t", 0, 3)
    reader = log.reader()
    assert reader.begin_offsets("t") == {0: 3}
    reader.assign({("t", 0): 2})
    with pytest.raises(InvariantBroken):
        reader.poll(10, 0)
    reader.assign({("t", 0): 3})
    assert [r.offset for r in reader.poll(10, 0)] == [3, 4]


def test_a_topic_just_made_tells_its_offsets(world: World) -> None:
    """Brokers show a topic a moment before they lead its partitions."""
    reader = world.reader()
    for _ in range(10):
        topic = world.topic(64)
        assert set(reader.end_offsets(topic).values()) == {0}
    reader.close()
