"""The metrics of the local stack's watch."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

WATCH: Mapping[Name, MetricDoc] = {
    "process_up": MetricDoc(
        "gauge", "0 or 1", ("watch",), "1 while a process of the local stack runs.", labels=("process",)
    ),
    "process_crashes_total": MetricDoc(
        "counter",
        "crashes",
        ("watch",),
        "Ends of a process that nobody asked for; the supervisor starts it again.",
        labels=("process",),
    ),
    "process_crashes_in_row": MetricDoc(
        "gauge", "crashes", ("watch",), "Crashes since the process last ran for 5 minutes.", labels=("process",)
    ),
    "next_start_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("watch",),
        "How long a process that crashed still waits for its next start; 0 while it waits for none.",
        labels=("process",),
    ),
    "unhealthy_restarts_total": MetricDoc(
        "counter",
        "restarts",
        ("watch",),
        "Stages that ran and did not work, and were killed to be started again.",
        labels=("process",),
    ),
    "disk_free_ratio": MetricDoc(
        "gauge", "share of 1", ("watch",), "Free share of the disk that holds the local state, HEADRACE_HOME."
    ),
}
