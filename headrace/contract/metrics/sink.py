"""The metrics of the lake's sink."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.interfaces.metric_doc import MetricDoc
from headrace.contract.metrics.names import Name

SINK: Mapping[Name, MetricDoc] = {
    "rows_stored_total": MetricDoc("counter", "rows", ("sink",), "Rows that were committed to the lake."),
    "lake_version": MetricDoc("gauge", "version", ("sink",), "The lake's version after the newest commit."),
    "commit_seconds": MetricDoc("histogram", "seconds", ("sink",), "Time that a commit to the lake took."),
    "behind_ms": MetricDoc(
        "gauge",
        "milliseconds",
        ("sink",),
        "Age of the oldest sample that is not in the lake. NaN while it is not known, since the broker does not tell.",
    ),
    "lake_files": MetricDoc("gauge", "files", ("sink",), "Files of the lake's newest version, as of the last upkeep."),
    "lake_bytes": MetricDoc("gauge", "bytes", ("sink",), "Bytes of the lake's newest version, as of the last upkeep."),
    "lake_files_compacted_total": MetricDoc(
        "counter", "files", ("sink",), "Files that compaction replaced by larger ones."
    ),
    "lake_files_vacuumed_total": MetricDoc("counter", "files", ("sink",), "Files that vacuum deleted."),
    "lake_upkeep_failed_total": MetricDoc(
        "counter", "upkeeps", ("sink",), "Upkeeps of the lake that failed and are tried again."
    ),
    "archived_records_total": MetricDoc(
        "counter", "records", ("sink",), "Records of `events` that were committed to the archive."
    ),
    "archived_bytes_total": MetricDoc("counter", "bytes", ("sink",), "Their keys and values, before compression."),
    "archive_commit_seconds": MetricDoc("histogram", "seconds", ("sink",), "Time that a commit to the archive took."),
    "archive_lag_records": MetricDoc(
        "gauge",
        "records",
        ("sink",),
        "Records of `events` beyond the archived offsets that the last round left. NaN before the first.",
    ),
    "archive_behind_ms": MetricDoc(
        "gauge",
        "milliseconds",
        ("sink",),
        "Age of the oldest record of `events` that is not archived, at most. NaN before the first round.",
    ),
    "archive_stopped": MetricDoc(
        "gauge",
        "partitions",
        ("sink",),
        "Partitions whose archive stands still, since the topic was made anew or has lost its end; must stay 0.",
    ),
    "archive_files": MetricDoc("gauge", "files", ("sink",), "Files of the archive, as of the last upkeep."),
    "archive_bytes": MetricDoc("gauge", "bytes", ("sink",), "Bytes of the archive, as of the last upkeep."),
}
