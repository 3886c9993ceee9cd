"""Runs one stage of the stream, the join, the aggregator or the sink, as the member of a consumer group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from headrace.contract.interfaces.log import Reader
from headrace.stream.shell.engine import Engine, Stage


class RunnableStage(Stage, Protocol):
    """A stage, the name of its consumer group, and the topic that it reads."""

    name: str
    topic: str
    has_one_owner: bool
    """True where its state is of all partitions together: one member of the group reads, others wait."""
    engine: Engine | None
    """Set before the stage begins; None in tests that hand records to it themselves."""


@dataclass(frozen=True, kw_only=True)
class StageProcess:
    """The process that a stage runs in."""

    brokers: str
    generation: int
    partitions: int
    folder: Path
    """Where Faust may keep files."""
    open_reader: Callable[[], Reader]
    stop: threading.Event
    ready: Callable[[bool, str], None]
    begin_afresh: bool = False
    """Begin at the log's beginning where nothing is stored any more of what was read."""


def run_stage(stage: RunnableStage, process: StageProcess) -> int:
    """Run until `stop`; return the exit status: 0, or 1 after a failure that a restart may cure."""
    group = f"headrace-{stage.name}-g{process.generation}"
    stage.engine = Engine(
        group,
        process.brokers,
        stage.topic,
        process.partitions,
        process.folder,
        open_reader=process.open_reader,
        begin_afresh=process.begin_afresh,
        has_one_owner=stage.has_one_owner,
    )
    return stage.engine.run(stage, process.stop, process.ready)
