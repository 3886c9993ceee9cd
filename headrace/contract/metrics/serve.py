"""The metrics of serving and of the demo shop."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

SERVE: Mapping[Name, MetricDoc] = {
    "table_rows": MetricDoc(
        "gauge",
        "rows",
        ("train", "serve"),
        "Rows of the model's table; serving: of one copy.",
    ),
    "requests_refused_total": MetricDoc(
        "counter",
        "requests",
        ("serve",),
        "Requests that got no scores: `queue_full` the wait was beyond `serve.queue_ms`, `too_late` their time was "
        "over, `unavailable` no model or counters, `bad_field` and `bad_request`, `too_large`, `too_slow`, "
        "`content_type`, `unknown_path`, `unknown_model`, `wrong_method`.",
        labels=("reason",),
    ),
    "queue_seconds": MetricDoc(
        "histogram", "seconds", ("serve",), "Time from a request to its turn; `serve.queue_ms` bounds it."
    ),
    "fallback_answers_total": MetricDoc(
        "counter",
        "requests",
        ("serve",),
        "Requests that `serve.fallback` answered: no model, or no counters yet.",
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
    "replica_digest_wrong_total": MetricDoc(
        "counter",
        "versions",
        ("serve",),
        "Versions of which what is served here, or would be, was not what the trainer says; must stay 0. The next "
        "snapshot is loaded.",
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
}
