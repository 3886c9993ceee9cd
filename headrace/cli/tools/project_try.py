"""Tries a project on made-up rows: its own functions are called, and what a row takes is measured. No servers, no I/O.

Rows are seeded, with nulls, empty texts and extreme numbers among them: every input is legal.
"""

from __future__ import annotations

import ast
import io
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.cli.project_folder import is_demo
from headrace.cli.project_lines import failed, own_lines
from headrace.contract.checks.unknown_fields import meant_field, shown, undeclared
from headrace.contract.errors import ConfigRejected, HeadraceError, listed
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


def try_traffic(project: Project, folder: Path) -> tuple[str, str]:
    """Return what `headrace traffic` finds in a project's folder, and what is wrong with it, "" where nothing is.

    A file that defines no `visits` is not run: it may be a program of the user's own.
    """
    # Here: the sender and the made-up visitors are for this alone.
    from headrace.cli.tools.traffic import FILE, load_visits
    from headrace.examples.service import Service

    file = folder / FILE
    if is_demo(folder):
        return "a stage of the demo, which `headrace up` starts", ""
    if not file.is_file():
        return f"none: no {FILE}, so `headrace traffic` has nothing to play; `headrace init` writes one", ""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, OSError) as error:
        return f"{FILE}, which cannot be read", failed(error, file, {})
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if "visits" not in names:
        return f"{FILE}, which defines no visits(project, seed)", f"{file} has no function visits(project, seed)."
    try:
        with redirect_stdout(sys.stderr):
            first = next(iter(load_visits(folder)(project, 1)), None)
            if first is not None:
                Service(project, iter([first]), log=lambda *_: None, run="check", rank=None).show(0)
    except ConfigRejected as error:
        return f"{FILE}, which fails", str(error)
    except (Exception, SystemExit) as error:
        if next(own_lines(error, folder), None) is None:
            what = f"{type(error).__name__}: {error}"
            return f"{FILE}, which fails", f"{file}: its first visit is no headrace.examples.visits.Visit ({what})."
        return f"{FILE}, which fails", failed(error, file, {})
    if first is None:
        return f"{FILE}, which fails", f"{file}: visits(project, seed) gives no visit."
    known = project.impression.fields.keys() | project.impression.private.keys()
    if more := undeclared(dict.fromkeys(chain(first.context, *first.candidates)), known):
        meant = meant_field(more[0], known)
        trouble = f"{file}: its visits have {listed(map(shown, more))}, which the impression does not declare.{meant}"
        return f"{FILE}, with fields that nobody reads", trouble
    return f"{FILE}: `headrace traffic` plays its visitors", ""


def _archived(batches: Sequence[pa.RecordBatch], rows: int) -> float:
    """Return what a row of these events takes in a file of the archive, in records of `rows` rows."""
    count = max(1, min(rows, ROWS))
    values = [encode_batch(batch.slice(begin, count)) for batch in batches for begin in range(0, ROWS, count)]
    file = io.BytesIO()
    pq.write_table(pa.table({"value": values}), file, compression="zstd", use_dictionary=False)
    return len(file.getvalue()) / (ROWS * len(batches))
