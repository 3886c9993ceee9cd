"""Keep counters over keys of all partitions, for the join and for serving. One process is active."""

from __future__ import annotations

import argparse

from headrace.cli.consumer import add_consumer_arguments, open_consumer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_consumer_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.stream.aggregate.stage import AggregateStage

    with open_consumer(args, "aggregate") as consumer:
        return consumer.run(AggregateStage(consumer.dependencies()))
