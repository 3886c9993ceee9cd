"""One suite for every log: real Kafka and the one in memory behave alike, to the receipt and to the error."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import confluent_kafka as ck
import confluent_kafka.admin
import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.kafka import KafkaProducer, KafkaReader
from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import ConfigRejected, InvariantBroken, Overloaded, Unavailable
from headrace.contract.interfaces.log import Admin, Producer, Reader, Record, TopicSpec, read_range
from headrace.deploy.local.layout import Layout

Transaction = Callable[[str, bytes, bool], None]
"""Writes one record into partition 0 in a transaction of its own, and commits it (True) or aborts it."""


class World:
    """Makes producers, readers and an admin of one log, and a fresh topic."""

    def __init__(
        self,
        producer: Callable[[int], Producer],
        reader: Callable[[], Reader],
        admin: Admin,
        transaction: Transaction,
    ) -> None:
        self.producer, self.reader, self.admin, self.transaction = producer, reader, admin, transaction

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
        return World(log.producer, log.reader, log.admin(), partial(remember, log))
    layout: Layout = request.getfixturevalue("stack")
    at = layout.brokers
    return World(
        lambda queue: KafkaProducer(at, queue_max=queue), lambda: KafkaReader(at), KafkaAdmin(at), partial(write, at)
    )


def remember(log: MemoryLog, topic: str, value: bytes, commit: bool) -> None:
    """Write a transaction as Kafka's log shows it: the record, aborted or not, and a marker."""
    if commit:
        log.append(topic, 0, value, None, {})
    else:
        log.mark(topic, 0)
    log.mark(topic, 0)


def transactional(brokers: str, name: str = "") -> ck.Producer:
    """Return a transactional producer, under an id of its own by default."""
    name = name or uuid.uuid4().hex
    producer = ck.Producer({"bootstrap.servers": brokers, "transactional.id": name, "log_level": 2})
    producer.init_transactions(30)
    return producer


def write(brokers: str, topic: str, value: bytes, commit: bool) -> None:
    """Write a transaction, and return when its marker lies in the log."""
    producer, offsets = transactional(brokers), list[int]()
    producer.begin_transaction()
    producer.produce(topic, value, partition=0, on_delivery=lambda _error, message: offsets.append(message.offset()))
    producer.flush(10)
    (producer.commit_transaction if commit else producer.abort_transaction)(10)
    reader = ck.Consumer({"bootstrap.servers": brokers, "group.id": "test", "isolation.level": "read_uncommitted"})
    deadline = time.monotonic() + 20
    while reader.get_watermark_offsets(ck.TopicPartition(topic, 0))[1] < offsets[0] + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reader.close()


def wait_for_end(reader: Reader, topic: str, end: int) -> None:
    """Wait until partition 0 can be read up to `end`: a marker comes a moment after the transaction's end."""
    deadline = time.monotonic() + 20
    while reader.end_offsets(topic)[0] < end:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read(reader: Reader, count: int, records_max: int = 100) -> list[Record]:
    """Poll until `count` records came, for at most 20 s."""
    found: list[Record] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        found += reader.poll(records_max, 0.2)
    return found


def test_a_topic_has_an_id_of_its_own_that_stays(world: World) -> None:
    one, other = world.topic(), world.topic()
    ids = [world.admin.topic_id(name) for name in (one, other, one)]
    assert ids[0] == ids[2] != ids[1] and all(ids)


def test_a_topic_tells_how_long_it_is_kept_and_what_it_tells_of_goes_first(world: World) -> None:
    letters, marks = f"test-{uuid.uuid4().hex}", f"test-{uuid.uuid4().hex}"
    kept = TopicSpec(letters, 1, retention_ms=7_200_000), TopicSpec(marks, 1, retention_ms=86_400_000_000)
    world.admin.ensure_topics([kept[0], TopicSpec(marks, 1, retention_ms=86_400_000_000, outlasts=letters)])
    assert [world.admin.retention_ms(name) for name in (letters, marks)] == [7_200_000, 86_400_000_000]
    for told in (world.admin.topic_id, world.admin.retention_ms):
        with pytest.raises(Unavailable):
            told("no-such-topic")
    with pytest.raises(ConfigRejected, match=r"would be forgotten while it is still there"):
        world.admin.ensure_topics([kept[1], TopicSpec(letters, 1, outlasts=marks)])


def test_what_lies_before_an_offset_is_deleted_for_good(world: World) -> None:
    topic, producer = world.topic(), world.producer(1_000)
    for n in range(10):
        producer.send(topic, 0, str(n).encode())
    producer.flush(20)
    world.admin.delete_before(topic, {0: 4})
    world.admin.delete_before(topic, {0: 2})
    reader = world.reader()
    assert (reader.begin_offsets(topic)[0], reader.end_offsets(topic)[0]) == (4, 10)
    reader.assign({(topic, 0): 4})
    assert [r.offset for r in read(reader, 6)] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(Unavailable):
        world.admin.delete_before("no-such-topic", {0: 1})


@pytest.mark.real
def test_kafka_tells_what_it_keeps_and_refuses_copies_that_a_topic_does_not_have(
    stack: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    topic, plain = f"test-{uuid.uuid4().hex}", ck.admin.AdminClient({"bootstrap.servers": stack.brokers})
    spec = TopicSpec(topic, 2, retention_ms=7_200_000)
    admin = KafkaAdmin(stack.brokers)
    admin.ensure_topics([spec])
    assert (admin.retention_ms(topic), caplog.messages) == (7_200_000, [])
    with pytest.raises(ConfigRejected, match=r"log.replication is 2 and 1 brokers"):
        KafkaAdmin(stack.brokers, replication=2).ensure_topics([spec])
    with pytest.raises(ConfigRejected, match=r"min_insync_replicas is 2 and a record has 1 copies"):
        KafkaAdmin(stack.brokers, min_insync_replicas=2).ensure_topics([spec])
    first = admin.topic_id(topic)
    plain.delete_topics([topic])[topic].result(30)
    deadline = time.monotonic() + 30
    while topic in plain.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    admin.ensure_topics([spec])
    assert admin.topic_id(topic) not in ("", first)


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
    for told in (reader.begin_offsets, reader.end_offsets):
        with pytest.raises(Unavailable):
            told("no-such-topic")
    reader.close()


@pytest.mark.parametrize("told", [{}, {"t": {}}, {"t": {1: None}}, {"t": {0: None, 2: None}}])
def test_metadata_that_lack_a_partition_are_never_nothing_to_read(told: dict[str, dict[int, None]]) -> None:
    reader = KafkaReader("127.0.0.1:1")
    topics = {name: SimpleNamespace(error=None, partitions=partitions) for name, partitions in told.items()}
    reader.close()
    reader._consumer = SimpleNamespace(list_topics=lambda *_, **__: SimpleNamespace(topics=topics))
    for ask in (reader.begin_offsets, reader.end_offsets):
        with pytest.raises(Unavailable, match="partitions are missing"):
            ask("t")


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


def test_a_position_moves_past_what_no_reader_sees(world: World) -> None:
    """A range ends at its end offset, whether the last offsets belong to records, to markers or to aborted records."""
    topic, reader = world.topic(2), world.reader()
    assert list(read_range(reader, topic)) == []
    world.transaction(topic, b"one", True)
    assert [r.value for r in read_range(reader, topic)] == [b"one"]
    assert reader.position(topic, 0) == reader.end_offsets(topic)[0] == 2
    world.transaction(topic, b"aborted", False)
    assert [r.value for r in read_range(reader, topic, silent_s=5.0)] == [b"one"]
    assert reader.position(topic, 0) == reader.end_offsets(topic)[0] == 4
    world.transaction(topic, b"two", True)
    assert [(r.offset, r.value) for r in read_range(reader, topic)] == [(0, b"one"), (4, b"two")]
    assert [r.value for r in read_range(reader, topic, begins={0: 1}, ends={0: 4}, silent_s=5.0)] == []
    assert [r.value for r in read_range(reader, topic, begins={0: 1}, ends={0: 5})] == [b"two"]
    reader.close()


def test_a_range_whose_end_does_not_come_is_unavailable(world: World) -> None:
    """Silence is never the end: the error names the partition, its offsets and the bound."""
    topic, producer, reader = world.topic(1), world.producer(100), world.reader()
    producer.send(topic, 0, b"one")
    producer.flush(20)
    values = []
    with pytest.raises(Unavailable, match=r"nothing came for 0\.5 s .* partition 0 at offset 1 of 3"):
        values.extend(record.value for record in read_range(reader, topic, ends={0: 3}, silent_s=0.5))
    assert values == [b"one"]
    reader.close()
    producer.close()


@pytest.mark.real
def test_an_open_transaction_holds_the_end_back(stack: Layout) -> None:
    """Nobody waits for a writer that may be dead: what lies behind its first record is read when it ends."""
    topic, admin, reader = f"test-{uuid.uuid4().hex}", KafkaAdmin(stack.brokers), KafkaReader(stack.brokers)
    admin.ensure_topics([TopicSpec(topic, 1)])
    write(stack.brokers, topic, b"one", True)
    slow = transactional(stack.brokers)
    slow.begin_transaction()
    slow.produce(topic, b"slow", partition=0)
    slow.flush(10)
    write(stack.brokers, topic, b"two", True)
    assert reader.end_offsets(topic) == {0: 2}
    assert [r.value for r in read_range(reader, topic)] == [b"one"]
    with pytest.raises(Unavailable, match="partition 0 at offset 2 of 5"):
        list(read_range(reader, topic, ends={0: 5}, silent_s=0.5))
    slow.commit_transaction(10)
    wait_for_end(reader, topic, 6)
    assert [r.value for r in read_range(reader, topic)] == [b"one", b"slow", b"two"]
    reader.close()


@pytest.mark.real
def test_the_next_fenced_writer_ends_a_dead_ones_transaction(stack: Layout) -> None:
    topic, admin, reader = f"test-{uuid.uuid4().hex}", KafkaAdmin(stack.brokers), KafkaReader(stack.brokers)
    admin.ensure_topics([TopicSpec(topic, 1)])
    writer = FencedKafka(stack.brokers, topic, topic)
    writer.open()
    writer.append(b"one")
    dead = transactional(stack.brokers, topic)
    dead.begin_transaction()
    dead.produce(topic, b"never committed", partition=0)
    dead.flush(10)
    with pytest.raises(InvariantBroken):
        writer.append(b"fenced off")
    heir = FencedKafka(stack.brokers, topic, topic)
    heir.open()
    heir.append(b"two")
    wait_for_end(reader, topic, 6)
    assert [(r.offset, r.value) for r in read_range(reader, topic)] == [(0, b"one"), (4, b"two")]
    assert heir.read(0) == [(0, b"one"), (4, b"two")]
    for client in (writer, heir, reader):
        client.close()


def test_a_topic_just_made_tells_its_offsets(world: World) -> None:
    """Brokers show a topic a moment before they lead its partitions."""
    reader = world.reader()
    for _ in range(10):
        topic = world.topic(64)
        assert set(reader.end_offsets(topic).values()) == {0}
    reader.close()


@pytest.mark.real
def test_the_broker_dates_records_of_a_topic_that_asks_for_it_later_too(stack: Layout) -> None:
    brokers, name = stack.brokers, f"dated-{time.time_ns()}"
    admin, producer, reader = KafkaAdmin(brokers), KafkaProducer(brokers), KafkaReader(brokers)
    try:
        for dated in (False, True, True):
            admin.ensure_topics([TopicSpec(name, 1, append_time=dated)])
            begun_ms = time.time_ns() // 10**6
            producer.send(name, 0, b"x")
            assert producer.flush(10.0) == 0
            assert (producer.broker_ms() >= begun_ms) is dated
        *_, last = read_range(reader, name)
        assert last.timestamp_ms == producer.broker_ms()
    finally:
        producer.close()
        reader.close()
