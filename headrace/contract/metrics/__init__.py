"""The metrics of all stages. One that is not listed here cannot be counted, and `METRICS` says what each means.

`names` lists them, and a table a stage says what they are: an entry in both makes a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, get_args

from headrace.contract.interfaces.metric_doc import Kind as Kind
from headrace.contract.interfaces.metric_doc import MetricDoc as MetricDoc
from headrace.contract.interfaces.metric_doc import Stage as Stage
from headrace.contract.metrics.crawl import CRAWL
from headrace.contract.metrics.ingest import INGEST
from headrace.contract.metrics.names import Name as Name
from headrace.contract.metrics.serve import SERVE
from headrace.contract.metrics.shared import SHARED
from headrace.contract.metrics.sink import SINK
from headrace.contract.metrics.stream import STREAM
from headrace.contract.metrics.train import TRAIN
from headrace.contract.metrics.watch import WATCH

TABLES = (INGEST, STREAM, SINK, CRAWL, TRAIN, SERVE, WATCH, SHARED)
"""What is said of the metrics, by stage. A name stands in one of them."""

METRICS: Mapping[Name, MetricDoc] = {
    name: doc for name in get_args(Name) for table in TABLES if (doc := table.get(name))
}
"""What is said of all of them, in the order of their names."""


class Metrics(Protocol):
    """Counters, gauges and histograms of one stage. Names in Prometheus get the prefix `headrace_<stage>_`.

    Labels are given by the names that `METRICS` declares. Their values come from bounded sets.
    """

    def add(self, name: Name, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""

    def set(self, name: Name, value: float, **labels: str) -> None:
        """Set a gauge."""

    def observe(self, name: Name, value: float) -> None:
        """Add to a histogram."""
