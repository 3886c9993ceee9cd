"""Stores samples in the lake: files and positions in one Delta commit."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from headrace.cli.runtime import add_common, open_runtime, stop_event
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
    from headrace.stream.sink.stage import run

    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("sink")
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    lake = runtime.lake()
    _settle(lake)
    schedule = Schedule(runtime, metrics, stop)
    schedule.start()
    try:
        return run(
            runtime.config,
            runtime.topics,
            runtime.brokers,
            lake,
            metrics,
            runtime.clock,
            runtime.home / "faust" / "sink",
            stop,
            metrics.ready,
        )
    finally:
        stop.set()
        schedule.join(5.0)
        metrics.close()


def _settle(lake: DeltaLake) -> None:
    """Give an older table the settings of today; a store that is away is met again by the stage itself."""
    try:
        if lake.settle():
            log.info("the lake has its settings of [lake] now")
    except Unavailable as error:
        log.warning("%s", error)
