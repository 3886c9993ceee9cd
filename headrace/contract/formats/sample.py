"""Samples: what the join emits, the lake stores and the trainer learns.

A `samples` record holds one Arrow batch of the samples that one `events` record resolved. Its headers:

| header | meaning |
|---|---|
| `after` | "offset:rank", the position of the last sample before this record in the partition; "-1:-1" for none |
| `last` | "offset:rank" of this record's last row |
| `spec` | digests of the feature specs that made `slots` and `numeric`, joined by `,`; a row's own is its `spec` |
| `sealed` | count and sum of hashes of all samples up to `last`, by task: `headrace.contract.formats.seals` |

Across a change of rules one batch may hold rows of two: it has the columns of both, null where a row has none.

`headrace.contract.formats.samples_topic.sample_order` is the rule by which readers use `after` and `last`: a worker
that was declared dead may have written out of turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.crawl import external_columns
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.positions import Position

if TYPE_CHECKING:
    from headrace.contract.project import Project

LEAD = (
    pa.field("partition", pa.int32(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
    pa.field("rank", pa.int32(), nullable=False),
    pa.field("event_id", pa.string(), nullable=False),
    pa.field("request_id", pa.string(), nullable=False),
    pa.field("place", pa.int32(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("event_time_ms", pa.int64(), nullable=False),
    pa.field("impression_offset", pa.int64(), nullable=False),
    pa.field("impression_row", pa.int32(), nullable=False),
    pa.field("task", pa.string(), nullable=False),
    pa.field("label", pa.float32(), nullable=False),
    pa.field("weight", pa.float32(), nullable=False),
    pa.field("feedback_id", pa.string()),
    pa.field("feedback_time_ms", pa.int64()),
    pa.field("version", pa.string()),
)
"""Position, identity (`event_id` and `event_time_ms` are the impression's), label, and the version that scored it."""

TAIL = (
    pa.field("slots", pa.list_(pa.int64()), nullable=False),
    pa.field("numeric", pa.list_(pa.float32()), nullable=False),
    pa.field("spec", pa.string(), nullable=False),
    pa.field("correction", pa.bool_()),
    pa.field("value", pa.float64()),
)
"""`slots` has F ids a row (uint64 bits in int64, since the lake knows no unsigned), `numeric` D numbers. `correction`
is true on a positive that comes beside a negative of the same impression and task. `value` is that of the feedback;
null for a negative, and where the feedback brought none."""

LAKE_HOURS = (
    pa.field("event_date", pa.date32(), nullable=False),
    pa.field("event_hour", pa.int32(), nullable=False),
)
"""What the lake adds: the UTC date and hour of `event_time_ms`, by which its files lie apart."""
IDENTITY = tuple(field for field in LEAD if field.name in ("partition", "offset", "rank", "event_id", "task"))
"""What every reader of samples needs, and every record of them has had from the beginning."""


def sample_schema(project: Project) -> pa.Schema:
    """Return the columns of samples: lead, raw fields, `counter.*` and `external.*` as known at the impression,
    slots, numbers, spec."""
    return pa.schema(
        [
            *LEAD,
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in project.impression.fields.items()),
            *(pa.field(name, pa.float32()) for name in project.features.counter_columns()),
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in external_columns(project.crawls).items()),
            *TAIL,
        ]
    )


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows with exactly `schema`'s columns: missing ones null, unknown ones gone (growth rule)."""
    have = set(rows.schema.names)
    columns = [rows[f.name].cast(f.type) if f.name in have else pa.nulls(len(rows), f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def matrix(column: pa.Array, width: int) -> npt.NDArray[np.generic]:
    """Return a list column as a [rows, width] array without a copy where Arrow allows it."""
    values: npt.NDArray[np.generic] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), width)


def list_column(values_NW: npt.NDArray[np.generic], kind: pa.DataType) -> pa.ListArray:
    """Return a [rows, width] array as a list column of `kind`; the inverse of `matrix`."""
    rows, width = values_NW.shape
    offsets = pa.array(
        np.arange(0, (rows + 1) * width, width, dtype=np.int32) if width else np.zeros(rows + 1, np.int32)
    )
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values_NW).reshape(-1), type=kind))


def format_position(position: Position) -> str:
    """Return the header form, "offset:rank"."""
    return f"{position.offset}:{position.rank}"


def parse_position(text: str) -> Position:
    """Read the header form.

    >>> parse_position("7:2")
    Position(offset=7, rank=2)
    """
    offset, rank = text.split(":")
    return Position(int(offset), int(rank))
