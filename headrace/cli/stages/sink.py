"""Stores samples in the lake: files and positions in one Delta commit."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from headrace.cli.consumer import open_consumer
from headrace.cli.runtime import add_common
from headrace.cli.stages.lake_schedule import Schedule
from headrace.contract.errors import Unavailable

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake

log = logging.getLogger("headrace.sink")

HELP = "store samples in the lake, each once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.stream.sink.stage import SinkStage

    with open_consumer(args, "sink") as consumer:
        runtime, stop = consumer.runtime, consumer.stop
        consumer.create_topics()
        lake = runtime.lake()
        _settle(lake)
        schedule = Schedule(runtime, consumer.metrics, stop)
        schedule.start()
        try:
            return consumer.run(SinkStage(runtime.config, lake, consumer.metrics, runtime.clock))
        finally:
            stop.set()
            schedule.join(5.0)


def _settle(lake: DeltaLake) -> None:
    """Give an older table the settings of today; a store that is away is met again by the stage itself."""
    try:
        if lake.settle():
            log.info("the lake has its settings of [lake] now")
    except Unavailable as error:
        log.warning("%s", error)
