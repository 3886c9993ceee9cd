"""Reading the lake by hand: a time as people write it, and rows to one file in the form that its name says: .parquet,
.arrow, .csv or .jsonl.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from headrace.contract.errors import ConfigRejected

LINES_ROWS = 10_000
"""Rows that are Python objects at once while lines of JSON are written."""


def export(rows: pa.Table, out: Path) -> None:
    """Write all rows to `out`. Raises `ConfigRejected` for a name that ends in anything else."""
    writers: dict[str, Any] = {
        ".parquet": pyarrow.parquet.write_table,
        ".arrow": pyarrow.feather.write_feather,
        ".csv": lambda table, path: pyarrow.csv.write_csv(_flat(table), path),
        ".jsonl": _write_lines,
    }
    if out.suffix not in writers:
        raise ConfigRejected(f"--out {out}: its name ends in one of {sorted(writers)}.")
    writers[out.suffix](rows, out)


def _flat(rows: pa.Table) -> pa.Table:
    """Return the rows with lists as JSON text, since CSV has none."""
    columns = [
        pa.array([None if v is None else msgspec.json.encode(v).decode() for v in rows[f.name].to_pylist()])
        if pa.types.is_nested(f.type)
        else rows[f.name]
        for f in rows.schema
    ]
    return pa.table(dict(zip(rows.schema.names, columns, strict=True)))


def _write_lines(rows: pa.Table, out: Path) -> None:
    with out.open("wb") as file:
        for batch in rows.to_batches(max_chunksize=LINES_ROWS):
            file.writelines(itertools.chain.from_iterable((msgspec.json.encode(r), b"\n") for r in batch.to_pylist()))


def parse_at(text: str) -> datetime:
    """Read a time: ISO 8601, UTC where it names no zone, or Unix seconds.

    >>> parse_at("2026-11-25 01:00").isoformat(), parse_at("0").isoformat()
    ('2026-11-25T01:00:00+00:00', '1970-01-01T00:00:00+00:00')
    """
    try:
        if _is_seconds(text):
            return datetime.fromtimestamp(float(text), UTC)
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigRejected(f"{text!r} is no time; 2026-11-25T01:00:00Z or Unix seconds are.") from error
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def has_zone(text: str) -> bool:
    """Say whether a time that `parse_at` reads names its zone; Unix seconds do.

    >>> has_zone("2026-11-25"), has_zone("2026-11-25T01:00+01:00"), has_zone("1795564800")
    (False, True, True)
    """
    return _is_seconds(text) or datetime.fromisoformat(text).tzinfo is not None


def _is_seconds(text: str) -> bool:
    return text.isascii() and text.replace(".", "", 1).isdigit()
