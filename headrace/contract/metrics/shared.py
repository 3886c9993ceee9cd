"""The metrics that stages of several rooms have: lags, gaps, requests, errors, health."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from headrace.contract.interfaces.metric_doc import MetricDoc, Stage
from headrace.contract.metrics.names import Name

SHARED: Mapping[Name, MetricDoc] = {
    "hop_shipped_seconds": MetricDoc(
        "histogram",
        "seconds",
        ("ingest",),
        "Freshness, hop 1: from the event time of feedback to the gateway's batch. The clock of who logged counts.",
    ),
    "hop_logged_seconds": MetricDoc(
        "histogram",
        "seconds",
        ("ingest",),
        "Freshness, hop 2: from the gateway's batch to Kafka's receipt of its record.",
    ),
    "hop_joined_seconds": MetricDoc(
        "histogram",
        "seconds",
        ("stream",),
        "Freshness, hop 3: from the broker's time of feedback to its sample, handed to Kafka's client.",
    ),
    "hop_learnt_seconds": MetricDoc(
        "histogram",
        "seconds",
        ("train",),
        "Freshness, hop 4: from the time of a record of `samples` to the end of the step that learnt its last row.",
    ),
    "hop_published_seconds": MetricDoc(
        "histogram", "seconds", ("train",), "Freshness, hop 5: from the first step that a delta holds to the delta."
    ),
    "hop_served_seconds": MetricDoc(
        "histogram", "seconds", ("serve",), "Freshness, hop 6: from the making of a delta to its being served."
    ),
    "lag_records": MetricDoc(
        "gauge",
        "records",
        ("ingest", "stream", "sink", "aggregate", "train"),
        "Records of its topic that the stage has not read yet (train: not learnt); ingest: of each source's topic. NaN "
        "while it is not known, since the broker has told no ends or not all of them.",
        labels=("topic",),
    ),
    "gap_total": MetricDoc(
        "counter",
        "gaps",
        ("ingest", "sink", "train", "serve"),
        "Gaps in what was read; must stay 0. Ingest: records of a source's topic that retention deleted unread. Sink, "
        "topic `events`: offsets that the topic forgot before they were archived.",
        labels=("topic",),
    ),
    "unknown_fields_total": MetricDoc(
        "counter",
        "fields",
        ("ingest", "serve"),
        "Undeclared fields by name, 20 names at most, then `(others)`: of requests; ingest: of one event a second of "
        "each type that is looked at.",
        labels=("type", "field"),
    ),
    "requests_total": MetricDoc(
        "counter",
        "requests",
        ("ingest", "serve", "shop"),
        "Requests that were answered, by HTTP status; the shop: its own requests that got a ranking.",
        labels=("status",),
    ),
    "request_seconds": MetricDoc(
        "histogram", "seconds", ("ingest", "serve", "shop"), "Time from a request to its answer."
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
    "records_unreadable_total": MetricDoc(
        "counter",
        "records",
        ("ingest", "stream", "aggregate", "sink", "train", "serve", "shop"),
        "Records of a topic that are not ours (`kind` foreign) or can't be read (damaged), skipped; must stay 0.",
        labels=("topic", "kind"),
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
}
