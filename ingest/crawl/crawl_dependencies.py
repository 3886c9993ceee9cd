"""What the parts of one crawler share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.frontier import Frontier
from headrace.contract.interfaces.log import Producer, Reader
from headrace.contract.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class CrawlDependencies:
    """Sources, settings and backends of one crawler; the cli chooses the backends."""

    crawls: Sequence[Crawl]
    config: CrawlConfig
    topics: Topics
    partitions: int
    frontier: Frontier
    bodies: Blobs
    producer: Producer
    metrics: Metrics
    clock: Clock
    open_reader: Callable[[], Reader]
    """Makes the reader that tells a new memory from one that was lost."""
    begin_afresh: bool = False
    """Somebody has decided to begin without the memory that was lost."""
