"""Goal: topics get as many copies as their settings or the brokers say, and those that have fewer are told by name.
Method: the admin of Kafka, with a client that remembers what it is asked."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.backends.log.admin_kafka import KafkaAdmin, copies
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import TopicSpec, check_outlasts


class Answer:
    """A future that is done."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


class Cluster:
    """So many brokers, and topics with copies and settings."""

    def __init__(self, brokers: int) -> None:
        self.brokers = brokers
        self.topics: dict[str, tuple[int, int, dict[str, str]]] = {}

    def list_topics(self, timeout: float) -> Any:
        topics = {
            name: SimpleNamespace(
                error=None, partitions={p: SimpleNamespace(replicas=[*range(copies)]) for p in range(partitions)}
            )
            for name, (partitions, copies, _) in self.topics.items()
        }
        return SimpleNamespace(brokers=dict.fromkeys(range(self.brokers)), topics=topics)

    def create_topics(self, topics: Any, **_: Any) -> dict[str, Answer]:
        for one in topics:
            self.topics[one.topic] = (one.num_partitions, one.replication_factor, dict(one.config))
        return {one.topic: Answer(None) for one in topics}

    def describe_configs(self, resources: Any, **_: Any) -> dict[Any, Answer]:
        said = {r: {"retention.ms": "1000", "segment.ms": "604800000"} | self.topics[r.name][2] for r in resources}
        return {
            r: Answer({name: SimpleNamespace(value=value) for name, value in each.items()}) for r, each in said.items()
        }


def admin(cluster: Cluster, **asked: int) -> KafkaAdmin:
    """Return an admin of the cluster."""
    made = KafkaAdmin("127.0.0.1:1", **asked)
    made._admin = cluster
    return made


SPECS = [TopicSpec("events", 2, retention_ms=1_000), TopicSpec("features", 1, compacted=True)]


@pytest.mark.parametrize(
    ("brokers", "asked", "wanted"),
    [
        (1, {}, (1, "1")),
        (2, {}, (1, "1")),
        (3, {}, (3, "2")),
        (7, {}, (3, "2")),
        (3, {"replication": 2}, (2, "1")),
        (5, {"replication": 5, "min_insync_replicas": 3}, (5, "3")),
    ],
)
def test_topics_are_made_with_the_copies_that_are_wanted(
    caplog: pytest.LogCaptureFixture, brokers: int, asked: dict[str, int], wanted: tuple[int, str]
) -> None:
    cluster = Cluster(brokers)
    for _ in range(2):
        admin(cluster, **asked).ensure_topics(SPECS)
    found = {(copies, settings["min.insync.replicas"]) for _, copies, settings in cluster.topics.values()}
    assert (found, caplog.messages) == ({wanted}, [])


def test_a_topic_with_fewer_is_warned_of_and_refused_where_more_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(1)
    admin(cluster).ensure_topics(SPECS)
    cluster.brokers = 3
    with caplog.at_level(logging.WARNING):
        admin(cluster).ensure_topics(SPECS)
    assert len(caplog.messages) == 4
    assert "'events' has 1 copies of each record and 3 are wanted" in caplog.messages[0]
    assert "kafka-reassign-partitions.sh --bootstrap-server 127.0.0.1:1" in caplog.messages[0]
    assert "--entity-name events --add-config min.insync.replicas=2" in caplog.messages[1]
    with pytest.raises(ConfigRejected, match=r"'events' has 1 copies .* 3 are wanted"):
        admin(cluster, replication=3).ensure_topics(SPECS)
    cluster.topics = {name: (partitions, 3, settings) for name, (partitions, _, settings) in cluster.topics.items()}
    with pytest.raises(ConfigRejected, match=r"'events' has min.insync.replicas 1 and 2 are wanted"):
        admin(cluster, min_insync_replicas=2).ensure_topics(SPECS)


def test_what_these_brokers_cannot_give_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"no broker yet"):
        copies(0, 0, 0)
    with pytest.raises(ConfigRejected, match=r"log.replication is 3 and 2 brokers"):
        copies(2, 3, 0)
    with pytest.raises(ConfigRejected, match=r"log.min_insync_replicas is 4"):
        copies(3, 0, 4)


WEEK_MS = 7 * 86_400_000
MARKS = TopicSpec("marks", 1, retention_ms=3 * WEEK_MS, outlasts="letters")


@pytest.mark.parametrize(
    ("letters_ms", "marks_ms", "refused"),
    [
        (WEEK_MS, 3 * WEEK_MS, ""),
        (WEEK_MS, -1, ""),
        # A letter may stay until its segment of a week is closed and old enough.
        (2 * WEEK_MS, 3 * WEEK_MS, f"to more than {3 * WEEK_MS}, or to -1"),
        (-1, 3 * WEEK_MS, "for ever: .* to -1 "),
    ],
)
def test_marks_that_would_go_before_what_they_tell_of_are_refused(letters_ms: int, marks_ms: int, refused: str) -> None:
    """An operator may have set either since; a topic of an older release is kept for ever."""
    cluster = Cluster(1)
    specs = [TopicSpec("letters", 1, retention_ms=letters_ms), MARKS]
    cluster.topics["marks"] = (1, 1, {"retention.ms": str(marks_ms), "min.insync.replicas": "1"})
    with pytest.raises(ConfigRejected, match=refused) if refused else nullcontext():
        admin(cluster).ensure_topics(specs)


def test_retries_outlast_the_letters_that_they_tell_of() -> None:
    """Of all topics they alone tell of another; a mark that is gone would have its letter offered again."""
    specs = {spec.name: spec for spec in Topics().specs(1)}
    assert {spec.name: spec.outlasts for spec in specs.values() if spec.outlasts} == {"retries": "dead-letters"}
    check_outlasts(specs["retries"], specs["retries"].retention_ms, specs["dead-letters"].retention_ms + WEEK_MS)


def test_every_verb_takes_its_admin_from_the_runtime_that_knows_the_settings() -> None:
    """A gateway is often the first to create topics: an admin of its own would leave `[log]` out."""
    room = Path(__file__).resolve().parents[3] / "headrace" / "cli"
    own = [path.name for path in sorted(room.rglob("*.py")) if "KafkaAdmin(" in path.read_text()]
    assert own == ["runtime.py"]
