"""One suite for every fenced writer: real Kafka's transactions and the log in memory behave alike."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable

import confluent_kafka as ck
import confluent_kafka.admin
import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.backends.log.fenced_memory import FencedMemory, WriterEpochs
from headrace.backends.log.memory import MemoryLog
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local.layout import Layout

Make = Callable[[], FencedWriter]
Trim = Callable[[int], None]


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.real)])
def both(request: pytest.FixtureRequest) -> tuple[Make, Trim]:
    """Return what makes writers of one fresh topic, with one transactional id, and what deletes its first records."""
    topic = f"test-{uuid.uuid4().hex}"
    if request.param == "memory":
        log, epochs = MemoryLog(), WriterEpochs()
        log.admin().ensure_topics([TopicSpec(topic, 1)])
        return lambda: FencedMemory(log, topic, "writer", epochs), lambda begin: log.trim(topic, 0, begin)
    layout: Layout = request.getfixturevalue("stack")
    KafkaAdmin(layout.brokers).ensure_topics([TopicSpec(topic, 1)])

    def trim(begin: int) -> None:
        plain = ck.admin.AdminClient({"bootstrap.servers": layout.brokers})
        for future in plain.delete_records([ck.TopicPartition(topic, 0, begin)]).values():
            future.result()

    return lambda: FencedKafka(layout.brokers, topic, topic), trim


@pytest.fixture
def make(both: tuple[Make, Trim]) -> Make:
    """Return what makes writers of one fresh topic."""
    return both[0]


def values(writer: FencedWriter, offset: int = 0) -> list[bytes]:
    return [value for _, value in writer.read(offset)]


def read_back(writer: FencedWriter, offset: int) -> tuple[int, bytes]:
    """Return the next record: its marker may come a moment after the append."""
    found = writer.read(offset, 10.0)
    assert len(found) >= 1
    return found[0]


def test_what_is_appended_is_read_back_from_any_offset(make: Make) -> None:
    writer = make()
    assert values(writer) == []
    writer.open()
    offsets, following = [], 0
    for value in (b"one", b"two", b"three"):
        writer.append(value)
        at, found = read_back(writer, following)
        assert found == value
        offsets.append(at)
        following = at + 1
    assert offsets == sorted(set(offsets))
    assert values(writer) == [b"one", b"two", b"three"]
    assert values(writer, offsets[1]) == [b"two", b"three"]
    assert values(writer, following) == []
    assert values(make()) == [b"one", b"two", b"three"], "reading needs no open"
    writer.close()


def test_several_records_are_committed_in_order_and_by_a_fenced_off_writer_none(make: Make) -> None:
    writer, following = make(), 0
    writer.open()
    several = [f"record {i}".encode() for i in range(20)]
    for group in (several[:1], several[1:17], several[17:]):
        writer.append(*group)
        for value in group:
            at, found = read_back(writer, following)
            assert found == value
            following = at + 1
    heir = make()
    heir.open()
    with pytest.raises(InvariantBroken, match="another process became the writer"):
        writer.append(b"too late", b"as well")
    heir.append(b"heir", b"heir again")
    assert values(make()) == [*several, b"heir", b"heir again"]
    for each in (writer, heir):
        each.close()


@pytest.mark.real
def test_what_another_writers_open_transaction_hides_is_waited_for_and_not_taken_for_absent(stack: Layout) -> None:
    """A process that died in its transaction holds all committed records behind it back, those of others too."""
    topic = f"test-{uuid.uuid4().hex}"
    KafkaAdmin(stack.brokers).ensure_topics([TopicSpec(topic, 1)])
    config = {"bootstrap.servers": stack.brokers, "transactional.id": f"{topic}-dead", "log_level": 2}
    dead = ck.Producer({**config, "transaction.timeout.ms": 5_000})
    dead.init_transactions(10.0)
    dead.begin_transaction()
    dead.produce(topic, b"never committed", partition=0)
    dead.flush(10.0)
    writer = FencedKafka(stack.brokers, topic, topic)
    writer.open()
    writer.append(b"one", b"two")
    heir, found = FencedKafka(stack.brokers, topic, topic, timeout_s=3.0), None
    while found is None:
        heir.open()
        with contextlib.suppress(Unavailable):
            found = values(heir)
    assert found == [b"one", b"two"]
    for each in (writer, heir):
        each.close()


def test_what_retention_has_deleted_is_told_or_passed_over_as_was_asked(both: tuple[Make, Trim]) -> None:
    make, trim = both
    writer = make()
    writer.open()
    offsets = []
    for value in (b"one", b"two"):
        writer.append(value)
        offsets.append(read_back(writer, offsets[-1] + 1 if offsets else 0)[0])
    trim(offsets[1])
    for each in (writer, make()):
        assert [value for _, value in each.read(0, kept_only=True)] == [b"two"]
        with pytest.raises(InvariantBroken, match=r"offset 0 is not in the log"):
            each.read(0)
        assert [value for _, value in each.read(1_000, kept_only=True)] == [b"two"]
        with pytest.raises(InvariantBroken, match=r"offset 1000 is not in the log"):
            each.read(1_000)
        each.close()


def test_a_writer_is_opened_before_it_appends(make: Make) -> None:
    writer = make()
    with pytest.raises(Unavailable, match="not its writer"):
        writer.append(b"one")
    writer.open()
    writer.append(b"one")
    assert read_back(writer, 0)[1] == b"one"
    writer.close()


def test_the_newest_writer_fences_off_all_earlier_ones(make: Make) -> None:
    first, second = make(), make()
    first.open()
    first.append(b"first")
    second.open()
    with pytest.raises(InvariantBroken, match="another process became the writer"):
        first.append(b"too late")
    second.append(b"second")
    at, _ = read_back(second, 0)
    assert read_back(second, at + 1)[1] == b"second"
    assert values(second) == [b"first", b"second"]
    first.open()
    first.append(b"first again")
    with pytest.raises(InvariantBroken):
        second.append(b"too late")
    for writer in (first, second):
        writer.close()
