"""The metrics that the gateway alone has (the shop counts events too)."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

INGEST: Mapping[Name, MetricDoc] = {
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
        "counter",
        "connections",
        ("ingest", "serve"),
        "Connections and requests that were refused.",
        labels=("reason",),
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
    "tls_days_left": MetricDoc(
        "gauge",
        "days",
        ("ingest",),
        "Until the end of the certificate that is served; below 0 no client takes it. Only with ingest.tls_cert.",
    ),
    "feedback_delay_seconds": MetricDoc(
        "gauge",
        "seconds",
        ("ingest",),
        "Median time from the moment of a feedback to its arrival at the gateway, of the newest 1,024. A shipper that "
        "holds it back beyond the window makes negatives.",
        labels=("type",),
    ),
    "requests_open": MetricDoc(
        "gauge", "requests", ("ingest",), "Requests to the collector that wait for their answer now."
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
}
