"""Brings what the logs don't have: crawls the sources that the project declares, politely, and writes each changed
version to `events` with the time at which it was fetched.

Addresses, validators and what Kafka lacks are kept in HEADRACE_HOME/crawl; bodies lie in the store, below crawl/bodies.
One process is enough; a second one on the same folder is refused.
"""

from __future__ import annotations

import argparse
import logging

from headrace.cli.runtime import add_common, open_runtime, stop_event
from headrace.contract.errors import ConfigRejected

HELP = "crawl declared sources: changed versions into `events`, bodies into the store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)
    parser.add_argument("--once", action="store_true", help="fetch what is due, send it, end")
    parser.add_argument(
        "--extract-again",
        action="store_true",
        help="fetch nothing: extract the stored bodies again, as the project declares now, send what changes, end",
    )


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.frontier_sqlite import Frontier
    from headrace.ingest.crawl.service import Service

    runtime = open_runtime(args)
    if not runtime.project.crawls:
        raise ConfigRejected(f"the project in {runtime.project_dir} declares no crawls: add some, or leave this stage.")
    stop = stop_event()
    metrics = runtime.metrics("crawl")
    runtime.admin().ensure_topics(runtime.topics.specs(runtime.config.log.partitions))
    frontier = Frontier(
        runtime.home / "crawl" / f"g{runtime.config.log.generation}.sqlite",
        bodies_per_page=runtime.config.crawl.bodies_per_page,
    )
    producer = runtime.producer(linger_ms=5.0)
    try:
        service = Service(
            runtime.project.crawls,
            runtime.config.crawl,
            runtime.topics,
            runtime.config.log.partitions,
            frontier,
            runtime.blobs(),
            producer,
            metrics,
            runtime.clock,
        )
        if args.extract_again:
            print(f"{service.extract_again()} versions changed")
            return 0
        _quieten()
        service.run(stop, metrics.ready, once=args.once)
    finally:
        metrics.ready(False, "stopping")
        producer.close()
        frontier.close()
        metrics.close()
    return 0


def _quieten() -> None:
    """Leave to Scrapy's log what is new to an operator: each address's fate is ours to tell."""
    for name in ("scrapy", "twisted", "protego", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "scrapy" else logging.WARNING)
