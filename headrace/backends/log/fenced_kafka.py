"""The fenced writer on Kafka: of the producers with one transactional id, the newest fences off all earlier ones."""

from __future__ import annotations

import logging
from typing import Any

import confluent_kafka as ck

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.process.awake import awake_s

log = logging.getLogger("headrace.kafka")

_FENCED = (
    ck.KafkaError._FENCED,
    ck.KafkaError.INVALID_PRODUCER_EPOCH,
    getattr(ck.KafkaError, "PRODUCER_FENCED", 90),
)


class FencedKafka:
    """Writes and reads back partition 0 of `topic`; see `headrace.contract.interfaces.fenced`. For one thread.

    An append is a transaction. The broker aborts what a fenced-off writer had begun. An open transaction of another id
    hides all that was committed behind it until it ends: `open` notes where the log ends, hidden or not, and a reading
    to the end goes on to there.
    """

    def __init__(self, brokers: str, topic: str, transactional_id: str, *, timeout_s: float = 10.0) -> None:
        self._topic, self._id, self._timeout_s = topic, transactional_id, timeout_s
        self._common: dict[str, Any] = {
            "bootstrap.servers": brokers,
            "reconnect.backoff.ms": 10,
            "reconnect.backoff.max.ms": 1_000,
            "broker.address.family": "v4",
            "log_level": 2,
            "error_cb": lambda error: log.debug("%s: %s", transactional_id, error),
        }
        self._producer: ck.Producer | None = None
        self._consumer: ck.Consumer | None = None
        self._at = -1
        self._end = 0
        """The log's end when this became the writer: all that it had committed before lies below."""

    def open(self) -> None:
        """Become the writer. Raises `Unavailable`; call again then."""
        self._producer = None
        producer = ck.Producer(
            {
                **self._common,
                "transactional.id": self._id,
                "transaction.timeout.ms": 15_000,
                "linger.ms": 0,
                "acks": "all",
            }
        )
        try:
            producer.init_transactions(self._timeout_s)
            self._end = self._log_end()
        except ck.KafkaException as error:
            raise self._named(error, "become the writer of") from error
        self._producer = producer

    def append(self, *values: bytes) -> None:
        """Commit these records, in order: all of them or none.

        Raises `Unavailable` when it is not known whether they were written: `open` again and `read`. Raises
        `InvariantBroken` when another process became the writer.
        """
        producer = self._producer
        if producer is None:
            raise Unavailable(f"{self._topic}: this process is not its writer; open it first.")
        try:
            producer.begin_transaction()
            for value in values:
                producer.produce(self._topic, value, partition=0)
            producer.commit_transaction(self._timeout_s)
        except (ck.KafkaException, BufferError) as error:
            self._producer = None
            raise self._named(error, "append to") from error

    def read(self, offset: int, wait_s: float = 0.0, *, kept_only: bool = False) -> list[tuple[int, bytes]]:
        """Return committed records from `offset` on, with their offsets.

        `wait_s` 0 reads to the present end; else it returns what comes first within `wait_s`, perhaps nothing.
        Raises `Unavailable` when the broker stays away, `InvariantBroken` where `offset` is not in the log, unless
        `kept_only`.
        """
        consumer = self._reading()
        if wait_s == 0 or self._at != offset:
            consumer.assign([ck.TopicPartition(self._topic, 0, offset)])
            self._at = offset
        found: list[tuple[int, bytes]] = []
        deadline = awake_s() + (wait_s or self._timeout_s)
        while (left := deadline - awake_s()) > 0:
            message = consumer.poll(left)
            if message is None:
                break
            error = message.error()
            if error is None:
                at, value = message.offset(), message.value()
                if at is None or value is None:
                    continue
                found.append((at, value))
                self._at = at + 1
                deadline = awake_s() + self._timeout_s if wait_s == 0 else deadline
                if wait_s:
                    return found
            elif error.code() == ck.KafkaError._PARTITION_EOF:
                if wait_s == 0 and (message.offset() or 0) >= self._end:
                    return found
            elif error.code() == ck.KafkaError._AUTO_OFFSET_RESET and kept_only:
                consumer.assign([ck.TopicPartition(self._topic, 0, ck.OFFSET_BEGINNING)])
            elif error.code() == ck.KafkaError._AUTO_OFFSET_RESET:
                raise InvariantBroken(f"{self._topic}: offset {offset} is not in the log; was the topic made anew?")
        if wait_s == 0:
            raise Unavailable(
                f"{self._topic}: the end, offset {self._end} or beyond, was not reached within {self._timeout_s} s "
                "without a record: the broker is slow, or a writer that died left a transaction open, which ends soon."
            )
        return found

    def close(self) -> None:
        """Close both clients."""
        if self._consumer is not None:
            self._consumer.close()
        self._producer = self._consumer = None

    def _log_end(self) -> int:
        """Return the offset behind the last record, committed or not."""
        looking = ck.Consumer({**self._common, "group.id": "headrace-steps", "isolation.level": "read_uncommitted"})
        try:
            ends = looking.get_watermark_offsets(ck.TopicPartition(self._topic, 0), timeout=self._timeout_s)
        finally:
            looking.close()
        if ends is None:
            raise ck.KafkaException(ck.KafkaError(ck.KafkaError._TIMED_OUT, "the log's end was not told in time"))
        return int(ends[1])

    def _reading(self) -> ck.Consumer:
        if self._consumer is None:
            self._consumer = ck.Consumer(
                {
                    **self._common,
                    "group.id": "headrace-steps",
                    "enable.auto.commit": False,
                    "enable.partition.eof": True,
                    "auto.offset.reset": "error",
                    "isolation.level": "read_committed",
                    "fetch.wait.max.ms": 20,
                    "fetch.queue.backoff.ms": 5,
                }
            )
        return self._consumer

    def _named(self, error: Exception, what: str) -> Exception:
        code = error.args[0].code() if isinstance(error, ck.KafkaException) else None
        if code in _FENCED:
            return InvariantBroken(f"another process became the writer of {self._topic} ({self._id}): this one stops.")
        return Unavailable(f"cannot {what} {self._topic}: {error}")
