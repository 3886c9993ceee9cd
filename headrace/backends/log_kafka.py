"""The log on Kafka, by confluent-kafka: an idempotent producer, readers that assign by hand, topic creation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from headrace.contract.errors import ConfigRejected, InvariantBroken, Overloaded, Unavailable
from headrace.contract.log import Delivered, Record, TopicSpec

logger = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 33_554_432
"""32 MiB: a delta with a large dense part still fits in one record."""
_CALL_S = 10.0


def _common(brokers: str) -> dict[str, Any]:
    return {
        "bootstrap.servers": brokers,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
        "log_level": 2,
        "logger": logger,
    }


class KafkaProducer:
    """Appends with acks=all, idempotent, in order; retries for ever while the broker is away.

    `transactional_id` gives a fenced producer: see `commit`. Not thread-safe but for `send`.
    """

    def __init__(self, brokers: str, *, linger_ms: float = 2.0, transactional_id: str | None = None) -> None:
        settings: dict[str, Any] = {
            **_common(brokers),
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": linger_ms,
            "compression.type": "lz4",
            "message.max.bytes": MESSAGE_BYTES_MAX,
            "queue.buffering.max.kbytes": 262_144,
            "delivery.timeout.ms": 2_147_483_647,
        }
        if transactional_id is not None:
            settings |= {"transactional.id": transactional_id, "delivery.timeout.ms": 60_000}
        self._producer = confluent_kafka.Producer(settings)

    @property
    def raw(self) -> Any:
        """The confluent producer, for transactions."""
        return self._producer

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
        """Queue one record; see `contract.log.Producer`."""

        def receipt(error: Any, message: Any) -> None:
            if delivered is not None:
                delivered(KafkaException(error) if error is not None else None, -1 if error else message.offset())
            elif error is not None:
                logger.error("a record for %s/%d was not delivered: %s", topic, partition, error)

        try:
            self._producer.produce(
                topic,
                value=value,
                key=key,
                partition=partition,
                headers=[(k, v.encode()) for k, v in (headers or {}).items()],
                on_delivery=receipt,
            )
        except BufferError as error:
            raise Overloaded(f"Kafka's local queue is full ({len(self._producer)} records); poll and retry.") from error

    def poll(self, timeout_s: float) -> None:
        """Run delivery callbacks that are due."""
        self._producer.poll(timeout_s)

    def flush(self, timeout_s: float) -> int:
        """Wait for receipts; return how many records still have none."""
        return int(self._producer.flush(timeout_s))

    def close(self) -> None:
        """Flush for at most 5 s."""
        left = self._producer.flush(5)
        if left:
            logger.warning("%d records had no receipt when the producer closed", left)


class KafkaReader:
    """Reads assigned partitions by offset, committed records only; owns no group."""

    def __init__(self, brokers: str, *, latest: bool = False) -> None:
        self._ends_group = "headrace-reader"
        self._consumer = confluent_kafka.Consumer(
            {
                **_common(brokers),
                "group.id": self._ends_group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 100,
                "fetch.min.bytes": 1,
                "fetch.error.backoff.ms": 50,
                "fetch.message.max.bytes": 4_194_304,
                "queued.max.messages.kbytes": 65_536,
                "topic.metadata.refresh.interval.ms": 30_000,
            }
        )

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        """Read on from these offsets; replaces the former assignment."""
        self._consumer.assign([TopicPartition(t, p, o) for (t, p), o in sorted(offsets.items())])

    def poll(self, records_max: int, timeout_s: float) -> Sequence[Record]:
        """Return up to `records_max` records: the first within `timeout_s`, then what is already here."""
        found: list[Record] = []
        try:
            first = self._consumer.poll(timeout_s)
            if first is None:
                return found
            messages = [first]
            if records_max > 1:
                messages += self._consumer.consume(records_max - 1, 0)
        except KafkaException as error:
            raise Unavailable(f"Kafka does not answer: {error}.") from error
        for message in messages:
            error = message.error()
            if error is not None:
                self._judge(error, message)
                continue
            found.append(_record(message))
        return found

    @staticmethod
    def _judge(error: Any, message: Any) -> None:
        if error.code() in (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET):
            raise InvariantBroken(
                f"{message.topic()}/{message.partition()}: the offset to read on from is not in the topic any more "
                f"({error}). Reading on would skip records; restore from an older position or the lake."
            )
        if error.code() == KafkaError._PARTITION_EOF or error.retriable():
            return
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._RESOLVE):
            return  # The client reconnects by itself; an empty poll says "nothing yet".
        raise Unavailable(f"Kafka: {error}.")

    def _watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        try:
            found = self._consumer.list_topics(topic, timeout=_CALL_S).topics[topic]
            if found.error is not None:
                raise Unavailable(f"topic {topic!r}: {found.error}.")
            return {
                p: self._consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=_CALL_S, cached=False)
                for p in sorted(found.partitions)
            }
        except KafkaException as error:
            raise Unavailable(f"Kafka does not answer about {topic!r}: {error}.") from error

    def begin_offsets(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of each partition."""
        return {p: low for p, (low, _) in self._watermarks(topic).items()}

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Return, a partition, the offset that the next record will get."""
        return {p: high for p, (_, high) in self._watermarks(topic).items()}

    def close(self) -> None:
        """Let go."""
        self._consumer.close()


def _record(message: Any) -> Record:
    headers = {name: value.decode() for name, value in (message.headers() or [])}
    return Record(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        headers,
        message.timestamp()[1],
    )


class KafkaAdmin:
    """Creates topics; never deletes one."""

    def __init__(self, brokers: str, *, replicas: int = 1) -> None:
        self._admin = AdminClient(_common(brokers))
        self._replicas = replicas

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing; see `contract.log.Admin`."""
        try:
            there = self._admin.list_topics(timeout=_CALL_S).topics
        except KafkaException as error:
            raise Unavailable(f"Kafka does not answer: {error}.") from error
        missing = []
        for topic in topics:
            found = there.get(topic.name)
            if found is None:
                missing.append(NewTopic(topic.name, topic.partitions, self._replicas, config=_settings(topic)))
            elif len(found.partitions) != topic.partitions:
                raise ConfigRejected(
                    f"topic {topic.name!r} has {len(found.partitions)} partitions and log.partitions says "
                    f"{topic.partitions}. Another count is a new generation: raise log.generation."
                )
        if not missing:
            return
        for name, future in self._admin.create_topics(missing).items():
            try:
                future.result(timeout=_CALL_S)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise Unavailable(f"topic {name!r} could not be created: {error}.") from error


def _settings(topic: TopicSpec) -> dict[str, str]:
    size = {"max.message.bytes": str(MESSAGE_BYTES_MAX)}
    if topic.compacted:
        return {**size, "cleanup.policy": "compact", "segment.ms": "3600000"}
    return {**size, "retention.ms": str(topic.retention_ms)}
