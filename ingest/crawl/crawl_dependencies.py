"""What the parts of one crawler share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.frontier import Frontier
from headrace.contract.interfaces.log import Producer, Reader
from headrace.contract.metrics import Metrics
from headrace.ingest.crawl.extract import Document, Extracted


class Extraction(Protocol):
    """What reads documents: `extraction_pool`, or in a test this process itself."""

    async def extract(self, document: Document, crawl: Crawl) -> Extracted:
        """Return what a document holds; where it came to no end, `left_out` has the reason."""

    def bounds(self) -> tuple[int, int]:
        """Return CPU time in ms and memory in bytes that one document may take."""


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
    extraction: Extraction
    """Reads documents, within bounds."""
    open_reader: Callable[[], Reader]
    """Makes the reader that tells a new memory from one that was lost."""
    begin_afresh: bool = False
    """Somebody has decided to begin without the memory that was lost."""
