"""Stores samples in the lake: files and positions in one Delta commit."""

from __future__ import annotations

import argparse

from headrace.cli.runtime import add_common, open_runtime, stop_event

HELP = "store samples in the lake, each once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.lake_delta import DeltaLake
    from headrace.stream.sink import run

    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("sink")
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    try:
        return run(
            runtime.project,
            runtime.config,
            runtime.topics,
            runtime.brokers,
            DeltaLake(runtime.lake_uri, generation=runtime.topics.generation, partitions=runtime.config.log.partitions),
            metrics,
            runtime.clock,
            runtime.home / "faust" / "sink",
            stop,
            metrics.ready,
        )
    finally:
        metrics.close()
