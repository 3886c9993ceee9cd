"""The metrics of the join and of the aggregator."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

STREAM: Mapping[Name, MetricDoc] = {
    "records_read_total": MetricDoc(
        "counter", "records", ("stream", "sink", "aggregate"), "Kafka records that were read."
    ),
    "samples_emitted_total": MetricDoc("counter", "samples", ("stream",), "Samples that the join emitted."),
    "positives_total": MetricDoc(
        "counter", "samples", ("stream",), "Positive samples that the join emitted.", labels=("task",)
    ),
    "negatives_total": MetricDoc(
        "counter", "samples", ("stream",), "Negative samples that the join emitted.", labels=("task",)
    ),
    "feedback_duplicate_total": MetricDoc(
        "counter", "events", ("stream",), "Feedback whose impression had been answered already.", labels=("task",)
    ),
    "feedback_late_total": MetricDoc(
        "counter", "events", ("stream",), "Feedback that came after its impression's window.", labels=("task",)
    ),
    "feedback_orphan_total": MetricDoc(
        "counter", "events", ("stream",), "Feedback whose impression never came.", labels=("task",)
    ),
    "events_too_late_total": MetricDoc(
        "counter",
        "events",
        ("stream",),
        "Events that the join dropped, because they are older than its memory of repeats and nobody looked them up.",
    ),
    "pending_impressions": MetricDoc(
        "gauge", "events", ("stream",), "Impressions that wait for feedback or for the end of their window."
    ),
    "pending_feedback": MetricDoc("gauge", "events", ("stream",), "Feedback that waits for its impression."),
    "watermark_ms": MetricDoc(
        "gauge",
        "milliseconds since the epoch",
        ("stream", "aggregate"),
        "The lowest watermark of the partitions that this worker has.",
    ),
    "state_snapshots_total": MetricDoc(
        "counter", "snapshots", ("stream", "aggregate"), "Snapshots of the stage's state that were stored."
    ),
    "rules_number": MetricDoc(
        "gauge", "number", ("stream",), "The lowest change of rules that is in force in a partition of this worker."
    ),
    "rules_differ": MetricDoc(
        "gauge",
        "0 or 1",
        ("stream",),
        "1 while the project that this worker was started with differs from the rules in force.",
    ),
    "aggregates_written_total": MetricDoc(
        "counter", "values", ("aggregate",), "Values of aggregates that were written to every partition."
    ),
}
