"""The metrics of all stages. One that is not listed here cannot be counted, and `METRICS` says what each means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

from headrace.contract.interfaces.metric_doc import Kind as Kind
from headrace.contract.interfaces.metric_doc import MetricDoc as MetricDoc
from headrace.contract.interfaces.metric_doc import Stage as Stage

Name = Literal[
    "events_read_total",
    "events_appended_total",
    "events_dead_lettered_total",
    "events_repeated_total",
    "chunks_acked_total",
    "connections_open",
    "connections_refused_total",
    "buffer_bytes",
    "clock_apart_ms",
    "feedback_delay_seconds",
    "records_read_total",
    "samples_emitted_total",
    "positives_total",
    "negatives_total",
    "feedback_duplicate_total",
    "feedback_late_total",
    "feedback_orphan_total",
    "events_too_late_total",
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
    "upload_age_seconds",
    "requests_total",
    "requests_open",
    "request_seconds",
    "swaps_total",
    "swap_seconds",
    "versions_refused_total",
    "model_step",
    "model_age_seconds",
    "features_offset",
    "counters_behind_seconds",
    "freshness_seconds",
    "call_age_seconds",
    "errors_total",
    "source_settled_total",
    "lines_skipped_total",
    "events_refused_total",
    "dead_letter_ceiling_shut",
    "dead_letter_origins_shut",
    "late_waiting",
    "late_oldest_seconds",
    "late_unknown",
    "late_settled_total",
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
    "window_mae",
    "window_rmse",
    "window_concordance",
    "slice_mae",
    "slice_rmse",
    "slice_concordance",
    "figures_provisional",
    "next_figure_seconds",
    "main_next_figure_seconds",
    "recent_calibration",
    "recent_samples",
    "label_rate",
    "label_rate_usual",
    "label_rate_score",
    "label_rate_jumps_total",
    "samples_left_out_total",
    "records_unreadable_total",
    "samples_per_second",
    "lag_samples",
    "lag_seconds",
    "receipts_refused_total",
    "ready",
    "no_sign_seconds",
    "process_up",
    "process_crashes_total",
    "process_crashes_in_row",
    "next_start_seconds",
    "unhealthy_restarts_total",
    "disk_free_ratio",
]


METRICS: Mapping[Name, MetricDoc] = {
    "events_read_total": MetricDoc(
        "counter", "events", ("ingest",), "Declared events whose fate is settled: appended, dead-lettered or repeated."
    ),
    "events_appended_total": MetricDoc(
        "counter",
        "events",
        ("ingest", "shop"),
        "Declared events that Kafka confirmed; the shop: events that it logged.",
        labels=("kind",),
    ),
    "events_dead_lettered_total": MetricDoc(
        "counter",
        "events",
        ("ingest",),
        "Events that were refused and written to the dead letters.",
        labels=("reason",),
    ),
    "events_repeated_total": MetricDoc(
        "counter", "events", ("ingest",), "Declared events that were taken before, known by chunk or by id."
    ),
    "chunks_acked_total": MetricDoc("counter", "chunks", ("ingest",), "Chunks whose shippers got an ack."),
    "connections_open": MetricDoc("gauge", "connections", ("ingest",), "Connections of shippers that are open now."),
    "connections_refused_total": MetricDoc(
        "counter", "connections", ("ingest",), "Connections and requests that were refused.", labels=("reason",)
    ),
    "buffer_bytes": MetricDoc(
        "gauge", "bytes", ("ingest",), "Bytes that were read and that Kafka has not confirmed yet."
    ),
    "clock_apart_ms": MetricDoc(
        "gauge",
        "milliseconds",
        ("ingest",),
        "How far the gateway's clock is ahead of the broker's. Beyond 30,000 either way one of them is wrong.",
    ),
    "feedback_delay_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("ingest",),
        "Median time from the moment of a feedback to its arrival at the gateway, of the newest 1,024. A shipper that "
        "holds it back beyond the window makes negatives.",
        labels=("type",),
    ),
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
    "lag_records": MetricDoc(
        "gauge",
        "records",
        ("ingest", "stream", "sink", "aggregate", "train"),
        "Records of its topic that the stage has not read yet (train: not learnt); ingest: of each source's topic.",
        labels=("topic",),
    ),
    "gap_total": MetricDoc(
        "counter",
        "gaps",
        ("ingest", "sink", "train", "serve"),
        "Gaps in what was read; must stay 0. Ingest: records of a source's topic that retention deleted unread.",
        labels=("topic",),
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
    "rows_stored_total": MetricDoc("counter", "rows", ("sink",), "Rows that were committed to the lake."),
    "lake_version": MetricDoc("gauge", "version", ("sink",), "The lake's version after the newest commit."),
    "commit_seconds": MetricDoc("histogram", "seconds", ("sink",), "Time that a commit to the lake took."),
    "behind_ms": MetricDoc("gauge", "milliseconds", ("sink",), "Age of the oldest sample that is not in the lake."),
    "lake_files": MetricDoc("gauge", "files", ("sink",), "Files of the lake's newest version, as of the last upkeep."),
    "lake_bytes": MetricDoc("gauge", "bytes", ("sink",), "Bytes of the lake's newest version, as of the last upkeep."),
    "lake_files_compacted_total": MetricDoc(
        "counter", "files", ("sink",), "Files that compaction replaced by larger ones."
    ),
    "lake_files_vacuumed_total": MetricDoc("counter", "files", ("sink",), "Files that vacuum deleted."),
    "lake_upkeep_failed_total": MetricDoc(
        "counter", "upkeeps", ("sink",), "Upkeeps of the lake that failed and are tried again."
    ),
    "aggregates_written_total": MetricDoc(
        "counter", "values", ("aggregate",), "Values of aggregates that were written to every partition."
    ),
    "steps_total": MetricDoc("counter", "steps", ("train",), "Training steps that were committed and learnt."),
    "samples_learnt_total": MetricDoc("counter", "samples", ("train",), "Samples that were learnt."),
    "samples_refused_total": MetricDoc(
        "counter",
        "samples",
        ("train",),
        "Samples that were refused: a number, label or weight is not finite or out of range.",
    ),
    "auc": MetricDoc(
        "gauge", "ratio", ("train",), "Area under the ROC curve of the main task, over all closed windows."
    ),
    "auc_constant": MetricDoc(
        "gauge", "ratio", ("train",), "AUC of a model that gives every sample the same score: 0.5."
    ),
    "auc_item_rate": MetricDoc(
        "gauge", "ratio", ("train",), "AUC of a model that scores every item by its own label rate so far."
    ),
    "log_loss": MetricDoc("gauge", "nats", ("train",), "Log loss of the main task, over all closed windows."),
    "table_rows": MetricDoc(
        "gauge",
        "rows",
        ("train", "serve"),
        "Rows of the model's table; serving: of one copy, `serve.rows_max` at most.",
    ),
    "deltas_published_total": MetricDoc("counter", "deltas", ("train",), "Deltas that were published."),
    "snapshots_published_total": MetricDoc("counter", "snapshots", ("train",), "Snapshots that were published."),
    "upload_age_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("train",),
        "How long the upload of a snapshot and a checkpoint that is under way has taken; 0 while none is.",
    ),
    "requests_total": MetricDoc(
        "counter",
        "requests",
        ("ingest", "serve", "shop"),
        "Requests that were answered, by HTTP status; the shop: its own requests that got a ranking.",
        labels=("status",),
    ),
    "requests_open": MetricDoc(
        "gauge", "requests", ("ingest",), "Requests to the collector that wait for their answer now."
    ),
    "request_seconds": MetricDoc(
        "histogram", "seconds", ("ingest", "serve", "shop"), "Time from a request to its answer."
    ),
    "swaps_total": MetricDoc(
        "counter", "swaps", ("serve",), "Versions that serving took: snapshots loaded and deltas applied."
    ),
    "swap_seconds": MetricDoc(
        "histogram", "seconds", ("serve",), "Time that it took to write a version into both copies of the shared model."
    ),
    "versions_refused_total": MetricDoc(
        "counter",
        "versions",
        ("serve",),
        "Snapshots and deltas that the gate refused; must stay 0. The version that is served stays.",
        labels=("reason",),
    ),
    "model_step": MetricDoc(
        "gauge", "step", ("train", "serve"), "Step of the model: learnt last by the trainer, served by serving."
    ),
    "model_age_seconds": MetricDoc("gauge", "seconds", ("serve",), "Age of the version that is served."),
    "features_offset": MetricDoc(
        "gauge",
        "offset",
        ("serve",),
        "The next record of `features` that a process of serving reads.",
        labels=("worker",),
    ),
    "counters_behind_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("serve",),
        "Time since a process was known to have read all of `features`; about 1 while it follows.",
        labels=("worker",),
    ),
    "freshness_seconds": MetricDoc(
        "histogram",
        "seconds",
        ("shop",),
        "Time from a click that was logged to the first answer whose version contains it.",
    ),
    "call_age_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("ingest", "stream", "sink", "aggregate", "crawl", "train", "serve", "shop"),
        "How long the call of a log, a store or a lake that has stood still longest has done so; 0 while none is made.",
    ),
    "errors_total": MetricDoc(
        "counter",
        "errors",
        ("ingest", "train", "serve", "shop"),
        "Errors that the stage survived: what failed, or why serving refused a version.",
        labels=("kind",),
    ),
    "source_settled_total": MetricDoc(
        "counter", "records", ("ingest",), "Records of a Kafka source whose events are settled.", labels=("topic",)
    ),
    "lines_skipped_total": MetricDoc(
        "counter", "lines", ("ingest",), "Lines of access logs that are no events.", labels=("tag",)
    ),
    "events_refused_total": MetricDoc(
        "counter",
        "events",
        ("ingest",),
        "Events of chunks that stay with their shippers while their tag is above the ceiling of dead letters, "
        "or that are late while no more late ones may wait.",
        labels=("tag",),
    ),
    "dead_letter_ceiling_shut": MetricDoc(
        "gauge",
        "0 or 1",
        ("ingest",),
        "1 while the ceiling of dead letters holds chunks of a tag back.",
        labels=("tag",),
    ),
    "dead_letter_origins_shut": MetricDoc(
        "gauge",
        "origins",
        ("ingest",),
        "Origins whose chunks of a tag the ceiling of dead letters holds back; the unknown ones of a network are one.",
        labels=("tag",),
    ),
    "late_waiting": MetricDoc(
        "gauge",
        "events",
        ("ingest",),
        "Events that are older than the stream's memory of repeats and wait to be looked up, of all gateways.",
    ),
    "late_oldest_seconds": MetricDoc("gauge", "seconds", ("ingest",), "How long the oldest of them has waited."),
    "late_unknown": MetricDoc(
        "gauge",
        "events",
        ("ingest",),
        "Late events of which log and lake cannot tell whether they were taken: they wait for a decision.",
    ),
    "late_settled_total": MetricDoc(
        "counter", "events", ("ingest",), "Late events that this gateway's settler has settled.", labels=("fate",)
    ),
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
    "pages_known": MetricDoc("gauge", "addresses", ("crawl",), "Addresses that the crawler knows.", labels=("source",)),
    "outbox_rows": MetricDoc("gauge", "versions", ("crawl",), "Versions that wait in the outbox for Kafka."),
    "normalized_entropy": MetricDoc(
        "gauge",
        "ratio",
        ("train",),
        "Log loss of the main task over all closed windows, divided by the entropy of its label rate.",
    ),
    "calibration": MetricDoc(
        "gauge",
        "ratio",
        ("train",),
        "Predicted positives of the main task divided by observed ones, over all closed windows; 1 is right.",
    ),
    "window_auc": MetricDoc("gauge", "ratio", ("train",), "AUC of the newest closed window.", labels=("task", "slice")),
    "window_log_loss": MetricDoc(
        "gauge", "nats", ("train",), "Log loss of the newest closed window.", labels=("task", "slice")
    ),
    "window_normalized_entropy": MetricDoc(
        "gauge", "ratio", ("train",), "Normalized entropy of the newest closed window.", labels=("task", "slice")
    ),
    "window_calibration": MetricDoc(
        "gauge", "ratio", ("train",), "Calibration of the newest closed window.", labels=("task", "slice")
    ),
    "window_samples": MetricDoc(
        "gauge", "samples", ("train",), "Samples of the newest closed window.", labels=("task", "slice")
    ),
    "slice_auc": MetricDoc("gauge", "ratio", ("train",), "AUC over all closed windows.", labels=("task", "slice")),
    "slice_log_loss": MetricDoc(
        "gauge", "nats", ("train",), "Log loss over all closed windows.", labels=("task", "slice")
    ),
    "slice_normalized_entropy": MetricDoc(
        "gauge", "ratio", ("train",), "Normalized entropy over all closed windows.", labels=("task", "slice")
    ),
    "slice_calibration": MetricDoc(
        "gauge", "ratio", ("train",), "Calibration over all closed windows.", labels=("task", "slice")
    ),
    "window_mae": MetricDoc(
        "gauge", "value", ("train",), "Mean absolute error of the newest closed window.", labels=("task", "slice")
    ),
    "window_rmse": MetricDoc(
        "gauge", "value", ("train",), "Root mean square error of the newest closed window.", labels=("task", "slice")
    ),
    "window_concordance": MetricDoc(
        "gauge",
        "ratio",
        ("train",),
        "Share of pairs of different values that are scored in order, of the newest closed window.",
        labels=("task", "slice"),
    ),
    "slice_mae": MetricDoc(
        "gauge", "value", ("train",), "Mean absolute error over all closed windows.", labels=("task", "slice")
    ),
    "slice_rmse": MetricDoc(
        "gauge", "value", ("train",), "Root mean square error over all closed windows.", labels=("task", "slice")
    ),
    "slice_concordance": MetricDoc(
        "gauge", "ratio", ("train",), "Concordance over all closed windows.", labels=("task", "slice")
    ),
    "figures_provisional": MetricDoc(
        "gauge",
        "bool",
        ("train",),
        "1 until a task's first window is closed: figures over closed windows are of what is resolved so far.",
        labels=("task",),
    ),
    "next_figure_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("train",),
        "Event time to a task's first provisional figure, then to its first closed window; then 0.",
        labels=("task",),
    ),
    "main_next_figure_seconds": MetricDoc(
        "gauge", "seconds", ("train",), "next_figure_seconds of the main task: above 0 its figures are provisional."
    ),
    "recent_calibration": MetricDoc(
        "gauge",
        "ratio",
        ("train",),
        "Calibration of the newest impressions whose windows have passed, before late feedback.",
        labels=("task",),
    ),
    "recent_samples": MetricDoc(
        "gauge", "samples", ("train",), "Samples that recent_calibration is of.", labels=("task",)
    ),
    "label_rate": MetricDoc(
        "gauge", "ratio", ("train",), "Share of positives among the newest samples.", labels=("task",)
    ),
    "label_rate_usual": MetricDoc(
        "gauge", "ratio", ("train",), "The usual label rate, with which the newest is compared.", labels=("task",)
    ),
    "label_rate_score": MetricDoc(
        "gauge",
        "standard deviations",
        ("train",),
        "How far the newest label rate is from the usual one.",
        labels=("task",),
    ),
    "label_rate_jumps_total": MetricDoc(
        "counter", "jumps", ("train",), "Sudden changes of the label rate.", labels=("task",)
    ),
    "samples_left_out_total": MetricDoc(
        "counter", "samples", ("train",), "Negatives that the recipe's `negative_share` left out."
    ),
    "records_unreadable_total": MetricDoc(
        "counter",
        "records",
        ("ingest", "stream", "aggregate", "sink", "train", "serve", "shop"),
        "Records of a topic that are not ours (`kind` foreign) or can't be read (damaged), skipped; must stay 0.",
        labels=("topic", "kind"),
    ),
    "samples_per_second": MetricDoc("gauge", "samples/s", ("train",), "Samples learnt a second, over the last second."),
    "lag_samples": MetricDoc("gauge", "samples", ("train",), "Samples that were read and wait to be learnt."),
    "lag_seconds": MetricDoc(
        "gauge", "seconds", ("train",), "Now minus the event time of the newest impression that was learnt."
    ),
    "receipts_refused_total": MetricDoc(
        "counter",
        "records",
        ("ingest", "stream", "aggregate", "crawl", "train"),
        "Records that Kafka refused, or did not confirm in 5 minutes; must stay 0. The log has partition and error.",
        labels=("topic",),
    ),
    "ready": MetricDoc("gauge", "0 or 1", get_args(Stage), "1 while /readyz is green, at the moment of the scrape."),
    "no_sign_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("ingest", "stream", "sink", "aggregate", "crawl", "train", "serve"),
        "Time since the last sign that the loop turns, Kafka or the store answers, receipts come, the gateway reads.",
        labels=("sign",),
    ),
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
