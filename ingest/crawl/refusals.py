"""Documents are extracted, and one whose extraction came to no end is not extracted again: not before its body changes,
what is extracted from it, or the bounds. The frontier remembers it, across restarts."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter

import msgspec

from headrace.contract.crawl import Crawl
from headrace.ingest.crawl.crawl_dependencies import CrawlDependencies
from headrace.ingest.crawl.extract import Document, Extracted

log = logging.getLogger("headrace.crawl")

KILLED, STALLED = "extraction_killed", "extraction_stalled"
OF_THE_PAGE = ("extraction_cpu", "extraction_memory", "extraction_crashed")
UNREAD = ("broken", "too_large", "too_deep", *OF_THE_PAGE, KILLED, STALLED)
"""Reasons for which a document gave nothing."""
KILLED_MAX = 3
"""Failures in a row from which on a page over which the process was killed is to blame, not the machine."""


class Refusals:
    """Extracts documents, unless they are known to have no end."""

    def __init__(self, deps: CrawlDependencies) -> None:
        self._extraction = deps.extraction

    async def extract(self, document: Document, crawl: Crawl, refused: str, failures: int = 0) -> tuple[Extracted, str]:
        """Return what a document holds, and what the frontier is to remember of it as `Page.refused`.

        Args:
            refused: what the frontier remembers of the last one of this address.
            failures: how often in a row the address has failed.
        """
        said = self._fingerprint(document, crawl)
        reason, _, before = refused.partition(" ")
        if before == said:
            return Extracted(left_out=Counter({reason: 1})), refused
        found = await self._extraction.extract(document, crawl)
        reason = unread(found)
        if reason in (KILLED, STALLED) or reason in OF_THE_PAGE:
            log.warning(
                "%s: %s: the extraction of its %d bytes came to no end. docs/crawl.md says what the reason means; the "
                "page keeps the values that it had",
                document.url, reason, len(document.body),
            )  # fmt: skip
        is_to_blame = reason in OF_THE_PAGE or (reason == KILLED and failures + 1 >= KILLED_MAX)
        return found, f"{reason} {said}" if is_to_blame else ""

    def _fingerprint(self, document: Document, crawl: Crawl) -> str:
        """Return 32 hex digits of SHA-256 over the body, what is extracted from it, and the bounds."""
        asked = crawl.kind, crawl.key, crawl.fields, crawl.rows, crawl.follow, document.sitemap
        told = msgspec.json.encode((hashlib.sha256(document.body).hexdigest(), asked, self._extraction.bounds()))
        return hashlib.sha256(told).hexdigest()[:32]


def unread(found: Extracted) -> str:
    """Return why a document gave nothing; empty where it was read."""
    return next((reason for reason in UNREAD if found.left_out[reason]), "")
