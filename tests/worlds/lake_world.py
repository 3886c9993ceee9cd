"""What tests of the lake share: rows of samples with positions, and a lake on each store."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

HOUR_MS = 3_600_000
# 2026-11-25 00:00 UTC.
DAY_MS = 1_795_564_800_000

SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("event_time_ms", pa.int64(), nullable=False),
        pa.field("slots", pa.list_(pa.int64()), nullable=False),
    ]
)


def samples(partition: int, offset: int, times_ms: Sequence[int]) -> pa.RecordBatch:
    """Return one record's samples, one a time given, ranks from 0."""
    return pa.RecordBatch.from_pylist(
        [
            {"partition": partition, "offset": offset, "rank": rank, "event_time_ms": at, "slots": [at, offset]}
            for rank, at in enumerate(times_ms)
        ],
        schema=SCHEMA,
    )


def hours(*numbers: int) -> list[int]:
    """Return a time within each of these hours of the day."""
    return [DAY_MS + number * HOUR_MS + 17 for number in numbers]
