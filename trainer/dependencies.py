"""What a trainer depends on: the log, the store, the lake, time, and how it is told to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from headrace.contract.config import TrainConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Admin, Producer, Reader
from headrace.contract.interfaces.progress import Progress, Silent
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.process.call_watch import CallWatch
from headrace.trainer.validation.board import Board


class Stop(Protocol):
    """A threading.Event, or what acts like one."""

    def is_set(self) -> bool:
        """Say whether the process was asked to stop."""


class StageMetrics(Metrics, Protocol):
    """Metrics that also answer the readiness probe."""

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage works."""


@dataclass
class Dependencies:
    """What a trainer depends on."""

    project: Project
    config: TrainConfig
    topics: Topics
    reader: Reader
    producer: Producer
    steps_writer: FencedWriter
    blobs: Blobs
    metrics: StageMetrics
    clock: Clock
    stop: Stop
    calls: CallWatch
    """Ends the process where a call does not come back."""
    lake: LakeReader | None = None
    board: Board | None = None
    progress: Progress = field(default_factory=Silent)
    background: bool = True
    admin: Admin | None = None
    open_reader: Callable[[], Reader] | None = None
    """Makes a reader for the thread that stores checkpoints. Without it, or `admin`, steps stay in their topic."""
    samples_id: str = ""
    """The id of the `samples` topic, as `Admin.topic_id`; "" asks nothing of what is stored."""
    steps_id: str = ""
    """The id of the `steps` topic, likewise."""
    name: str = "trainer"
    """Tells this trainer from others of the model, and stays when it is started anew."""
    take_over: bool = False
    """True starts also where another trainer took the model over from this one."""
