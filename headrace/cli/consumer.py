"""The wiring that `stream`, `aggregate` and `sink` share: a stage in the consumer group of its name, until SIGTERM."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.backends.health import BeatingStop
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.rules_topic import rules_topic
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.cli.stage_topics import StageTopics
from headrace.contract.metrics import Stage

if TYPE_CHECKING:
    # Faust takes a second to load, and `--help` should not wait for it.
    from headrace.stream.shell.dependencies import StageDependencies
    from headrace.stream.shell.run_stage import RunnableStage


@dataclass(frozen=True)
class Consumer:
    """A process that is about to run a stage."""

    runtime: Runtime
    metrics: PrometheusMetrics
    stop: BeatingStop
    begin_afresh: bool = False
    """Somebody has decided to begin without the state that was lost."""

    def topics(self, *, ids_of: Sequence[str] = (), kept_of: Sequence[str] = ()) -> StageTopics:
        """Create the topics that are missing, and return what the log says of those that are named."""
        return self.runtime.open_topics(ids_of=ids_of, kept_of=kept_of)

    def dependencies(self) -> StageDependencies:
        """Return what the join and the aggregator depend on, with the rules that the log begins with."""
        from headrace.stream.rule_changes import begin_rules
        from headrace.stream.shell.dependencies import StageDependencies

        events = self.runtime.topics.events
        ids = self.topics(ids_of=(events,)).ids
        with rules_topic(self.runtime.brokers, self.runtime.topics) as writer:
            now_ms = self.runtime.clock.now_ms()
            project = begin_rules(
                writer,
                self.runtime.project,
                now_ms=now_ms,
                pause=time.sleep,
                stored=self.runtime.stored_rules,
            )
        return StageDependencies(
            project=project,
            config=self.runtime.config,
            topics=self.runtime.topics,
            producer=self.runtime.producer(self.metrics, linger_ms=1.0),
            blobs=self.runtime.blobs(),
            metrics=self.metrics,
            clock=self.runtime.clock,
            open_reader=self.runtime.reader,
            begin_afresh=self.begin_afresh,
            topic_id=ids[events],
        )

    def run(self, stage: RunnableStage) -> int:
        """Run the stage until SIGTERM; return the exit status."""
        from headrace.stream.shell.run_stage import StageProcess, run_stage

        process = StageProcess(
            brokers=self.runtime.brokers,
            generation=self.runtime.topics.generation,
            partitions=self.runtime.config.log.partitions,
            folder=self.runtime.home / "faust" / stage.name,
            open_reader=self.runtime.reader,
            stop=self.stop,
            ready=self.metrics.ready,
            begin_afresh=self.begin_afresh,
        )
        self.stop.attach(self.metrics.health)
        with self.runtime.reachable(self.metrics.health):
            return run_stage(stage, process)


def add_consumer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a stage that goes on from what it stored."""
    add_common(parser)
    parser.add_argument(
        "--begin-afresh",
        action="store_true",
        help="where what this stage stored is gone or can't be read: begin at the log's beginning without it. For one "
        "start; a state that can be read is gone on from all the same",
    )


@contextmanager
def open_consumer(args: argparse.Namespace, name: Stage) -> Iterator[Consumer]:
    """Yield the process of a stage, whose metrics port is open while the block runs."""
    runtime = open_runtime(args)
    stop = stop_event()
    metrics = runtime.metrics(name)
    try:
        yield Consumer(runtime, metrics, stop, args.begin_afresh)
    finally:
        metrics.close()
