"""Store samples in the lake: files and positions in one Delta commit."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from headrace.cli.consumer import Consumer, add_consumer_arguments, open_consumer
from headrace.cli.runtime import Runtime
from headrace.cli.stage_topics import StageTopics
from headrace.contract.errors import Unavailable

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake
    from headrace.stream.sink.archive import EventArchive

log = logging.getLogger("headrace.sink")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_consumer_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.lake.upkeep_schedule import UpkeepSchedule
    from headrace.stream.sink.stage import SinkStage

    with open_consumer(args, "sink") as consumer:
        runtime, stop = consumer.runtime, consumer.stop
        topic, events = runtime.topics.samples, runtime.topics.events
        told = consumer.topics(ids_of=(topic, events), kept_of=(topic, events))
        lake = runtime.lake(samples_id=told.ids[topic])
        _settle(lake)
        schedule = UpkeepSchedule(runtime.config.lake, upkeep_command(runtime), consumer.metrics, runtime.clock, stop)
        stage = SinkStage(
            *(runtime.config, lake, consumer.metrics, runtime.clock),
            kept_ms=told.kept_ms[topic],
            open_reader=runtime.reader,
        )
        if runtime.config.archive.events:
            stage.keep(_archive(consumer, told, stage.partitions))
        schedule.start()
        try:
            return consumer.run(stage)
        finally:
            stop.set()
            schedule.join(5.0)


def _archive(consumer: Consumer, told: StageTopics, partitions: Callable[[], Collection[int]]) -> EventArchive:
    from headrace.stream.sink.archive import EventArchive

    runtime, events = consumer.runtime, consumer.runtime.topics.events
    return EventArchive(
        *(runtime.config.archive, events, runtime.archive(events_id=told.ids[events]), consumer.metrics, runtime.clock),
        open_reader=runtime.verbatim_reader,
        partitions=partitions,
        kept_ms=told.kept_ms[events],
    )


def upkeep_command(runtime: Runtime) -> list[str]:
    """Return the command line of one upkeep of this lake."""
    told = {"project": runtime.project_dir, "brokers": runtime.brokers, "store": runtime.store, "home": runtime.home}
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    words += ["--webhdfs", runtime.webhdfs] if runtime.webhdfs else []
    words += ["--port-base", str(runtime.port_base)] if runtime.port_base is not None else []
    return [sys.executable, "-m", "headrace.cli.main", "lake", "upkeep", "--json", *words]


def _settle(lake: DeltaLake) -> None:
    """Give an older table the settings of today; the stage itself waits for a store that is away."""
    try:
        if lake.settle():
            log.info("the lake has its settings of [lake] now")
    except Unavailable as error:
        log.warning("%s", error)
