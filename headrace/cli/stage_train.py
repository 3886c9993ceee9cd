"""Learn from the lake, then from the topic; publish snapshots and deltas.

One worker. Its state is in the store (checkpoints) and in the `steps` topic: killed at any moment, it goes on from
there with the same bits.
"""

from __future__ import annotations

import argparse

from headrace.backends.fenced_kafka import FencedKafka
from headrace.cli.runtime import add_common, open_runtime, stop_event
from headrace.trainer.board import Board

HELP = "learn from the lake, then from the topic; publish snapshots and deltas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.trainer.run import Parts, train

    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics("train")
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    producer = runtime.producer()
    train(
        Parts(
            project=runtime.project,
            config=runtime.config.train,
            topics=runtime.topics,
            reader=runtime.reader(),
            producer=producer,
            pen=FencedKafka(runtime.brokers, runtime.topics.steps, f"headrace-steps-{runtime.project.name}"),
            blobs=runtime.blobs(),
            metrics=metrics,
            clock=runtime.clock,
            stop=stop,
            lake=runtime.lake(),
            board=Board(runtime.tensorboard_dir / "train"),
        )
    )
    return 0
