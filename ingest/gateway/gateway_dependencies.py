"""What a gateway is made from; the cli chooses the backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.log_start import LogStart


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
    start: LogStart = field(default_factory=LogStart)
    """What the log says of this gateway's time before."""
    instance: str = ""
    """Names this process and no other: part of the ids of events that come without an id and a chunk."""
    broker_ms: Callable[[], int] = lambda: 0
    """Returns the broker's time at the producer's newest receipt; 0 where it is not known."""
    late: LateEvents = field(default_factory=lambda: LateEvents(JoinConfig().repeat_horizon_ms))
    """Which events are too late to be told from repeats."""
    looked_up: bool = False
    """Every event that is offered was looked up and is new: none is too late."""
