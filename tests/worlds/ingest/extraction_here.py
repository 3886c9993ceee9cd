"""Extraction in the test's own process, for tests of what is around it."""

from __future__ import annotations

from headrace.contract.crawl import Crawl
from headrace.ingest.crawl.extract import Document, Extracted, extract


class ExtractionHere:
    """Extracts at once, without bounds."""

    async def extract(self, document: Document, crawl: Crawl) -> Extracted:
        return extract(document, crawl)

    def bounds(self) -> tuple[int, int]:
        return 0, 0
