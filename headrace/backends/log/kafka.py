"""The log on Kafka: idempotent appends with receipts, reads by offset without a group. Topics: `admin_kafka.py`.

Readers own their offsets: a deleted offset is an error (`auto.offset.reset=error`), never a silent skip.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import confluent_kafka as ck

from headrace.backends.log.receipts import Receipts
from headrace.contract.errors import InvariantBroken, Overloaded, Unavailable
from headrace.contract.interfaces.log import Delivered, Record, VerbatimRecord, header_texts
from headrace.process.awake import awake_s

log = logging.getLogger("headrace.kafka")

RECORD_BYTES_MAX = 32 * 1024 * 1024
"""Largest record of any topic: a delta of 32 MiB holds a million rows of 8 floats. The broker is set to the same."""

# librdkafka asks again within 10 to 1000 ms, so that a broker that is back after its restart is found at once.
CLIENT: dict[str, Any] = {
    "reconnect.backoff.ms": 10,
    "reconnect.backoff.max.ms": 1_000,
    "socket.keepalive.enable": True,
    "broker.address.family": "v4",
    # Trouble comes to error_cb and is logged once a change of state; librdkafka's own log has a line an attempt.
    "log_level": 2,
    "message.max.bytes": RECORD_BYTES_MAX,
}

# A broker shows a topic a moment before it leads its partitions, and loses and regains that lead in a restart.
_LEADERLESS = frozenset(
    (
        ck.KafkaError.UNKNOWN_TOPIC_OR_PART,
        ck.KafkaError.LEADER_NOT_AVAILABLE,
        ck.KafkaError.NOT_LEADER_FOR_PARTITION,
    )
)


class Link:
    """Logs once when the broker goes away and once when it is back."""

    def __init__(self, who: str) -> None:
        self.away_since: float | None = None
        self._who = who

    def on_error(self, error: Any) -> None:
        """Take librdkafka's global errors."""
        if error.code() in (ck.KafkaError._ALL_BROKERS_DOWN, ck.KafkaError._TRANSPORT):
            if self.away_since is None and error.code() == ck.KafkaError._ALL_BROKERS_DOWN:
                self.away_since = time.monotonic()
                log.warning("%s: no broker answers; trying again until one does", self._who)
        else:
            log.warning("%s: %s", self._who, error)

    def back(self) -> None:
        """Note that a broker answered."""
        if self.away_since is not None:
            log.info("%s: a broker answers again, after %.1f s", self._who, time.monotonic() - self.away_since)
            self.away_since = None


class KafkaProducer:
    """Appends in call order per partition, idempotent, acks=all.

    A record that gets no receipt within 5 minutes fails: its callback has `Unavailable`. The local queue holds
    100,000 records or 256 MiB; `send` raises `Overloaded` beyond. Thread-safe; callbacks run in `poll` and `flush`.
    """

    def __init__(
        self,
        brokers: str,
        *,
        linger_ms: float = 2.0,
        queue_max: int = 100_000,
        delivery_ms: int = 300_000,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        """`refused` gets the topic of each record that Kafka refused, or did not confirm in `delivery_ms`."""
        self._link = Link("producer")
        self._receipts = Receipts(refused)
        self._broker_ms = 0
        self._producer = ck.Producer(
            {
                **CLIENT,
                "bootstrap.servers": brokers,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": linger_ms,
                "compression.type": "lz4",
                "delivery.timeout.ms": delivery_ms,
                "retry.backoff.ms": 50,
                "queue.buffering.max.messages": queue_max,
                "queue.buffering.max.kbytes": 262_144,
                "error_cb": self._link.on_error,
            }
        )

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        """Queue one record. Raises `Overloaded` when the local queue is full; nothing was queued then."""
        record: dict[str, Any] = {
            "value": value,
            "key": key,
            "partition": partition,
            "headers": [(name, text.encode()) for name, text in (headers or {}).items()],
            "on_delivery": self._receipt(delivered),
        }
        if not len(self._producer):
            self._receipts.sends_first()
        try:
            self._producer.produce(topic, **record)
        except BufferError as error:
            raise Overloaded(
                f"{len(self._producer)} records wait for Kafka and the queue is full; poll, then offer it again."
            ) from error
        except ck.KafkaException as error:
            raise Unavailable(f"Kafka takes no record of {len(value or b'')} bytes for {topic}: {error}") from error

    def poll(self, timeout_s: float) -> None:
        """Run delivery callbacks that are due, waiting at most `timeout_s`."""
        self._producer.poll(timeout_s)

    def flush(self, timeout_s: float) -> int:
        """Wait for receipts; return how many records still have none after `timeout_s`."""
        return int(self._producer.flush(timeout_s))

    def broker_ms(self) -> int:
        """Return the broker's time at the newest receipt of a topic with `append_time`; 0 before the first."""
        return self._broker_ms

    def still_s(self) -> float:
        """Return for how long records have waited without one of them being confirmed; 0 while none waits."""
        return self._receipts.still_s(len(self._producer))

    def close(self) -> None:
        """Flush for at most 2 s, so that a clean stop stays under 5 s; records beyond are lost with a warning."""
        left = self._producer.flush(2.0)
        if left:
            log.warning("producer closed with %d records without receipt", left)

    def _receipt(self, delivered: Delivered | None) -> Callable[[Any, Any], None]:
        def on_delivery(error: Any, message: Any) -> None:
            if error is None:
                self._link.back()
                self._receipts.confirmed()
                kind, time_ms = message.timestamp()
                if kind == ck.TIMESTAMP_LOG_APPEND_TIME:
                    self._broker_ms = time_ms
            else:
                self._receipts.refuse(message.topic(), message.partition(), error)
            if delivered is None:
                return
            if error is None:
                delivered(None, message.offset())
            else:
                delivered(Unavailable(f"{message.topic()}/{message.partition()}: {error}"), -1)

        return on_delivery


class KafkaReader:
    """Reads assigned partitions by offset; belongs to no group and commits nothing. For one thread."""

    def __init__(
        self, brokers: str, *, timeout_s: float = 10.0, verbatim: bool = False, fetch_bytes: int = 8 * 1024 * 1024
    ) -> None:
        """`verbatim` gives `VerbatimRecord`s. `fetch_bytes` bounds a partition's share of a fetch."""
        self._link = Link("reader")
        self._timeout_s = timeout_s
        self._record = _verbatim if verbatim else _record
        self._consumer = ck.Consumer(
            {
                **CLIENT,
                "bootstrap.servers": brokers,
                "group.id": "headrace-reader",  # librdkafka wants one; with assign() no group is ever joined.
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
                "fetch.queue.backoff.ms": 10,
                "fetch.error.backoff.ms": 50,
                "max.partition.fetch.bytes": fetch_bytes,
                "fetch.max.bytes": RECORD_BYTES_MAX + 1024 * 1024,
                "receive.message.max.bytes": 2 * RECORD_BYTES_MAX,
                "queued.max.messages.kbytes": 32_768,
                "error_cb": self._link.on_error,
            }
        )
        self._next: dict[tuple[str, int], int] = {}
        self._failed: list[Any] = []

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets (each the next one to read); replaces the former assignment."""
        self._next = dict(offsets)
        self._failed = []
        self._consumer.assign([ck.TopicPartition(topic, p, offset) for (topic, p), offset in offsets.items()])

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records, in order within a partition; empty after `timeout_s` without any.

        The first record is handed on at once with what came with it: nothing waits for `records_max`.
        Raises `Unavailable` while no broker answers or the topic is missing, `InvariantBroken` when an offset is gone.
        """
        if not self._next:
            return ()
        failed, self._failed = self._failed, []
        for message in failed:
            self._on_error(message)
        first = self._consumer.poll(timeout_s)
        if first is None:
            if self._link.away_since is not None:
                self._partitions(next(iter(self._next))[0], timeout_s=1.0)
            return ()
        messages = [first, *(self._consumer.consume(records_max - 1, 0.0) if records_max > 1 else ())]
        records = [self._record(m) for m in messages if m.error() is None]
        for record in records:
            self._next[record.topic, record.partition] = record.offset + 1
        # Errors that came along wait for the next call: raising now would lose the records beside them.
        self._failed = [m for m in messages if m.error() is not None]
        if records:
            self._link.back()
        elif self._failed:
            failed, self._failed = self._failed, []
            for message in failed:
                self._on_error(message)
        return records

    def position(self, topic: str, partition: int) -> int:
        """Return the offset that the partition is read to. librdkafka moves it past markers of transactions, and with
        them past aborted records, while `poll` waits for a record behind them."""
        reached = self._consumer.position([ck.TopicPartition(topic, partition)])[0].offset
        # Before the first record it is a negative code, and after an assignment it begins anew.
        self._next[topic, partition] = max(self._next[topic, partition], reached)
        return self._next[topic, partition]

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of each partition."""
        return {p: self._watermarks(topic, p)[0] for p in self._partitions(topic)}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the last stable offset, since the client reads committed records only: the offset that
        the next record will get, or that of the first record of the oldest open transaction."""
        return {p: self._watermarks(topic, p)[1] for p in self._partitions(topic)}

    def close(self) -> None:
        """Close the client."""
        self._consumer.close()

    def _on_error(self, message: Any) -> None:
        """Raise what the error means; return where reading goes on by itself."""
        error, topic, partition = message.error(), message.topic(), message.partition()
        if error.code() == ck.KafkaError._AUTO_OFFSET_RESET and topic is not None:
            wanted = self._next.get((topic, partition), -1)
            begin, end = self._watermarks(topic, partition)
            if not begin <= wanted <= end:
                raise InvariantBroken(
                    f"{topic}/{partition}: offset {wanted} is wanted, the log has [{begin}, {end}). Reading on would "
                    "skip events; restore from a state that still lies in the log."
                )
            # A broker that has just restarted may refuse an offset which it has: ask again from the same place.
            log.warning("reader: %s/%s: offset %d was refused and is there; asking again", topic, partition, wanted)
            self.assign(self._next)
        elif error.code() == ck.KafkaError._ALL_BROKERS_DOWN:
            self._link.on_error(error)
        elif error.code() in (ck.KafkaError.UNKNOWN_TOPIC_OR_PART, ck.KafkaError._UNKNOWN_TOPIC):
            raise Unavailable(f"topic {topic!r} does not exist; `headrace up` creates it.")
        elif error.fatal():
            raise InvariantBroken(f"the Kafka client stopped for good: {error}")
        else:
            log.warning("reader: %s/%s: %s", topic, partition, error)

    def _partitions(self, topic: str, timeout_s: float | None = None) -> list[int]:
        try:
            meta = self._consumer.list_topics(topic, timeout=timeout_s or self._timeout_s).topics.get(topic)
        except ck.KafkaException as error:
            raise Unavailable(f"Kafka does not answer: {error}. `headrace status` shows the broker.") from error
        # After a broker's crash the metadata may lack some for a while: that is never "nothing to read".
        if meta is None or meta.error is not None or sorted(meta.partitions) != [*range(len(meta.partitions) or 1)]:
            why = (meta and meta.error) or "partitions are missing"
            raise Unavailable(f"topic {topic!r}: {why}; `headrace up` creates it.")
        self._link.back()
        return sorted(meta.partitions)

    def _watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        part, deadline = ck.TopicPartition(topic, partition), awake_s() + self._timeout_s
        while True:
            try:
                found = self._consumer.get_watermark_offsets(part, timeout=max(0.1, deadline - awake_s()))
                break
            except ck.KafkaException as error:
                if error.args[0].code() not in _LEADERLESS or awake_s() > deadline:
                    raise Unavailable(f"Kafka does not tell the offsets of {topic}/{partition}: {error}") from error
                time.sleep(0.02)
        if found is None:
            raise Unavailable(f"Kafka did not tell the offsets of {topic}/{partition} in {self._timeout_s} s.")
        return int(found[0]), int(found[1])


def _record(message: Any) -> Record:
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        header_texts(message.headers() or ()),
        message.timestamp()[1],
    )


def _verbatim(message: Any) -> Record:
    raw = tuple(message.headers() or ())
    kind, time_ms = message.timestamp()
    return VerbatimRecord(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        header_texts(raw),
        time_ms,
        kind,
        raw,
    )
