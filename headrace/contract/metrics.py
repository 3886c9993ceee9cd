"""Metric names as a type: a metric that is not listed here cannot be counted, and README lists what is."""

from __future__ import annotations

from typing import Literal, Protocol

Stage = Literal["ingest", "stream", "sink", "aggregate", "crawl", "train", "serve", "shop"]

Name = Literal[
    "events_read_total",
    "events_appended_total",
    "events_dead_lettered_total",
    "events_repeated_total",
    "chunks_acked_total",
    "connections_open",
    "connections_refused_total",
    "buffer_bytes",
    "records_read_total",
    "samples_emitted_total",
    "positives_total",
    "negatives_total",
    "feedback_duplicate_total",
    "feedback_late_total",
    "feedback_orphan_total",
    "pending_impressions",
    "pending_feedback",
    "watermark_ms",
    "lag_records",
    "gap_total",
    "state_snapshots_total",
    "rules_number",
    "rules_differ",
    "rows_stored_total",
    "lake_version",
    "commit_seconds",
    "behind_ms",
    "lake_files",
    "lake_bytes",
    "lake_files_compacted_total",
    "lake_files_vacuumed_total",
    "lake_upkeep_failed_total",
    "aggregates_written_total",
    "steps_total",
    "samples_learnt_total",
    "samples_refused_total",
    "auc",
    "auc_constant",
    "auc_item_rate",
    "log_loss",
    "table_rows",
    "deltas_published_total",
    "snapshots_published_total",
    "requests_total",
    "requests_open",
    "request_seconds",
    "swaps_total",
    "swap_seconds",
    "model_step",
    "model_age_seconds",
    "freshness_seconds",
    "errors_total",
    "source_settled_total",
    "lines_skipped_total",
    "events_refused_total",
    "dead_letter_ceiling_shut",
    "pages_total",
    "page_seconds",
    "body_bytes_total",
    "versions_total",
    "left_out_total",
    "pages_known",
    "outbox_rows",
    "normalized_entropy",
    "calibration",
    "window_auc",
    "window_log_loss",
    "window_normalized_entropy",
    "window_calibration",
    "window_samples",
    "slice_auc",
    "slice_log_loss",
    "slice_normalized_entropy",
    "slice_calibration",
    "label_rate",
    "label_rate_usual",
    "label_rate_score",
    "label_rate_jumps_total",
    "samples_left_out_total",
    "samples_per_second",
    "lag_samples",
    "lag_seconds",
]


class Metrics(Protocol):
    """Counters, gauges and histograms of one stage. Names in Prometheus get the prefix `headrace_<stage>_`."""

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Raise a counter; `reason` is its one label, from a bounded set."""

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Set a gauge."""

    def observe(self, name: Name, value: float) -> None:
        """Add to a histogram (names ending in `_seconds`)."""
