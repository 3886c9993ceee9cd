"""What the log of an open table says: its files, columns and rows. And which rows positions contain."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.backends.delta.leases import NOTHING_IMPORTED
from headrace.backends.lake.hour_files import DATE, HOUR, hour_ms
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.positions import Position, Positions, imported, order_of, orders, position_of
from headrace.contract.interfaces.lake import SpanMs


def span_of(day: date) -> SpanMs:
    """Return the event times of a UTC day."""
    return hour_ms(day, 0), hour_ms(day + timedelta(days=1), 0)


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


def least_positions(rows: pa.Table) -> dict[int, Position]:
    """Return each partition's lowest position among the rows; nothing where rows have no positions."""
    if not {"partition", "offset", "rank"} <= set(rows.column_names) or not rows.num_rows:
        return {}
    part_N, order_N = rows["partition"].to_numpy(), _orders(rows)
    return {int(p): position_of(int(order_N[part_N == p].min())) for p in np.unique(part_N)}


def _orders(rows: pa.Table | pa.RecordBatch) -> npt.NDArray[np.int64]:
    return orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())


def contained(
    rows: pa.Table | pa.RecordBatch, positions: Positions, imported_upto: int = NOTHING_IMPORTED
) -> npt.NDArray[np.bool_]:
    """Say of each row whether `positions`, or the import up to an order, contain it: bool [N]."""
    part_N, order_N = rows["partition"].to_numpy(), _orders(rows)
    kept_N = np.zeros(len(part_N), np.bool_)
    for partition, position in positions.by_partition.items():
        kept_N |= (part_N == partition) & (order_N <= order_of(position))
    found_N: npt.NDArray[np.bool_] = np.where(imported(rows["offset"].to_numpy()), order_N <= imported_upto, kept_N)
    return found_N


def refuse_unknown(table: Any, columns: Sequence[str]) -> None:
    """Raise `ConfigRejected` for columns that the table does not have."""
    known = [field.name for field in table.schema().fields]
    if unknown := [name for name in columns if name not in known]:
        raise ConfigRejected(f"version {table.version()} of the lake has no column {unknown}; it has {known}.")
