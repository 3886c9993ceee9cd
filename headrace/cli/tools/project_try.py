"""Tries a project on made-up rows: its own functions are called, and what a row takes is measured. No servers, no I/O.

Rows are seeded, with nulls, empty texts and extreme numbers among them: every input is legal.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.contract.errors import HeadraceError
from headrace.contract.formats.events import encode_batch, feedback_schema, impression_schema
from headrace.contract.formats.sample import list_column, sample_schema
from headrace.contract.project import Project
from headrace.contract.spec import Custom, FeatureSpec
from headrace.stream.features.featurize import featurize, split_check

ROWS = 2_000
TRY_ROWS = 40
_WORDS = ("red", "bicycle", "Oslo", "grün", "8", "", "a long text of some words")


class RowBytes(NamedTuple):
    """What a row takes, in bytes; `event` and `sample` in records of `rows` rows, `stored` in the lake's files."""

    event: float
    feedback: float
    sample: float
    waiting: float
    stored: float
    archived: float
    """Of an event, in a file of the archive."""


class Trouble(NamedTuple):
    """What is wrong with one of the user's own functions, and the error that says so."""

    at: str
    error: HeadraceError


def try_functions(project: Project) -> Iterator[Trouble]:
    """Give what is wrong with each feature function: one that raises, returns another shape, or looks at neighbours."""
    rows = made_up(impression_schema(project), TRY_ROWS)
    for number, feature in enumerate(project.features.features):
        if isinstance(feature, Custom):
            spec = FeatureSpec(features=(feature,))
            try:
                featurize(rows.slice(0, 0), spec)
                split_check(rows, spec, step=7)
            except HeadraceError as error:
                yield Trouble(f"features.features[{number}]", error)


def measure(project: Project, rows: int) -> RowBytes:
    """Return what a row takes on the wire, in memory and in the lake, in records of `rows` rows."""
    many = made_up(impression_schema(project), ROWS)
    slots_NF, numeric_ND = featurize(many, project.features)
    given: dict[str, Any] = {name: many.column(name) for name in many.schema.names}
    given |= {"slots": list_column(slots_NF, pa.int64()), "numeric": list_column(numeric_ND, pa.float32())}
    schema = sample_schema(project)
    lead = made_up(schema, ROWS)
    samples = pa.record_batch([given.get(name, lead.column(name)) for name in schema.names], schema=schema)
    feedback = [made_up(feedback_schema(project, each), ROWS) for each in project.feedback]
    stored = io.BytesIO()
    pq.write_table(pa.Table.from_batches([samples]), stored, compression="snappy")
    return RowBytes(
        event=_wire(many, rows),
        feedback=sum(_wire(each, rows) for each in feedback) / max(1, len(feedback)),
        sample=_wire(samples, rows),
        waiting=(many.nbytes + slots_NF.nbytes + numeric_ND.nbytes) / ROWS,
        stored=len(stored.getvalue()) / ROWS,
        archived=_archived([many, *feedback], rows),
    )


def made_up(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """Return seeded rows of a schema; of fields that may be null a tenth is."""
    chance = random.Random(7)
    columns = []
    for field in schema:
        values = [
            None if field.nullable and chance.random() < 0.1 else _value(field.type, chance, row) for row in range(rows)
        ]
        columns.append(pa.array(values, field.type))
    return pa.record_batch(columns, schema=schema)


def _value(kind: pa.DataType, chance: random.Random, row: int) -> Any:
    if pa.types.is_list(kind):
        return [_value(kind.value_type, chance, row) for _ in range(chance.randrange(4))]
    if pa.types.is_boolean(kind):
        return chance.random() < 0.5
    if pa.types.is_floating(kind):
        return chance.choice((0.0, -1.5, 1e30 if row < TRY_ROWS else 7.25, chance.random() * 100))
    if pa.types.is_integer(kind):
        return chance.randrange(1_000_000) if row else 0
    return chance.choice(_WORDS) if row < TRY_ROWS else f"{chance.randrange(1_000_000):012d}"


def _wire(batch: pa.RecordBatch, rows: int) -> float:
    count = max(1, min(rows, batch.num_rows))
    size = len(encode_batch(batch.slice(batch.num_rows - count)))
    return size / float(count)


def _archived(batches: Sequence[pa.RecordBatch], rows: int) -> float:
    """Return what a row of these events takes in a file of the archive, in records of `rows` rows."""
    count = max(1, min(rows, ROWS))
    values = [encode_batch(batch.slice(begin, count)) for batch in batches for begin in range(0, ROWS, count)]
    file = io.BytesIO()
    pq.write_table(pa.table({"value": values}), file, compression="zstd", use_dictionary=False)
    return len(file.getvalue()) / (ROWS * len(batches))
