"""The topics of the log on Kafka: created once, with the copies asked for, and what the broker says of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.cimpl import NewTopic

from headrace.backends.log.kafka import CLIENT, RECORD_BYTES_MAX, Link
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.interfaces.log import TopicSpec, check_outlasts
from headrace.process.awake import awake_s

log = logging.getLogger("headrace.kafka")

_TIMES, _APPEND = "message.timestamp.type", "LogAppendTime"
_KEPT, _SEGMENT = "retention.ms", "segment.ms"


class KafkaAdmin:
    """Creates topics with as many copies as asked for, and tells where those that exist have fewer; deletes no
    topic."""

    def __init__(
        self, brokers: str, *, replication: int = 0, min_insync_replicas: int = 0, timeout_s: float = 20.0
    ) -> None:
        """`replication` and `min_insync_replicas` are those of `[log]`; 0 lets the number of brokers say."""
        settings: dict[str, Any] = {**CLIENT, "bootstrap.servers": brokers, "error_cb": Link("admin").on_error}
        self._admin = AdminClient(settings)
        self._brokers, self._timeout_s = brokers, timeout_s
        self._replication, self._min_insync = replication, min_insync_replicas

    def ensure_topics(self, topics: Sequence[TopicSpec]) -> None:
        """Create what is missing, and return when the broker shows all of it.

        Raises `ConfigRejected` where a topic exists with another partition count, with fewer copies than the
        configuration asks for, or is kept for no longer than what it `outlasts`; `Unavailable` without a broker. Copies
        that nobody asked for are warned of.
        """
        have = self._counts()
        replication, min_insync = copies(self._broker_count(), self._replication, self._min_insync)
        missing = [spec for spec in topics if spec.name not in have]
        if missing:
            made = self._admin.create_topics(
                [NewTopic(s.name, s.partitions, replication, config=_settings(s, min_insync)) for s in missing],
                operation_timeout=self._timeout_s,
                request_timeout=self._timeout_s,
            )
            for name, future in made.items():
                try:
                    future.result()
                except ck.KafkaException as error:
                    if error.args[0].code() != ck.KafkaError.TOPIC_ALREADY_EXISTS:
                        raise Unavailable(f"topic {name!r} was not created: {error}") from error
            have = self._shown({s.name for s in topics})
        for spec in topics:
            if have[spec.name] != spec.partitions:
                raise ConfigRejected(
                    f"topic {spec.name!r} has {have[spec.name]} partitions and the configuration says "
                    f"{spec.partitions}; the count is fixed for a generation: raise log.generation, or set "
                    "log.partitions back."
                )
        if topics:
            self._check_copies([spec.name for spec in topics], replication, min_insync)
        self._set_append_time([spec.name for spec in topics if spec.append_time])
        self._check_outlasts([spec for spec in topics if spec.outlasts in have])

    def _check_outlasts(self, specs: Sequence[TopicSpec]) -> None:
        """Hold what the broker keeps of topics against what it keeps of those that they tell of."""
        told = self._told([name for spec in specs for name in (spec.name, spec.outlasts)]) if specs else {}
        for spec in specs:
            others_ms = int(told[spec.outlasts][_KEPT])
            # A broker deletes whole segments: the first record of one stays until the last is old enough.
            others_ms += int(told[spec.outlasts][_SEGMENT]) if others_ms >= 0 else 0
            check_outlasts(spec, int(told[spec.name][_KEPT]), others_ms)

    def _set_append_time(self, names: Sequence[str]) -> None:
        """Let the broker date the records of topics that were made before they asked for it."""
        told = self._told(names) if names else {}
        for name in [name for name in names if told[name][_TIMES] != _APPEND]:
            entry = ConfigEntry(_TIMES, _APPEND, incremental_operation=AlterConfigOpType.SET)
            wanted = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=[entry])
            try:
                set_by = self._admin.incremental_alter_configs([wanted], request_timeout=self._timeout_s)
                set_by[wanted].result()
            except ck.KafkaException as error:
                raise ConfigRejected(
                    f"topic {name!r} has {_TIMES} {told[name][_TIMES]}, and it cannot be set ({error}): a wrong clock "
                    "of a gateway could run the watermark ahead. Run kafka-configs.sh --bootstrap-server "
                    f"{self._brokers} --alter --entity-type topics --entity-name {name} --add-config "
                    f"{_TIMES}={_APPEND}, then start again."
                ) from error
            log.info("topic %s: %s is %s from now on", name, _TIMES, _APPEND)

    def answers(self) -> None:
        """Return when a broker answers. Raises `Unavailable` where none does."""
        self._metadata()

    def topic_id(self, topic: str) -> str:
        """Return the id of a topic; "" where the broker (before Kafka 2.8) tells none. Raises `Unavailable`."""
        (told,) = self._admin.describe_topics(ck.TopicCollection([topic]), request_timeout=self._timeout_s).values()
        try:
            found = told.result().topic_id
        except ck.KafkaException as error:
            raise Unavailable(f"Kafka does not describe topic {topic!r}: {error}") from error
        return "" if found is None or not str(found).strip("A=") else str(found)

    def retention_ms(self, topic: str) -> int:
        """Return how long the broker keeps the topic's records; -1 for ever. Raises `Unavailable`."""
        return int(self._told([topic])[topic][_KEPT])

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Delete for good what lies before these offsets, by partition. Raises `Unavailable`."""
        wanted = [ck.TopicPartition(topic, p, offset) for p, offset in offsets.items()]
        deleted = self._admin.delete_records(wanted, request_timeout=self._timeout_s, operation_timeout=self._timeout_s)
        for place, future in deleted.items():
            try:
                future.result()
            except ck.KafkaException as error:
                where = f"{topic}/{place.partition}"
                raise Unavailable(f"Kafka does not delete what lies before {where}@{place.offset}: {error}") from error

    def _check_copies(self, names: Sequence[str], replication: int, min_insync: int) -> None:
        told = self._told(names)
        topics = self._metadata().topics
        for name in names:
            if name not in topics or not topics[name].partitions:
                raise Unavailable(f"topic {name!r}: the brokers' metadata lack it; a new start asks again.")
            found = min(len(partition.replicas) for partition in topics[name].partitions.values())
            if found < replication:
                self._tell_copies(
                    f"topic {name!r} has {found} copies of each record and {replication} are wanted: a broker that is "
                    f"lost takes records along. Give it more with kafka-reassign-partitions.sh --bootstrap-server "
                    f"{self._brokers} --reassignment-json-file FILE --execute, or set log.replication = {found}.",
                    is_asked=self._replication > 0,
                )
            insync = int(told[name]["min.insync.replicas"])
            if insync < min_insync:
                self._tell_copies(
                    f"topic {name!r} has min.insync.replicas {insync} and {min_insync} are wanted: a record may be "
                    f"acknowledged that {insync} brokers have. kafka-configs.sh --bootstrap-server {self._brokers} "
                    f"--alter --entity-type topics --entity-name {name} --add-config min.insync.replicas={min_insync} "
                    f"sets it; or set log.min_insync_replicas = {insync}.",
                    is_asked=self._min_insync > 0,
                )

    def _tell_copies(self, what: str, *, is_asked: bool) -> None:
        if is_asked:
            raise ConfigRejected(what)
        log.warning("%s", what)

    def _told(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return the settings of topics as the broker has them."""
        asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
        found: dict[str, dict[str, str]] = {}
        for resource, future in self._admin.describe_configs(asked, request_timeout=self._timeout_s).items():
            try:
                found[resource.name] = {name: entry.value for name, entry in future.result().items()}
            except ck.KafkaException as error:
                raise Unavailable(f"Kafka does not tell the settings of topic {resource.name!r}: {error}") from error
        return found

    def _broker_count(self) -> int:
        return len(self._metadata().brokers)

    def _metadata(self) -> Any:
        try:
            return self._admin.list_topics(timeout=self._timeout_s)
        except ck.KafkaException as error:
            raise Unavailable(f"Kafka does not answer in {self._timeout_s} s: {error}") from error

    def _counts(self) -> dict[str, int]:
        topics = self._metadata().topics
        return {name: len(meta.partitions) for name, meta in topics.items() if meta.error is None and meta.partitions}

    def _shown(self, names: set[str]) -> dict[str, int]:
        deadline = awake_s() + self._timeout_s
        while not names <= (have := self._counts()).keys():
            if awake_s() > deadline:
                raise Unavailable(f"topics {sorted(names - have.keys())} do not appear after {self._timeout_s} s.")
            time.sleep(0.02)
        return have


def copies(brokers: int, replication: int, min_insync: int) -> tuple[int, int]:
    """Return how many brokers have each record, and how many of them before it is acknowledged.

    0 lets the number of brokers say: 3 and 2, so that one may be away, where there are three; else 1 and 1. Raises
    `ConfigRejected` for what these brokers can't give, `Unavailable` while Kafka tells of no broker: it has just begun.

    >>> copies(3, 0, 0), copies(5, 0, 0), copies(2, 0, 0), copies(3, 2, 0)
    ((3, 2), (3, 2), (1, 1), (2, 1))
    """
    if brokers < 1:
        raise Unavailable("Kafka answers and tells of no broker yet: it has just begun. Try again in some seconds.")
    replicas = replication or (3 if brokers >= 3 else 1)
    insync = min_insync or (2 if replicas >= 3 else 1)
    if replicas > brokers:
        raise ConfigRejected(
            f"log.replication is {replicas} and {brokers} brokers answer: start the others, or lower log.replication."
        )
    if insync > replicas:
        raise ConfigRejected(
            f"log.min_insync_replicas is {insync} and a record has {replicas} copies: nothing could be written. Lower "
            "it, or raise log.replication."
        )
    return replicas, insync


def _settings(spec: TopicSpec, min_insync: int) -> dict[str, str]:
    settings = {"max.message.bytes": str(RECORD_BYTES_MAX), "min.insync.replicas": str(min_insync)}
    if spec.append_time:
        settings[_TIMES] = _APPEND
    if spec.compacted:
        return settings | {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2", _SEGMENT: "3600000"}
    return settings | {"cleanup.policy": "delete", _KEPT: str(spec.retention_ms)}
