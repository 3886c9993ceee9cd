"""Opens the `rules` topic, which says by which rules events are read, for the verbs that ask it or write to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.contract.formats.topics import Topics
from headrace.stream.rule_changes import WRITER_ID


@contextmanager
def rules_topic(brokers: str, topics: Topics) -> Iterator[FencedKafka]:
    """Yield the fenced writer of the `rules` topic, which fences nobody before it is opened."""
    writer = FencedKafka(brokers, topics.rules, f"{WRITER_ID}-g{topics.generation}")
    try:
        yield writer
    finally:
        writer.close()
