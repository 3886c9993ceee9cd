"""The files of one version of the lake, listed once, and the rows in them.

A version never changes, so what Delta's log says of its files is looked up once: their paths, and which event times
each can have. A reading opens those files alone whose times it asks for. Each batch says `moved`: a big table is told
from a store that hangs.

For filters on any column. Delta's own `to_pyarrow_dataset` says `>= null` of a column that the log has no statistics of
(all but four in a file that compaction wrote), and then a filter on that column finds no row of the file.

Legend: F files, N rows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from headrace.backends.delta.leases import NOTHING_IMPORTED
from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, ROW_GROUP_ROWS, hours_of_files, local_store, store_of
from headrace.backends.lake.listing import columns_of, contained, files, partition_columns, refuse_unknown
from headrace.contract.formats.positions import Positions
from headrace.contract.interfaces.lake import SpanMs, StoredHour
from headrace.process.moved import moved

Int64s = npt.NDArray[np.int64]
PLACE = ("partition", "offset", "rank")
TIME = "event_time_ms"
BATCH_ROWS = 16_384
BATCHES_AHEAD = 8
"""Decoded before they are asked for: one row group."""
FILES_AHEAD = 2, 16
"""Files that are read before they are asked for, at least and at most: as many small ones as one row group."""
FRAGMENTS_KEPT = 64
"""Files whose footers stay in memory: those of neighbouring spans, which a cut hour is read by."""
_FIRST, _LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


class VersionFiles:
    """What one version holds, as it was opened.

    Args:
        table: an open Delta table.
        up_to: of its rows only those at or below these positions: an older version's, whose files are gone.
        imported_upto: and of imported rows those up to this order.
    """

    def __init__(self, table: Any, up_to: Positions | None = None, imported_upto: int = NOTHING_IMPORTED) -> None:
        self.table, self.up_to, self._imported_upto = table, up_to, imported_upto
        self.version = int(table.version())
        self.columns = columns_of(table)
        """Names of the columns, but for those of its partitions."""
        listed = files(table)
        self._paths: list[str] = listed["path"].to_pylist()
        self._rows_F = pc.fill_null(listed["num_records"], -1).to_numpy()
        self._is_parted = bool(partition_columns(table))
        self._hour_F = hours_of_files(listed) if self._is_parted else np.zeros(len(self._paths), np.int64)
        self._first_F = _known(listed, f"min.{TIME}", self._hour_F if self._is_parted else _FIRST)
        self._last_F = _known(listed, f"max.{TIME}", self._hour_F + HOUR_MS - 1 if self._is_parted else _LAST)
        self._store = local_store(table) or store_of(table)
        self._fragment = functools.lru_cache(FRAGMENTS_KEPT)(self._made)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """All columns and their types."""
        return pa.schema([pa.field(f.name, f.type, f.nullable) for f in pa.schema(self.table.schema().to_arrow())])

    @property
    def extent_ms(self) -> tuple[int, int] | None:
        """Event time of the first and the last row, None where the log does not say."""
        if not len(self._paths) or self._first_F.min() == _FIRST or self._last_F.max() == _LAST:
            return None
        return int(self._first_F.min()), int(self._last_F.max())

    @functools.cached_property
    def hours(self) -> tuple[StoredHour, ...]:
        """The hours that have rows, oldest first: from the log, or where it does not say, by reading all times."""
        if self._is_parted and self.up_to is None and (self._rows_F >= 0).all():
            hour_H, at_F = np.unique(self._hour_F, return_inverse=True)
            rows_H = np.bincount(at_F, weights=self._rows_F, minlength=len(hour_H)).astype(np.int64)
        else:
            hour_H, rows_H = self._counted()
        return tuple(StoredHour(h, rows) for h, rows in zip(hour_H.tolist(), rows_H.tolist(), strict=True) if rows)

    def read(self, columns: Sequence[str] | None = None, span_ms: SpanMs | None = None) -> pa.Table:
        """Return rows of event times in `span_ms`, all by default, in any order, all columns or these.

        Raises `ConfigRejected` for a column that there is not, and what Arrow and the store raise.
        """
        batches, schema = self.batches(self.columns if columns is None else columns, span_ms)
        return pa.Table.from_batches(batches, schema)

    def times_in(self, span_ms: SpanMs | None = None) -> Iterator[Int64s]:
        """Yield the event times of the rows in a span, some at a time."""
        for batch in self.batches([TIME], span_ms)[0]:
            yield batch[TIME].to_numpy()

    def batches(
        self, columns: Sequence[str], span_ms: SpanMs | None = None, where: ds.Expression | None = None
    ) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
        """Return rows of event times in `span_ms` for which `where` holds, batch by batch, and their columns."""
        refuse_unknown(self.table, columns)
        wanted = [] if where is None else [where]
        if span_ms is not None:
            wanted.append((ds.field(TIME) >= span_ms[0]) & (ds.field(TIME) < span_ms[1]))
        chosen_F = np.arange(len(self._paths)) if span_ms is None else self._files_in(span_ms)
        read = [*columns, *(name for name in PLACE if self.up_to is not None and name not in columns)]
        scanner = self._dataset(chosen_F).scanner(
            columns=read,
            filter=functools.reduce(operator.and_, wanted) if wanted else None,
            batch_size=BATCH_ROWS,
            batch_readahead=BATCHES_AHEAD,
            fragment_readahead=self._files_ahead(chosen_F),
        )
        schema = pa.schema([scanner.projected_schema.field(name) for name in columns])
        return self._told(scanner, columns), schema

    def _told(self, scanner: Any, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in scanner.to_batches():
            moved()
            if self.up_to is not None:
                batch = batch.filter(pa.array(contained(batch, self.up_to, self._imported_upto))).select(list(columns))
            yield batch

    def _files_in(self, span_ms: SpanMs) -> Int64s:
        return np.flatnonzero((self._first_F < span_ms[1]) & (self._last_F >= span_ms[0]))

    def _files_ahead(self, chosen_F: Int64s) -> int:
        least, most = FILES_AHEAD
        if not len(chosen_F):
            return least
        rows = self._rows_F[chosen_F]
        return int(np.clip(ROW_GROUP_ROWS // max(1, int(rows.max())), least, most)) if rows.min() >= 0 else least

    def _dataset(self, chosen_F: Int64s) -> ds.FileSystemDataset:
        # More than are kept would only push out one another.
        make = self._fragment if len(chosen_F) <= FRAGMENTS_KEPT else self._made
        fragments = [make(at) for at in chosen_F.tolist()]
        return ds.FileSystemDataset(fragments, self.schema, ds.ParquetFileFormat(), self._store)

    def _made(self, at: int) -> Any:
        """Return one file with the date, hour and event times of its rows."""
        known = []
        if self._is_parted:
            hour_N = int(self._hour_F[at]) // HOUR_MS
            day = pa.scalar(hour_N // 24, pa.int32()).cast(pa.date32())
            known += [ds.field(DATE) == day, ds.field(HOUR) == hour_N % 24]
        if self._first_F[at] != _FIRST and self._last_F[at] != _LAST:
            known += [ds.field(TIME) >= int(self._first_F[at]), ds.field(TIME) <= int(self._last_F[at])]
        of = functools.reduce(operator.and_, known) if known else None
        return ds.ParquetFileFormat().make_fragment(self._paths[at], self._store, partition_expression=of)

    def _counted(self) -> tuple[Int64s, Int64s]:
        rows_of: dict[int, int] = {}
        for time_N in self.times_in():
            hour_H, rows_H = np.unique(time_N // HOUR_MS, return_counts=True)
            for hour, rows in zip(hour_H.tolist(), rows_H.tolist(), strict=True):
                rows_of[hour] = rows_of.get(hour, 0) + rows
        hours = sorted(rows_of)
        return np.array(hours, np.int64) * HOUR_MS, np.array([rows_of[hour] for hour in hours], np.int64)


def _known(listed: pa.Table, name: str, otherwise: int | Int64s) -> Int64s:
    """Return what the log says of each file, int64 [F]; `otherwise` where it says nothing."""
    if name not in listed.column_names:
        return np.broadcast_to(np.asarray(otherwise, np.int64), (listed.num_rows,))
    known = listed[name]
    is_known_F = known.is_valid().to_numpy()
    found_F: Int64s = np.where(is_known_F, pc.fill_null(known, 0).to_numpy(), otherwise)
    return found_F
