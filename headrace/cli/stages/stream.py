"""Joins impressions with feedback, featurizes, and emits samples; any number of these share the partitions."""

from __future__ import annotations

import argparse
import os

from headrace.cli.rules import begin_rules
from headrace.cli.runtime import add_common, open_runtime, stop_event

HELP = "join impressions with feedback, featurize, emit samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.spill_file import FileSpill
    from headrace.contract.rules import rules_of
    from headrace.stream.shell.join_stage import run
    from headrace.stream.shell.warm import warm

    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("stream")
    metrics.ready(False, "compiling the join, once on this machine")
    warm(runtime.project, runtime.config.join)
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    began = begin_rules(runtime)
    producer = runtime.producer(linger_ms=1.0)
    spill = FileSpill(runtime.home / "faust" / f"spill-{os.getpid()}")
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
            spill,
            rules_of(runtime.project),
            runtime.home / "faust" / "stream",
            stop,
            metrics.ready,
        )
    finally:
        spill.close()
        metrics.close()
