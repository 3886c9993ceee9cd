"""Reads rows of an open table batch by batch; each says `moved`: a big table is told from a store that hangs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from headrace.backends.lake.hour_files import DATE, HOUR, local_store, store_of
from headrace.process.moved import moved


def scan(table: Any, columns: Sequence[str], store: Any, only: ds.Expression | None = None) -> pa.Table:
    """Return these columns of the rows that `only` keeps, all by default, in any order.

    Args:
        table: a `DeltaTable`.
        store: the file system to read it with; None lets the table say.
    """
    scanner = table.to_pyarrow_dataset(filesystem=store).scanner(columns=list(columns), filter=only)
    batches = []
    for batch in scanner.to_batches():
        batches.append(batch)
        moved()
    return pa.Table.from_batches(batches, scanner.projected_schema)


def fragments_by_path(table: Any) -> dict[str, Any]:
    """Return the files of an open table by path, each with the date, hour and event times of its rows.

    For filters on any column. `to_pyarrow_dataset` says `>= null` of a column that Delta's log has no statistics of
    (all but four in a file that compaction wrote), and then a filter on that column finds no row of the file.
    """
    store = local_store(table) or store_of(table)
    listed, form = pa.table(table.get_add_actions(flatten=True)), ds.ParquetFileFormat()
    names = {f"partition.{DATE}", f"partition.{HOUR}", "min.event_time_ms", "max.event_time_ms"}
    found = {}
    for row in listed.select(["path", *sorted(names & set(listed.column_names))]).to_pylist():
        known = [
            ds.field(name) == row[f"partition.{name}"]
            for name in (DATE, HOUR)
            if row.get(f"partition.{name}") is not None
        ]
        if row.get("min.event_time_ms") is not None and row.get("max.event_time_ms") is not None:
            known.append(ds.field("event_time_ms") >= row["min.event_time_ms"])
            known.append(ds.field("event_time_ms") <= row["max.event_time_ms"])
        of = functools.reduce(operator.and_, known) if known else None
        found[row["path"]] = form.make_fragment(row["path"], store, partition_expression=of)
    return found


def dataset_of(table: Any, fragments: Sequence[Any]) -> ds.FileSystemDataset:
    """Return files of `fragments_by_path` with the table's columns."""
    schema = pa.schema(table.schema().to_arrow())
    plain = pa.schema([pa.field(f.name, f.type, f.nullable) for f in schema])
    store = local_store(table) or store_of(table)
    return ds.FileSystemDataset(list(fragments), plain, ds.ParquetFileFormat(), store)
