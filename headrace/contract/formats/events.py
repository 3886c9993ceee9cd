"""The `events` topic: schemas of its records and how they are written and read.

One Kafka record holds one Arrow record batch of one kind, as an Arrow IPC stream; its headers say which. Growth rules
of every schema here: a new column is nullable and comes last; a column never changes its type or meaning; a reader
fills a column that is missing with null and ignores one that it does not know. Gateways of before wrote no `late`.

| header | on | meaning |
|---|---|---|
| `kind` | all | `impression`, `feedback`, `aggregate`, `external`, `spec`, `punctuation` |
| `type` | feedback | the feedback event type's name |
| `epoch` | aggregate | that of its rows; what release 0.1 wrote has none |
| `gateway`, `epoch`, `seq` | from ingest | who wrote it; `seq` counts its records of this epoch and partition |
| `late` | from ingest | `set-aside`: nothing in it is too late; `looked-up`: each event is, and was found to be new |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import pyarrow as pa

from headrace.contract.crawl import external_columns
from headrace.contract.errors import EventRejected
from headrace.contract.formats.json_record import decode_json

if TYPE_CHECKING:
    from headrace.contract.project import FeedbackType, FieldType, Project

IMPRESSION, FEEDBACK, AGGREGATE = "impression", "feedback", "aggregate"
EXTERNAL, SPEC, PUNCTUATION = "external", "spec", "punctuation"
LATE, SET_ASIDE, LOOKED_UP = "late", "set-aside", "looked-up"
# One thread: a record holds a few rows of many columns, and handing each column to a pool costs ten times the work.
_READ = pa.ipc.IpcReadOptions(use_threads=False)
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
ENCODINGS = frozenset({IMPRESSION, FEEDBACK, AGGREGATE, EXTERNAL})
KINDS = frozenset({IMPRESSION, FEEDBACK, AGGREGATE, EXTERNAL, SPEC, PUNCTUATION})
"""A record of `events` with another `kind`, or with none, is not ours."""

ARROW_TYPES: dict[FieldType, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "list[string]": pa.list_(pa.string()),
    "list[int64]": pa.list_(pa.int64()),
}


def name_of(kind: pa.DataType) -> str:
    """Return a type as a project declares it, not as Arrow calls it.

    >>> [name_of(kind) for kind in (pa.float64(), pa.list_(pa.string()), pa.int32())]
    ['float64', 'list[string]', 'int32']
    """
    return next((name for name, arrow in ARROW_TYPES.items() if arrow == kind), str(kind))


ENVELOPE = (
    pa.field("event_id", pa.string(), nullable=False),
    pa.field("request_id", pa.string(), nullable=False),
    pa.field("place", pa.int32(), nullable=False),
    pa.field("key", pa.string(), nullable=False),
    pa.field("event_time_ms", pa.int64(), nullable=False),
)
"""Columns that impressions and feedback share, first and in this order."""
VERSION = pa.field("version", pa.string())
"""Of impressions: the model version that scored it."""
VALUE = pa.field("value", pa.float64())
"""Of feedback."""

AGGREGATE_SCHEMA = pa.schema(
    [
        pa.field("counter", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("as_of_ms", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("counts", pa.list_(pa.float32()), nullable=False),
    ]
)
"""Values of a counter of another key than the partition's: one row a (counter, key), `counts` in declared order.

`key` is the field's value as a string. A row holds until a newer one comes; all zeros when the window has emptied.
"""

EXTERNAL_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("crawl_time_ms", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("values", pa.string()),
        pa.field("url", pa.string()),
    ]
)
"""Versions of crawled entities, in every partition in one order: one row a (source, key) whose values changed.

`version` is a digest of `values`, a JSON object of the declared fields; null when the entity is gone. Of one key crawl
times grow. A row that repeats the newest version, or is not crawled after it, changes nothing, nor one of a lower epoch
than the highest seen, which a fenced-off process wrote.
"""


EPOCH_MAX = 1 << 62
"""Epochs, and times in ms, are below it. None of ours comes so far; one beyond it would leave no next one."""
Epoch = Annotated[int, msgspec.Meta(gt=-EPOCH_MAX, lt=EPOCH_MAX)]


class ExternalValue(msgspec.Struct, frozen=True):
    """What `features` holds of an entity, under the key `external/<source>/<key>`; deleted when the entity is gone."""

    crawl_time_ms: Epoch
    epoch: Epoch
    values: msgspec.Raw


def impression_schema(project: Project) -> pa.Schema:
    """Return the columns of impression batches: envelope, `version`, raw fields, `counter.*` (float32) and `external.*`
    as served."""
    return pa.schema(
        [
            *ENVELOPE,
            VERSION,
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in project.impression.fields.items()),
            *(pa.field(name, pa.float32()) for name in project.features.counter_columns()),
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in external_columns(project.crawls).items()),
        ]
    )


def feedback_schema(project: Project, feedback: FeedbackType) -> pa.Schema:
    """Return the columns of a feedback type's batches: envelope, `value` (float64), raw fields.

    The partition key's raw field is added where the type does not declare it.
    """
    fields = dict(feedback.fields)
    fields.setdefault(project.impression.key, project.impression.fields[project.impression.key])
    return pa.schema(
        [
            *ENVELOPE,
            VALUE,
            *(pa.field(name, ARROW_TYPES[kind]) for name, kind in fields.items()),
        ]
    )


class Punctuation(msgspec.Struct, frozen=True):
    """A gateway's promise for one partition: it will append no event older than `time_ms` there after this record.

    `counts` are the gateway's totals of this epoch (declared events): read, appended, dead_lettered, repeated.
    `by_record`: the promise reaches no further than its record's own time, which the broker wrote.
    """

    gateway: str
    epoch: int
    time_ms: int
    bye: bool = False
    counts: dict[str, int] = {}
    by_record: bool = False


def encode_batch(batch: pa.RecordBatch) -> bytes:
    """Return `batch` as an Arrow IPC stream with one batch, LZ4-compressed buffers."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=_WRITE) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def decode_batch(data: bytes, schema: pa.Schema | None = None) -> pa.RecordBatch:
    """Return the one batch in `data`, fitted to `schema` by the growth rules when one is given.

    Raises `EventRejected` (`bad_batch`) when `data` is no such stream or a column changed its type.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(data), options=_READ) as reader:
            batches = list(reader)
            batch = batches[0] if len(batches) == 1 else _one(pa.Table.from_batches(batches, reader.schema))
            _ = batch.schema.names  # Only now are they decoded, and found to be no text.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, MemoryError):
            raise
        raise EventRejected("bad_batch", f"no Arrow IPC stream of {len(data)} bytes: {error}") from error
    return batch if schema is None else fit(batch, schema)


def _one(table: pa.Table) -> pa.RecordBatch:
    """Return a table as one batch. What is not sound must not be copied: Arrow would read beyond its buffers."""
    table.validate(full=True)
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def fit(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return `batch` with exactly `schema`'s columns: missing ones null, unknown ones gone."""
    if batch.schema.equals(schema):
        return batch
    columns: list[pa.Array] = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(index)
        if column.type != field.type:
            raise EventRejected("bad_batch", f"column {field.name!r} is {column.type}; the schema says {field.type}.")
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def encode_punctuation(punctuation: Punctuation) -> bytes:
    """Return the record's value: compact JSON."""
    return msgspec.json.encode(punctuation)


def decode_punctuation(data: bytes) -> Punctuation:
    """Read what `encode_punctuation` wrote. Raises as `decode_json`, for numbers of more than 63 bits too."""
    found: Punctuation = decode_json(data, Punctuation)
    if max(abs(found.time_ms), abs(found.epoch)) >= EPOCH_MAX:
        raise msgspec.ValidationError("a time or an epoch is out of range")
    return found


def batch_from_rows(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as a batch, for tests and low rates."""
    return pa.RecordBatch.from_pylist(list(rows), schema=schema)
