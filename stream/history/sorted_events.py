"""A history's events on disk, read back in the order of their times, in bounded memory.

1. Events of a type are gathered, put in order of time, cut by hours, and appended to one file, hour by hour.
2. Where each piece lies is kept, and stored beside the file when all is there: the whole can be used again.
3. An hour is read at once where it has few rows, else by parts of it that have.

Order: event time, then type (impressions first, then feedback as declared), then the order in which rows came.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import Unavailable, disk_remedy
from headrace.contract.formats.events import decode_batch, encode_batch

HOUR_MS = 3_600_000
GATHERED_ROWS = 262_144
"""Rows of a type that are put in order together."""
SPAN_ROWS = 524_288
"""Most rows that are read at a time; more only where a second has more."""
SECOND_MS = 1_000
SEQ = "_seq"
"""A column of ours: the order in which rows came."""

Int64s = npt.NDArray[np.int64]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one type and hour, in order."""

    kind: int
    hour: int
    begin: int
    length: int
    rows: int


@dataclass(frozen=True)
class Span:
    """Events of some time, in order: row `row_N[i]` of `batches[kind_N[i]]` is the i-th."""

    batches: Sequence[pa.RecordBatch]
    kind_N: npt.NDArray[np.int8]
    row_N: Int64s
    time_N: Int64s
    end_ms: int
    """No later span has a time before it."""


class SortedEvents:
    """The events of one import; kinds are numbered, impressions are 0."""

    def __init__(self, folder: Path, schemas: Sequence[pa.Schema]) -> None:
        self._folder = folder
        self._schemas = [schema.append(pa.field(SEQ, pa.int64(), nullable=False)) for schema in schemas]
        self._gathered: list[list[pa.RecordBatch]] = [[] for _ in schemas]
        self._pieces: list[Piece] = []
        self._end = 0
        self.rows = 0
        self._file: Any = None

    def add(self, kind: int, batch: pa.RecordBatch) -> None:
        """Take rows of a kind. Raises `Unavailable` where the disk refuses."""
        seq_N = np.arange(self.rows, self.rows + batch.num_rows, dtype=np.int64)
        self.rows += batch.num_rows
        numbered = pa.RecordBatch.from_arrays([*batch.columns, pa.array(seq_N)], schema=self._schemas[kind])
        self._gathered[kind].append(numbered)
        if sum(b.num_rows for b in self._gathered[kind]) >= GATHERED_ROWS:
            self._flush(kind)

    def close(self, told: dict[str, Any]) -> None:
        """Have all on the disk, with what the caller tells of it. Raises `Unavailable`."""
        for kind in range(len(self._gathered)):
            self._flush(kind)
        index = {"pieces": self._pieces, "rows": self.rows, "told": told}
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._file = None
            making = self._folder / "index.making"
            with making.open("wb") as file:
                file.write(msgspec.msgpack.encode(index))
                file.flush()
                os.fsync(file.fileno())
            making.replace(self._folder / "index")
        except OSError as error:
            raise self._full(error) from error

    def load(self) -> dict[str, Any] | None:
        """Take over what `close` left, and return what was told; None where nothing whole is there."""
        try:
            index = msgspec.msgpack.decode((self._folder / "index").read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        self._pieces, self.rows = [Piece(*piece) for piece in index["pieces"]], index["rows"]
        told: dict[str, Any] = index["told"]
        return told

    def spans(self) -> Iterator[Span]:
        """Yield all events in order."""
        if not self._pieces:
            return
        with (self._folder / "events").open("rb") as file:
            for hour in sorted({piece.hour for piece in self._pieces}):
                ours = [piece for piece in self._pieces if piece.hour == hour]
                for begin_ms, end_ms in self._cuts(file, hour, ours):
                    yield self._read(file, ours, begin_ms, end_ms)

    def _cuts(self, file: Any, hour: int, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Return times, in order, that have all of an hour's rows, `SPAN_ROWS` at most where that can be."""
        begin_ms = hour * HOUR_MS
        if sum(piece.rows for piece in pieces) <= SPAN_ROWS:
            return [(begin_ms, begin_ms + HOUR_MS)]
        rows_S = np.zeros(HOUR_MS // SECOND_MS, np.int64)
        for piece in pieces:
            time_N = self._decode(file, piece)["event_time_ms"].to_numpy()
            rows_S += np.bincount((time_N - begin_ms) // SECOND_MS, minlength=len(rows_S))
        cuts, since, rows = [], 0, 0
        for second, more in enumerate(rows_S.tolist()):
            if rows and rows + more > SPAN_ROWS:
                cuts.append((begin_ms + since * SECOND_MS, begin_ms + second * SECOND_MS))
                since, rows = second, 0
            rows += more
        return [*cuts, (begin_ms + since * SECOND_MS, begin_ms + HOUR_MS)]

    def _read(self, file: Any, pieces: Sequence[Piece], begin_ms: int, end_ms: int) -> Span:
        found: list[list[pa.RecordBatch]] = [[] for _ in self._schemas]
        for piece in pieces:
            batch = self._decode(file, piece)
            bounds = np.searchsorted(batch["event_time_ms"].to_numpy(), [begin_ms, end_ms])
            found[piece.kind].append(batch.slice(int(bounds[0]), int(bounds[1] - bounds[0])))
        batches = [
            pa.concat_batches(some) if some else _empty(schema)
            for some, schema in zip(found, self._schemas, strict=True)
        ]
        time_N = np.concatenate([b["event_time_ms"].to_numpy() for b in batches])
        seq_N = np.concatenate([b[SEQ].to_numpy() for b in batches])
        kind_N = np.concatenate([np.full(b.num_rows, kind, np.int8) for kind, b in enumerate(batches)])
        row_N = np.concatenate([np.arange(b.num_rows) for b in batches])
        order_N = np.lexsort((seq_N, kind_N, time_N))
        plain = [b.drop_columns([SEQ]) for b in batches]
        return Span(plain, kind_N[order_N], row_N[order_N], time_N[order_N], end_ms)

    def _decode(self, file: Any, piece: Piece) -> pa.RecordBatch:
        file.seek(piece.begin)
        return decode_batch(file.read(piece.length))

    def _flush(self, kind: int) -> None:
        if not (batches := self._gathered[kind]):
            return
        self._gathered[kind] = []
        rows = pa.concat_batches(batches)
        order_N = np.argsort(rows["event_time_ms"].to_numpy(), kind="stable")
        rows = rows.take(pa.array(order_N))
        hour_N = rows["event_time_ms"].to_numpy() // HOUR_MS
        begins = np.flatnonzero(np.r_[True, hour_N[1:] != hour_N[:-1]])
        try:
            if self._file is None:
                self._file = (self._folder / "events").open("wb")
            for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(hour_N)], strict=True):
                value = encode_batch(rows.slice(begin, end - begin))
                self._file.write(value)
                self._pieces.append(Piece(kind, int(hour_N[begin]), self._end, len(value), end - begin))
                self._end += len(value)
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> Unavailable:
        return Unavailable(f"{self._folder} could not be written: {error}; {disk_remedy(error)}.")


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)
