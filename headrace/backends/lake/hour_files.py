"""Files of single hours of event time, written by us: for compaction, and for commits of very many hours.

delta-rs keeps a writer for every hour of a commit until its end, a half megabyte each: a back-fill of a year in one
commit would take 4 GB. Here a few hours are written at a time. Nobody sees a file before a commit names it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.fs import DeltaStorageHandler
from deltalake.transaction import AddAction
from pyarrow import parquet
from pyarrow.fs import FileSystem, LocalFileSystem, PyFileSystem, SubTreeFileSystem

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.sample import LAKE_HOURS

DATE, HOUR = (field.name for field in LAKE_HOURS)
HOUR_MS = 3_600_000
# The total order in which samples are learnt.
ORDER = ("event_time_ms", "partition", "offset", "rank")
# One group a file of 190,000 rows took readers a half more CPU than groups of this size, which cost 6 % more bytes.
ROW_GROUP_ROWS = 131_072
WRITERS = 8
"""Files that are written at a time: on HDFS each waits for DataNodes most of the time."""

EventHour = tuple[date, int] | None
"""A date and hour; None where the table has no hours."""


def local_store(table: Any) -> Any:
    """Return Arrow's own file system for a table on a POSIX path, None for delta-rs's elsewhere.

    delta-rs's is written in Python, and Arrow's threads may still be in it when a program that has just read ends: it
    aborts then (status 134) in one of ten runs.
    """
    at = urlsplit(table.table_uri)
    return SubTreeFileSystem(unquote(at.path), LocalFileSystem()) if at.scheme in ("", "file") else None


def store_of(table: Any) -> PyFileSystem:
    """Return the file system below an open table."""
    return PyFileSystem(DeltaStorageHandler.from_table(table._table))


def write_file(store: FileSystem, hour: EventHour, rows: pa.Table, *, data_change: bool) -> AddAction:
    """Write one file of an hour's rows, as they are; `data_change` says that they are new to the table."""
    folder = "" if hour is None else f"{DATE}={hour[0].isoformat()}/{HOUR}={hour[1]}/"
    if folder and isinstance(store, SubTreeFileSystem):
        store.create_dir(folder)
    path = f"{folder}part-00000-{uuid.uuid4()}-c000.zstd.parquet"
    with store.open_output_stream(path) as stream:
        parquet.write_table(rows, stream, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        size = stream.tell()
    values = {} if hour is None else {DATE: hour[0].isoformat(), HOUR: str(hour[1])}
    return AddAction(path, size, values, time.time_ns() // 1_000_000, data_change, _statistics(rows))


def write_hours(table: Any, rows: pa.Table) -> list[AddAction]:
    """Write rows that have their date and hour, a file for each hour, few at a time."""
    store = local_store(table) or store_of(table)
    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(lambda one: write_file(store, one[0], one[1], data_change=True), _by_hour(rows)))


def with_hours(rows: pa.Table) -> pa.Table:
    """Return the rows with the UTC date and hour of their event time."""
    if clash := {DATE, HOUR} & set(rows.column_names):
        raise ConfigRejected(f"fields {sorted(clash)} have the names of the lake's partitions; give them others.")
    hours_N: npt.NDArray[np.int64] = rows["event_time_ms"].to_numpy() // HOUR_MS
    days_N = (hours_N // 24).astype(np.int32)
    return rows.append_column(
        pa.field(DATE, pa.date32(), nullable=False), pa.array(days_N).cast(pa.date32())
    ).append_column(pa.field(HOUR, pa.int32(), nullable=False), pa.array((hours_N % 24).astype(np.int32)))


def hour_ms(day: date, hour: int) -> int:
    """Return the Unix time at which an hour of a UTC day begins.

    >>> hour_ms(date(1970, 1, 2), 1)
    90000000
    """
    return ((day - date(1970, 1, 1)).days * 24 + hour) * HOUR_MS


def hours_of_files(listed: pa.Table) -> npt.NDArray[np.int64]:
    """Return when the hour of each file that Delta's log lists begins: Unix ms, int64 [F]."""
    days_F = listed[f"partition.{DATE}"].cast(pa.int32()).to_numpy().astype(np.int64)
    hours_F: npt.NDArray[np.int64] = (days_F * 24 + listed[f"partition.{HOUR}"].to_numpy()) * HOUR_MS
    return hours_F


def hours_in(rows: pa.Table) -> int:
    """Return of how many hours the rows are, that have their date and hour."""
    return len(np.unique(_numbers(rows)))


def _numbers(rows: pa.Table) -> Any:
    return rows[DATE].cast(pa.int32()).to_numpy() * 24 + rows[HOUR].to_numpy()


def _by_hour(rows: pa.Table) -> Iterator[tuple[EventHour, pa.Table]]:
    """Yield each hour and its rows, in their order, without date and hour, which the path of the file says."""
    number_N = _numbers(rows)
    order_N = np.argsort(number_N, kind="stable")
    sorted_N = number_N[order_N]
    begins = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
    grouped = rows.take(pa.array(order_N)).combine_chunks()
    plain = grouped.drop_columns([DATE, HOUR])
    for begin, end in zip(begins, [*begins[1:], len(order_N)], strict=True):
        hour = grouped[DATE][begin].as_py(), grouped[HOUR][begin].as_py()
        yield hour, plain.slice(begin, end - begin)


def _statistics(rows: pa.Table) -> str:
    """Return what Delta's log says of a file, so that readers leave it out by time or position."""
    bounds = {name: pc.min_max(rows[name]).as_py() for name in ORDER if name in rows.column_names}
    return msgspec.json.encode(
        {
            "numRecords": rows.num_rows,
            "minValues": {name: b["min"] for name, b in bounds.items()},
            "maxValues": {name: b["max"] for name, b in bounds.items()},
            "nullCount": {name: rows[name].null_count for name in bounds},
        }
    ).decode()
