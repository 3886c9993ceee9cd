"""Counts and names the records of `events` that a stage of the stream skipped, so that none is skipped in silence."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from headrace.contract.formats.events import KINDS
from headrace.contract.interfaces.log import Record
from headrace.contract.metrics import Metrics

log = logging.getLogger("headrace.events")


def tell_unreadable(records: Sequence[Record], damaged: int, metrics: Metrics) -> None:
    """Tell which of these records of one partition are not ours, and that `damaged` of them could not be read.

    They have changed nothing, and change nothing whenever the log is read. A record without a value is a tombstone,
    which no producer of ours writes.
    """
    foreign = [r.offset for r in records if r.value is None or r.headers.get("kind", "") not in KINDS]
    for kind, count in (("foreign", len(foreign)), ("damaged", damaged)):
        if count:
            metrics.add("records_unreadable_total", count, topic="events", kind=kind)
            first, last = (foreign[0], foreign[-1]) if kind == "foreign" else (records[0].offset, records[-1].offset)
            log.error(
                "%s/%d offsets %d to %d: %d of the records are %s and skipped. Find out who writes into the topic "
                "besides `ingest`, `aggregate`, `crawl` and `headrace spec`.",
                *(records[0].topic, records[0].partition, first, last, count, kind),
            )
