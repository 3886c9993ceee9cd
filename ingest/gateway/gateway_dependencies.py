"""What a gateway is made from; the cli chooses the backends."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.contract.config import IngestConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project


@dataclass(frozen=True, kw_only=True)
class GatewayDependencies:
    """Project, settings and backends of one gateway."""

    project: Project
    config: IngestConfig
    topics: Topics
    partitions: int
    producer: Producer
    metrics: Metrics
    clock: Clock
    privacy: Privacy | None = None
    """None where the project hashes no field; else with the key that the environment holds."""
