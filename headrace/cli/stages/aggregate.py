"""Keeps counters over keys of all partitions; one active process."""

from __future__ import annotations

import argparse

from headrace.cli.rules import begin_rules
from headrace.cli.runtime import add_common, open_runtime, stop_event

HELP = "keep counters over all partitions for the join and for serving"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.stream.aggregate.stage import run

    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("aggregate")
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    began = begin_rules(runtime)
    producer = runtime.producer(linger_ms=1.0)
    try:
        return run(
            began,
            runtime.config,
            runtime.topics,
            runtime.brokers,
            producer,
            runtime.blobs(),
            metrics,
            runtime.clock,
            runtime.home / "faust" / "aggregate",
            stop,
            metrics.ready,
        )
    finally:
        metrics.close()
