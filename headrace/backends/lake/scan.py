"""Reads rows of an open table batch by batch; each says `moved`: a big table is told from a store that hangs."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, hour_ms, local_store, store_of
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.positions import Position, Positions, order_of, orders, position_of
from headrace.contract.interfaces.lake import SpanMs, StoredHour
from headrace.process.moved import moved

BATCHES_AHEAD = 4
"""Row groups that are decoded before they are asked for; Arrow's default of 16 in each of 4 files is 600 MB."""


def scan(table: Any, columns: Sequence[str], only: ds.Expression | None = None) -> pa.Table:
    """Return these columns of the rows of an open table that `only` keeps, all by default, in any order."""
    if only is None:
        data = table.to_pyarrow_dataset(filesystem=local_store(table))
    else:
        data = dataset_of(table, fragments_by_path(table).values())
    scanner = data.scanner(columns=list(columns), filter=only, batch_readahead=BATCHES_AHEAD, fragment_readahead=2)
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
    listed, form = files(table), ds.ParquetFileFormat()
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


def dataset_of(table: Any, fragments: Iterable[Any]) -> ds.FileSystemDataset:
    """Return files of `fragments_by_path` with the table's columns."""
    schema = pa.schema(table.schema().to_arrow())
    plain = pa.schema([pa.field(f.name, f.type, f.nullable) for f in schema])
    store = local_store(table) or store_of(table)
    return ds.FileSystemDataset(list(fragments), plain, ds.ParquetFileFormat(), store)


def read_rows(table: Any, columns: Sequence[str] | None, span: SpanMs | None = None) -> pa.Table:
    """Return rows of an open table, of event times in `span` where told, without the columns of its partitions unless
    they are asked for."""
    if columns is None:
        columns = columns_of(table)
    return scan(table, columns, None if span is None else _within(span, hours_apart=bool(partition_columns(table))))


def span_of(day: date) -> SpanMs:
    """Return the event times of a UTC day."""
    return hour_ms(day, 0), hour_ms(day + timedelta(days=1), 0)


def _within(span: SpanMs, *, hours_apart: bool) -> ds.Expression:
    begin_ms, end_ms = span
    wanted = (pc.field("event_time_ms") >= begin_ms) & (pc.field("event_time_ms") < end_ms)
    if hours_apart:
        first, last = (datetime.fromtimestamp(at // 1000, UTC) for at in (begin_ms, max(begin_ms, end_ms - 1)))
        wanted &= (pc.field(DATE) >= first.date()) & (pc.field(DATE) <= last.date())
        if first.date() == last.date():
            wanted &= (pc.field(HOUR) >= first.hour) & (pc.field(HOUR) <= last.hour)
    return wanted


def columns_of(table: Any) -> list[str]:
    """Return the names of the table's columns but for those of its partitions."""
    return [f.name for f in table.schema().fields if f.name not in (DATE, HOUR)]


def partition_columns(table: Any) -> list[str]:
    """Return by which columns the table is partitioned."""
    return list(table.metadata().partition_columns)


def files(table: Any) -> pa.Table:
    """Return the table's files: path, size_bytes, num_records and, where it is partitioned, date and hour."""
    return pa.table(table.get_add_actions(flatten=True))


def count_rows(table: Any) -> int:
    """Return how many rows the version holds, from its log alone."""
    return int(pc.sum(files(table)["num_records"]).as_py() or 0)


def hours_of(table: Any) -> list[StoredHour] | None:
    """Return the hours that have rows, oldest first, from the table's log alone; None where it does not say."""
    listed = files(table)
    if not partition_columns(table) or listed["num_records"].null_count:
        return None
    rows_of: dict[int, int] = defaultdict(int)
    columns = (listed[name].to_pylist() for name in (f"partition.{DATE}", f"partition.{HOUR}", "num_records"))
    for day, hour, rows in zip(*columns, strict=True):
        rows_of[hour_ms(day, hour)] += rows
    return [StoredHour(begin, rows) for begin, rows in sorted(rows_of.items()) if rows]


def hours_in(times: pa.ChunkedArray) -> list[StoredHour]:
    """Return the hours of event times, oldest first."""
    hour_H, rows_H = np.unique(times.to_numpy() // HOUR_MS, return_counts=True)
    return [StoredHour(int(hour) * HOUR_MS, int(rows)) for hour, rows in zip(hour_H, rows_H, strict=True)]


def least_positions(rows: pa.Table) -> dict[int, Position]:
    """Return each partition's lowest position among the rows; nothing where rows have no positions."""
    if not {"partition", "offset", "rank"} <= set(rows.column_names) or not rows.num_rows:
        return {}
    part_N, order_N = rows["partition"].to_numpy(), _orders(rows)
    return {int(p): position_of(int(order_N[part_N == p].min())) for p in np.unique(part_N)}


def _orders(rows: pa.Table) -> npt.NDArray[np.int64]:
    return orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())


def contained(rows: pa.Table, positions: Positions) -> npt.NDArray[np.bool_]:
    """Say of each row whether `positions` contain it: bool [N]."""
    part_N, order_N = rows["partition"].to_numpy(), _orders(rows)
    kept_N = np.zeros(len(part_N), np.bool_)
    for partition, position in positions.by_partition.items():
        kept_N |= (part_N == partition) & (order_N <= order_of(position))
    return kept_N


def refuse_unknown(table: Any, columns: Sequence[str]) -> None:
    """Raise `ConfigRejected` for columns that the table does not have."""
    known = [field.name for field in table.schema().fields]
    if unknown := [name for name in columns if name not in known]:
        raise ConfigRejected(f"version {table.version()} of the lake has no column {unknown}; it has {known}.")
