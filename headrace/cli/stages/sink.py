"""Store samples in the lake: files and positions in one Delta commit."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from headrace.cli.consumer import add_consumer_arguments, open_consumer
from headrace.cli.runtime import Runtime
from headrace.contract.errors import Unavailable

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake

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
        topic = runtime.topics.samples
        told = consumer.topics(ids_of=(topic,), kept_of=(topic,))
        lake = runtime.lake(samples_id=told.ids[topic])
        _settle(lake)
        schedule = UpkeepSchedule(runtime.config.lake, upkeep_command(runtime), consumer.metrics, runtime.clock, stop)
        stage = SinkStage(
            *(runtime.config, lake, consumer.metrics, runtime.clock),
            kept_ms=told.kept_ms[topic],
            open_reader=runtime.reader,
        )
        schedule.start()
        try:
            return consumer.run(stage)
        finally:
            stop.set()
            schedule.join(5.0)


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
