"""What the stream's stages are given: one struct in place of a row of arguments."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.contract.config import Config
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
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
