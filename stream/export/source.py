"""Samples of a time range out of one version of the lake, slice by slice in order of event time, in bounded memory.

1. The version's files lie apart by the hour of event time. Hours that are small are read together.
2. An hour that is larger than a slice is cut by time: one pass counts its rows by the millisecond, then each slice is
   read by itself. Files and row groups outside of its time are left out, so a sorted hour is read once in all.
3. All samples of an impression have its event time, so a slice has all or none of them.
4. Where vacuum has deleted files of the version, its rows are found in the newest one by the positions that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, hour_ms, local_store, store_of
from headrace.backends.lake.scan import contained, dataset_of, files, fragments_by_path, partition_columns
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Positions
from headrace.process.moved import moved

SLICE_ROWS = 131_072
"""Samples that are in memory at once; more only where more have one millisecond of event time."""
_BATCH_ROWS = 16_384
_POSITION = ("partition", "offset", "rank")


@dataclass(frozen=True)
class Slice:
    """A range of event time, and the files that have rows of it."""

    begin_ms: int
    end_ms: int
    rows: int
    """How many there are about."""
    fragments: tuple[Any, ...]


class LakeSlices:
    """One version's samples of a range of event time; see the module. Take a lease of the version before."""

    def __init__(
        self, lake: DeltaLake, version: int, begin_ms: int, end_ms: int, *, slice_rows: int = SLICE_ROWS
    ) -> None:
        """Open the version. Raises `Unavailable`, and `InvariantBroken` where retention has dropped rows of it."""
        self._lake, self._begin_ms, self._end_ms, self._slice_rows = lake, begin_ms, end_ms, slice_rows
        self._positions: Positions | None = None
        self._table = lake.opened(version)
        self.version = int(self._table.version())
        self.extent_ms = _extent(self._table)
        """Event time of the version's first and last sample, None where the log does not say."""
        newest = lake.open()
        if not self._files_are_there(newest):
            self._go_by_positions(newest)
        self._schema = dataset_of(self._table, []).schema

    @property
    def schema(self) -> pa.Schema:
        """The version's columns."""
        return self._schema

    def slices(self) -> list[Slice]:
        """Return the slices that have rows, in order of event time."""
        found: list[Slice] = []
        held: list[tuple[int, int, tuple[Any, ...]]] = []
        for hour, rows, fragments in self._hours():
            if held and sum(each[1] for each in held) + rows > self._slice_rows:
                found.append(self._joined(held))
                held = []
            if rows > self._slice_rows:
                found += self._cut(hour, fragments)
            else:
                held.append((hour, rows, fragments))
        return [*found, self._joined(held)] if held else found

    def read(self, one: Slice, columns: Iterable[str], tasks: Sequence[str]) -> pa.Table:
        """Return a slice's samples of these tasks, in any order, with those of the columns that the lake has.

        Raises `Unavailable`, and `InvariantBroken` where a file is damaged.
        """
        have = set(self.schema.names)
        wanted = [name for name in columns if name in have]
        extra = [name for name in _POSITION if self._positions is not None and name not in wanted]
        only = self._within(one.begin_ms, one.end_ms) & ds.field("task").isin(list(tasks))
        rows = pa.Table.from_batches(*self._scan(one.fragments, [*wanted, *extra], only))
        if self._positions is None:
            return rows
        return rows.filter(pa.array(contained(rows, self._positions))).select(wanted)

    def _files_are_there(self, newest: Any) -> bool:
        mine, now = self._paths(self._table), set(files(newest)["path"].to_pylist())
        if not (doubtful := [path for path in mine if path not in now]):
            return True
        store = local_store(self._table) or store_of(self._table)
        return all(info.is_file for info in store.get_file_info(doubtful))

    def _go_by_positions(self, newest: Any) -> None:
        mine, now = self._lake.state(self.version), self._lake.state()
        if mine is None or now is None:
            raise Unavailable(f"there is no lake at {self._lake.uri} any more.")
        dropped_ms = now.retained_before_ms
        if (
            dropped_ms > mine.retained_before_ms
            and self.extent_ms
            and max(self.extent_ms[0], self._begin_ms) < min(dropped_ms, self._end_ms, self.extent_ms[1] + 1)
        ):
            raise InvariantBroken(
                f"retention has dropped rows of version {self.version} of the lake, and vacuum its files. Begin the "
                f"export at {iso(dropped_ms)} or later, or keep lake.retention_ms longer."
            )
        self._table, self._positions = newest, mine.positions

    def _paths(self, table: Any) -> list[str]:
        """Return the files that may have rows of the range."""
        listed = files(table)
        if not partition_columns(table):
            return list(listed["path"].to_pylist())
        begins_N = self._hours_of(listed)
        is_in_N = (begins_N < self._end_ms) & (begins_N + HOUR_MS > self._begin_ms)
        return list(listed["path"].filter(pa.array(is_in_N)).to_pylist())

    @staticmethod
    def _hours_of(listed: pa.Table) -> npt.NDArray[np.int64]:
        """Return when the hour of each file begins, Unix milliseconds."""
        days, hours = listed[f"partition.{DATE}"].to_pylist(), listed[f"partition.{HOUR}"].to_pylist()
        return np.array([hour_ms(day, hour) for day, hour in zip(days, hours, strict=True)], np.int64)

    def _hours(self) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """Yield the hours of the range: when each begins, about how many rows it has, and its files."""
        listed = files(self._table)
        fragments = fragments_by_path(self._table)
        if not partition_columns(self._table):
            yield from self._hours_by_reading(tuple(fragments.values()))
            return
        begins_N = self._hours_of(listed)
        rows_N = pc.fill_null(listed["num_records"], self._slice_rows + 1).to_numpy()
        paths = listed["path"].to_pylist()
        for begin in np.unique(begins_N):
            if begin < self._end_ms and begin + HOUR_MS > self._begin_ms:
                at = np.flatnonzero(begins_N == begin)
                yield (
                    int(begin),
                    int(rows_N[at].sum()),
                    tuple(fragments[paths[i]] for i in sorted(at, key=paths.__getitem__)),
                )

    def _hours_by_reading(self, fragments: tuple[Any, ...]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """Yield the hours of a table that is not partitioned by them."""
        counted: dict[int, int] = {}
        for batch in self._scan(fragments, ["event_time_ms"], self._within(self._begin_ms, self._end_ms))[0]:
            hours, rows = np.unique(batch["event_time_ms"].to_numpy() // HOUR_MS, return_counts=True)
            for hour, count in zip(hours.tolist(), rows.tolist(), strict=True):
                counted[hour] = counted.get(hour, 0) + count
        for hour, count in sorted(counted.items()):
            yield hour * HOUR_MS, count, fragments

    def _joined(self, held: Sequence[tuple[int, int, tuple[Any, ...]]]) -> Slice:
        begin_ms, end_ms = max(held[0][0], self._begin_ms), min(held[-1][0] + HOUR_MS, self._end_ms)
        unique = {fragment.path: fragment for _, _, fragments in held for fragment in fragments}
        return Slice(begin_ms, end_ms, sum(rows for _, rows, _ in held), tuple(unique.values()))

    def _cut(self, hour: int, fragments: tuple[Any, ...]) -> Iterator[Slice]:
        """Yield the slices of an hour that is larger than one."""
        begin_ms, end_ms = max(hour, self._begin_ms), min(hour + HOUR_MS, self._end_ms)
        rows_T = np.zeros(end_ms - begin_ms, np.int64)
        for batch in self._scan(fragments, ["event_time_ms"], self._within(begin_ms, end_ms))[0]:
            rows_T += np.bincount(batch["event_time_ms"].to_numpy() - begin_ms, minlength=len(rows_T))
        upto_T = np.cumsum(rows_T)
        start = done = 0
        while done < upto_T[-1]:
            stop = max(start + 1, int(np.searchsorted(upto_T, done + self._slice_rows, side="right")))
            count = int(upto_T[stop - 1]) - done
            if count:
                yield Slice(begin_ms + start, begin_ms + stop, count, fragments)
            start, done = stop, done + count

    @staticmethod
    def _within(begin_ms: int, end_ms: int) -> ds.Expression:
        return (ds.field("event_time_ms") >= begin_ms) & (ds.field("event_time_ms") < end_ms)

    def _scan(
        self, fragments: Sequence[Any], columns: Sequence[str], only: ds.Expression
    ) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
        """Return the rows of these files, batch by batch, few ahead of the reader; each says `moved`."""
        data = dataset_of(self._table, fragments)
        scanner = data.scanner(
            columns=list(columns), filter=only, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=2
        )
        return self._told(scanner), scanner.projected_schema

    def _told(self, scanner: Any) -> Iterator[pa.RecordBatch]:
        try:
            for batch in scanner.to_batches():
                moved()
                yield batch
        except pa.ArrowInvalid as error:
            raise InvariantBroken(f"the lake at {self._lake.uri} has a damaged file: {error}") from error
        except (DeltaError, OSError) as error:
            raise Unavailable(f"the lake at {self._lake.uri} can't be read: {error}") from error


def _extent(table: Any) -> tuple[int, int] | None:
    """Return the first and the last event time of the table's rows, as its log has them."""
    listed = files(table)
    if "min.event_time_ms" not in listed.column_names:
        return None
    first, last = pc.min(listed["min.event_time_ms"]).as_py(), pc.max(listed["max.event_time_ms"]).as_py()
    return None if first is None or last is None else (first, last)


def iso(time_ms: int) -> str:
    """Return a time as ISO 8601 in UTC.

    >>> iso(0), iso(1_500)
    ('1970-01-01T00:00:00Z', '1970-01-01T00:00:01.500Z')
    """
    spec = "milliseconds" if time_ms % 1_000 else "seconds"
    return datetime.fromtimestamp(time_ms / 1_000, UTC).isoformat(timespec=spec).replace("+00:00", "Z")
