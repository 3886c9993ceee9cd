"""The metrics of the trainer."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

TRAIN: Mapping[Name, MetricDoc] = {
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
    "steps_archived_total": MetricDoc(
        "counter", "records", ("train",), "Records of topic `steps` that were moved to the store."
    ),
    "deltas_published_total": MetricDoc("counter", "deltas", ("train",), "Deltas that were published."),
    "snapshots_published_total": MetricDoc("counter", "snapshots", ("train",), "Snapshots that were published."),
    "published_bytes_total": MetricDoc(
        "counter",
        "bytes",
        ("train",),
        "Bytes of the snapshots and deltas that were published.",
        labels=("kind",),
    ),
    "upload_age_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("train",),
        "How long the upload that is under way has taken, of a snapshot or a checkpoint; 0 while none is.",
        labels=("what",),
    ),
    "checkpoints_written_total": MetricDoc("counter", "checkpoints", ("train",), "Checkpoints that were stored."),
    "checkpoint_bytes_total": MetricDoc(
        "counter", "bytes", ("train",), "What was stored for checkpoints; what they share with earlier ones is not."
    ),
    "checkpoint_stall_seconds": MetricDoc(
        "gauge", "seconds", ("train",), "How long training stood still for the newest checkpoint."
    ),
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
    "samples_held": MetricDoc(
        "gauge",
        "samples",
        ("train",),
        "Positives of tasks with a long window that wait for the negatives of their time; 65,536 at most.",
    ),
    "samples_per_second": MetricDoc("gauge", "samples/s", ("train",), "Samples learnt a second, over the last second."),
    "lag_samples": MetricDoc(
        "gauge",
        "samples",
        ("train",),
        "Samples that wait to be learnt: of the lake all that is left, of the topic what was read.",
    ),
    "lag_seconds": MetricDoc(
        "gauge", "seconds", ("train",), "Now minus the event time of the newest impression that was learnt."
    ),
}
