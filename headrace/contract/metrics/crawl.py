"""The metrics of the crawler."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

CRAWL: Mapping[Name, MetricDoc] = {
    "pages_total": MetricDoc(
        "counter",
        "answers",
        ("crawl",),
        "Addresses that were asked for, by what came of it: taken, not_modified, gone, robots, status_5xx and so on.",
        labels=("outcome",),
    ),
    "page_seconds": MetricDoc("histogram", "seconds", ("crawl",), "Time from a crawler's request to the answer."),
    "body_bytes_total": MetricDoc(
        "counter", "bytes", ("crawl",), "Bytes of the bodies that the crawler read, decompressed."
    ),
    "versions_total": MetricDoc(
        "counter", "versions", ("crawl",), "Changed versions of crawled entities that were sent.", labels=("source",)
    ),
    "left_out_total": MetricDoc(
        "counter", "rows", ("crawl",), "What extraction left out of documents.", labels=("reason",)
    ),
    "beyond_bound_total": MetricDoc(
        "counter",
        "entities or links",
        ("crawl",),
        "Entities beyond `keys_max` and links beyond `pages_max` that were left out, each time they were read; must "
        "stay 0.",
        labels=("source", "bound"),
    ),
    "pages_known": MetricDoc("gauge", "addresses", ("crawl",), "Addresses that the crawler knows.", labels=("source",)),
    "outbox_rows": MetricDoc("gauge", "versions", ("crawl",), "Versions that wait in the outbox for Kafka."),
}
