"""Join impressions with feedback, featurize, and emit samples; any number of these share the partitions."""

from __future__ import annotations

import argparse
import os

from headrace.cli.consumer import add_consumer_arguments, open_consumer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_consumer_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.spill_file import FileSpill
    from headrace.contract.rules import rules_of
    from headrace.stream.shell.compile_join import compile_join
    from headrace.stream.shell.join_stage import StreamStage

    with open_consumer(args, "stream") as consumer:
        runtime = consumer.runtime
        consumer.metrics.ready(False, "compiling the join, once on this machine")
        compile_join(runtime.project, runtime.config.join)
        deps = consumer.dependencies()
        spill = FileSpill(runtime.home / "faust" / f"spill-{os.getpid()}")
        try:
            return consumer.run(StreamStage(deps, spill=spill, declared=rules_of(runtime.project)))
        finally:
            spill.close()
