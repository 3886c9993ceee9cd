"""What the stream's stages are given: one struct in place of a row of arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.contract.config import Config
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer, Reader
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project


@dataclass(frozen=True, kw_only=True)
class StageDependencies:
    """All that the join and the aggregator depend on. Tests put a log, a store and a clock in memory here."""

    project: Project
    """With the rules that the log begins with."""
    config: Config
    topics: Topics
    producer: Producer
    blobs: Blobs
    """Where states are stored."""
    metrics: Metrics
    clock: Clock
    open_reader: Callable[[], Reader] | None = None
    """Makes the reader with which the aggregator finds the newest epoch in the log. Without one its state alone tells
    it: for those that read nothing of the aggregates."""
    begin_afresh: bool = False
    """Begin at the log's beginning where states are stored and none can be read: a person has decided it."""
    topic_id: str = ""
    """Of `events`, by which a topic that was made anew is told from the one that a state was made of; "" where the
    broker tells none."""
