"""Bring what the logs don't have: crawl the sources that the project declares, politely, and write each changed
version to `events` with the time at which it was fetched.

Addresses, validators and what Kafka lacks are kept in HEADRACE_HOME/crawl; bodies lie in the store, below crawl/bodies.
One process is enough; a second one on the same folder is refused. How a source is declared: docs/crawl.md.

  headrace crawl                    until SIGTERM; metrics on 9105
  headrace crawl --once             what is due now, then end (for cron)
  headrace crawl --extract-again    after a change of fields or selectors: from the stored bodies, without a request
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import msgspec

from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.contract.config import PORTS
from headrace.contract.crawl import Crawl, external_columns, located
from headrace.contract.errors import ConfigRejected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)
    parser.add_argument(
        "--sources",
        metavar="FILE",
        type=Path,
        help="JSON list of sources in place of the project's, of the same names and fields: a site for tests, "
        "with a --home of its own",
    )
    parser.add_argument("--once", action="store_true", help="fetch what is due, send it, end")
    parser.add_argument(
        "--begin-afresh",
        action="store_true",
        help="where the crawler's memory below HEADRACE_HOME is gone or damaged: fetch everything again without it; "
        "one that can be read is gone on from all the same",
    )
    parser.add_argument(
        "--extract-again",
        action="store_true",
        help="fetch nothing: extract the stored bodies again, as the project declares now, send what changes, end",
    )


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM."""
    from headrace.backends.frontier_sqlite import SqliteFrontier
    from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
    from headrace.ingest.crawl.crawl_stage import CrawlStage
    from headrace.ingest.crawl.extraction_pool import ExtractionPool

    runtime = open_runtime(args)
    crawls = sources(runtime, args.sources)
    stop = stop_event()
    metrics = runtime.metrics("crawl")
    runtime.open_topics()
    frontier = SqliteFrontier(
        runtime.home / "crawl" / f"g{runtime.config.log.generation}.sqlite",
        bodies_per_page=runtime.config.crawl.bodies_per_page,
        begin_afresh=args.begin_afresh,
    )
    producer = runtime.producer(metrics, linger_ms=5.0)
    pool = ExtractionPool(runtime.config.crawl)
    try:
        stage = CrawlStage(
            CrawlDependencies(
                crawls=crawls,
                config=runtime.config.crawl,
                topics=runtime.topics,
                partitions=runtime.config.log.partitions,
                frontier=frontier,
                bodies=runtime.blobs(),
                producer=producer,
                metrics=metrics,
                clock=runtime.clock,
                extraction=pool,
                open_reader=runtime.reader,
                begin_afresh=args.begin_afresh,
            )
        )
        if args.extract_again:
            print(f"{stage.extract_again()} versions changed")
            return 0
        _quiet_scrapy()
        stop.attach(metrics.health)
        with runtime.reachable(metrics.health):
            stage.run(stop, metrics.ready, once=args.once)
    finally:
        metrics.ready(False, "stopping")
        pool.close()
        producer.close()
        frontier.close()
        metrics.close()
    return 0


def sources(runtime: Runtime, file: Path | None) -> list[Crawl]:
    """Return what to crawl, addresses filled in: the project's sources, or those of a file that bring the same columns.

    Raises `ConfigRejected` where there are none, or the file's differ in names, joined fields or columns.
    """
    declared = runtime.project.crawls
    if not declared:
        raise ConfigRejected(f"the project in {runtime.project_dir} declares no crawls: add some, or leave this stage.")
    chosen = declared
    if file is not None:
        try:
            chosen = msgspec.json.decode(file.read_bytes(), type=tuple[Crawl, ...])
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigRejected(f"--sources {file}: {error}; a JSON list of sources is wanted.") from error
        told, wanted = ({(c.name, c.joins) for c in crawls} for crawls in (chosen, declared))
        if told != wanted or external_columns(chosen) != external_columns(declared):
            raise ConfigRejected(
                f"--sources {file} brings {sorted(external_columns(chosen))}; the project's sources bring "
                f"{sorted(external_columns(declared))}, joined on {sorted(joins for _, joins in wanted)}: bring these."
            )
    ports = {f"PORT_{name.upper()}": str(runtime.port(name)) for name in PORTS}
    return [located(crawl, {**ports, **os.environ}) for crawl in chosen]


def _quiet_scrapy() -> None:
    """Keep what an operator knows already out of Scrapy's log: the stage counts what becomes of each address."""
    for name in ("scrapy", "twisted", "protego", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "scrapy" else logging.WARNING)
