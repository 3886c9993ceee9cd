"""Files of the archive: which there are, how they are written, and records out of them a few at a time.

A file has records of one partition and one hour of the broker's time, by offset. Its groups of rows are cut by bytes,
for a record may have one byte or 32 MiB, and a reader holds one group of a file. Where the broker's clock went back,
the offsets of two hours interleave: files are read side by side then.
"""

from __future__ import annotations

import heapq
import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake.transaction import AddAction
from pyarrow import parquet
from pyarrow.fs import FileSystem, SubTreeFileSystem

from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, local_store, store_of
from headrace.backends.lake.listing import files
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.archive import Offsets
from headrace.contract.interfaces.log import VerbatimRecord, header_texts
from headrace.process.moved import moved

PLACES = ("generation", "partition", DATE, HOUR)
"""By what the table is partitioned; date and hour are of the broker's time, in UTC."""
HEADERS = pa.list_(pa.struct([pa.field("name", pa.string(), nullable=False), pa.field("value", pa.binary())]))
ROWS = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("timestamp_ms", pa.int64(), nullable=False),
        pa.field("timestamp_kind", pa.int8(), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("headers", HEADERS, nullable=False),
    ]
)
"""Columns of a file."""
TABLE = pa.schema(
    [
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field(DATE, pa.date32(), nullable=False),
        pa.field(HOUR, pa.int32(), nullable=False),
        *ROWS,
    ]
)
WRITTEN: dict[str, Any] = {
    "compression": "zstd",
    # Values differ from one another: a dictionary of them would only cost time.
    "use_dictionary": ["headers.list.element.name"],
    "column_encoding": {"offset": "DELTA_BINARY_PACKED", "timestamp_ms": "DELTA_BINARY_PACKED"},
}
"""How a file is written."""
GROUP_BYTES, GROUP_ROWS = 4 * 1024 * 1024, 16_384
"""Where a group of rows ends, before compression."""
LAST_HOUR = 253_402_300_799_000 // HOUR_MS
"""Of the year 9999: a writer's own time may be any number, and a date has four digits."""


class Place(NamedTuple):
    """Whose records a file has."""

    generation: int
    partition: int
    hour: int
    """Hours since 1970."""

    @property
    def values(self) -> dict[str, str | None]:
        """The place as Delta's log says it."""
        day = np.datetime64(self.hour // 24, "D")
        texts = (str(self.generation), str(self.partition), str(day), str(self.hour % 24))
        return dict(zip(PLACES, texts, strict=True))

    @property
    def folder(self) -> str:
        """The place as a path within the table."""
        return "".join(f"{name}={value}/" for name, value in self.values.items())


class ArchiveFile(NamedTuple):
    """One file, as Delta's log says."""

    place: Place
    path: str
    size: int
    rows: int
    first: int
    last: int
    """Lowest and highest offset."""
    last_ms: int
    """Newest time of a record."""
    written_ms: int


def listed(table: Any) -> list[ArchiveFile]:
    """Return the files of an open table, by partition and first offset."""
    found = files(table)
    days = found[f"partition.{DATE}"].cast(pa.int32()).to_pylist()
    hours = (day * 24 + hour for day, hour in zip(days, found[f"partition.{HOUR}"].to_pylist(), strict=True))
    who = (found[f"partition.{name}"].to_pylist() for name in ("generation", "partition"))
    places = itertools.starmap(Place, zip(*who, hours, strict=True))
    names = ("path", "size_bytes", "num_records", "min.offset", "max.offset", "max.timestamp_ms", "modification_time")
    columns = (found[name].to_pylist() for name in names)
    made = (ArchiveFile(*row) for row in zip(places, *columns, strict=True))
    return sorted(made, key=lambda file: (file.place.generation, file.place.partition, file.first))


def store_at(table: Any) -> FileSystem:
    """Return the file system below an open table."""
    return local_store(table) or store_of(table)


def hour_of(time_ms: int) -> int:
    """Return the hour since 1970 that a record's time lies in; the first or the last for a time that is none."""
    return min(max(time_ms // HOUR_MS, 0), LAST_HOUR)


def to_rows(records: Sequence[VerbatimRecord]) -> pa.Table:
    """Return records as rows, as they come."""
    ends = np.cumsum([0, *(len(record.raw_headers) for record in records)], dtype=np.int32)
    raw = [header for record in records for header in record.raw_headers]
    headers = pa.StructArray.from_arrays(
        [pa.array([name for name, _ in raw], pa.string()), pa.array([value for _, value in raw], pa.binary())],
        fields=list(HEADERS.value_type),
    )
    columns = [
        pa.array([record.offset for record in records], pa.int64()),
        pa.array([record.timestamp_ms for record in records], pa.int64()),
        pa.array([record.time_kind for record in records], pa.int8()),
        pa.array([record.key for record in records], pa.binary()),
        pa.array([record.value for record in records], pa.binary()),
        pa.ListArray.from_arrays(ends, headers, type=HEADERS),
    ]
    return pa.Table.from_arrays(columns, schema=ROWS)


def write_file(store: FileSystem, place: Place, parts: Iterable[pa.Table], *, data_change: bool) -> AddAction:
    """Write one file of a place's rows, which come in order; nobody sees it before a commit names it."""
    if isinstance(store, SubTreeFileSystem):
        store.create_dir(place.folder)
    path = f"{place.folder}part-00000-{uuid.uuid4()}-c000.zstd.parquet"
    bounds = _Bounds()
    with store.open_output_stream(path) as stream:
        with parquet.ParquetWriter(stream, ROWS, **WRITTEN) as writer:
            for part in parts:
                bounds.take(part)
                for group in _groups(part):
                    writer.write_table(group, row_group_size=group.num_rows)
                    moved()
        size = stream.tell()
    now_ms = time.time_ns() // 1_000_000
    return AddAction(path, size, place.values, now_ms, data_change, bounds.said())


def records_of(
    store: FileSystem, found: Sequence[ArchiveFile], topic: str, offsets: Offsets
) -> Iterator[VerbatimRecord]:
    """Yield the records of one partition's files at these offsets, in order.

    Args:
        found: the partition's, by first offset.

    Raises `InvariantBroken` where an offset is there twice or a file is damaged, and what the store raises.
    """
    waiting = [file for file in found if file.last >= offsets.begin and file.first < offsets.end]
    numbers, at = itertools.count(), 0
    heap: list[tuple[int, int, VerbatimRecord, Iterator[VerbatimRecord]]] = []
    before = -1
    while heap or at < len(waiting):
        while at < len(waiting) and (not heap or waiting[at].first <= heap[0][0]):
            _push(heap, next(numbers), _in_file(store, waiting[at], topic, offsets))
            at += 1
        if not heap:
            continue
        offset, _, record, more = heapq.heappop(heap)
        if offset == before:
            raise InvariantBroken(f"the archive has offset {offset} of {topic}/{record.partition} twice.")
        before = offset
        yield record
        _push(heap, next(numbers), more)


def rows_of(store: FileSystem, found: Sequence[ArchiveFile]) -> Iterator[pa.Table]:
    """Yield the rows of files, by offset: a group at a time, or all at once where files interleave."""
    if any(one.last >= after.first for one, after in itertools.pairwise(found)):
        parts = [part for file in found for part in _groups_in(store, file, 0)]
        yield pa.concat_tables(parts).sort_by("offset")
        return
    for file in found:
        yield from _groups_in(store, file, 0)


class _Bounds:
    """What Delta's log says of a file's rows."""

    def __init__(self) -> None:
        self._rows = 0
        self._least: dict[str, int] = {}
        self._most: dict[str, int] = {}

    def take(self, rows: pa.Table) -> None:
        self._rows += rows.num_rows
        for name in ("offset", "timestamp_ms"):
            column_N = rows[name].to_numpy()
            least, most = int(column_N.min()), int(column_N.max())
            self._least[name] = min(self._least.get(name, least), least)
            self._most[name] = max(self._most.get(name, most), most)

    def said(self) -> str:
        told = {"numRecords": self._rows, "minValues": self._least, "maxValues": self._most}
        return msgspec.json.encode(told | {"nullCount": dict.fromkeys(self._least, 0)}).decode()


def _push(heap: list[Any], number: int, records: Iterator[VerbatimRecord]) -> None:
    record = next(records, None)
    if record is not None:
        heapq.heappush(heap, (record.offset, number, record, records))


def _in_file(store: FileSystem, file: ArchiveFile, topic: str, offsets: Offsets) -> Iterator[VerbatimRecord]:
    for rows in _groups_in(store, file, offsets.begin):
        columns = [rows[name].to_pylist() for name in ROWS.names]
        for offset, time_ms, kind, key, value, headers in zip(*columns, strict=True):
            if offset >= offsets.end:
                return
            if offset >= offsets.begin:
                raw = tuple((header["name"], header["value"]) for header in headers)
                yield VerbatimRecord(
                    topic, file.place.partition, offset, key, value, header_texts(raw), time_ms, kind, raw
                )


def _groups_in(store: FileSystem, file: ArchiveFile, begin: int) -> Iterator[pa.Table]:
    """Yield a file's groups of rows that have offsets from `begin` on."""
    with store.open_input_file(file.path) as stream:
        try:
            opened = parquet.ParquetFile(stream)
            for group in range(opened.num_row_groups):
                # The first column is the offset.
                bounds = opened.metadata.row_group(group).column(0).statistics
                if bounds is None or not bounds.has_min_max or bounds.max >= begin:
                    yield opened.read_row_group(group, use_threads=False)
                    moved()
        except pa.ArrowInvalid as error:
            raise InvariantBroken(f"the archive has a damaged file, {file.path}: {error}") from error


def _groups(rows: pa.Table) -> Iterator[pa.Table]:
    """Cut rows where a group has enough bytes."""
    sizes_N: npt.NDArray[np.int64] = np.zeros(rows.num_rows, np.int64)
    for name in ("key", "value"):
        lengths = pa.compute.fill_null(pa.compute.binary_length(rows[name]), 0)
        sizes_N += lengths.to_numpy()
    ends_N = np.cumsum(sizes_N)
    begin = 0
    while begin < rows.num_rows:
        before = int(ends_N[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends_N, before + GROUP_BYTES, side="right"))
        end = min(max(end, begin + 1), begin + GROUP_ROWS, rows.num_rows)
        yield rows.slice(begin, end - begin)
        begin = end
