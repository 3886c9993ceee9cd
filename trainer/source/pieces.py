"""One version of the lake in total order, piece by piece: memory follows a piece and not the lake.

Rows are ordered by what `rank_order` says. Hours of event time are put together, or cut by seconds, to spans of as many
rows as the bytes allow; where they are cut changes no row and no order.

1. By event time a piece is the rows of a span.
2. By position a partition's rows follow one another as they did in the log, and go by the newest event time up to
   there. So what is reached before a time T ends, in each partition, at the first row of T or later: one pass over the
   narrow columns finds these places for all spans. A piece is what lies between two of them, and it is looked for in
   the spans that have rows there; what a span has for later pieces stays in memory, as far as it goes. A piece that is
   too big, since wrong times lie in it, is cut by its own order.

Legend: S spans, P partitions, N rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import orders
from headrace.contract.formats.sample import conform
from headrace.contract.interfaces.lake import LakeLayout, LakeReader, StoredHour, StoredSpan
from headrace.trainer.source.batch import of_tasks
from headrace.trainer.source.columns import StoredColumns

StoredOrder = Literal["event_time", "position"]
"""`Recipe.stored_order`."""
Int64s = npt.NDArray[np.int64]
PLACE = ["partition", "offset", "rank"]
NARROW = [*PLACE, "event_time_ms", "task"]
NARROW_BYTES = 96
"""What `NARROW` and the numbers that are made of it take of a row."""
HOUR_MS = 3_600_000
SAMPLED_ROWS = 2_000
"""A row's bytes are measured on about so many."""
SHARE = 6
"""A piece takes at most so many parts of the memory: one is learnt, one is read ahead, one is being put in order."""
CHUNKS_MAX = 64
"""What is kept is put together when it lies in more pieces: each costs every look at it."""
KEPT_SHARE = 3
"""So many parts of the memory are for what spans have for later pieces."""
NONE = np.iinfo(np.int64).max
"""Beyond every position."""


def rank_order(rows: pa.Table, by: StoredOrder, reached_ms: Mapping[int, int] | None = None) -> Int64s:
    """Return the total order of rows: indexes, int64 [N].

    By `event_time`, ties by partition, offset and rank. By `position` each partition's rows follow one another as they
    did in the log, and those of several go by the newest event time among a partition's rows up to there, which is
    about when they were known.

    Args:
        reached_ms: by partition, the newest event time before these rows.
    """
    partition_N = rows["partition"].to_numpy()
    time_N = rows["event_time_ms"].to_numpy()
    order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
    if by == "event_time":
        return np.lexsort((order_N, partition_N, time_N))
    placed_N = np.lexsort((order_N, partition_N))
    partition_N, reached_N = partition_N[placed_N], time_N[placed_N].copy()
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(np.diff(partition_N)) + 1), len(partition_N)]):
        if begin < end:
            before_ms = (reached_ms or {}).get(int(partition_N[begin]), 0)
            reached_N[begin] = max(int(reached_N[begin]), before_ms)
            np.maximum.accumulate(reached_N[begin:end], out=reached_N[begin:end])
    ordered_N: Int64s = placed_N[np.argsort(reached_N, kind="stable")]
    return ordered_N


@dataclass(frozen=True)
class _Piece:
    """Where to look for rows, and which of them."""

    spans: tuple[StoredSpan, ...]
    end_ms: int
    """Where it is the last of its time: all rows of this version that are reached before `end_ms` are in it or before
    it. Else -1."""
    since_P: Int64s | None = None
    """By position: the first order of each partition."""
    before_P: Int64s | None = None
    reached_ms: Mapping[int, int] | None = None
    is_cut: bool = False


class Pieces:
    """The rows of some tasks in one version of the lake. For one thread at a time.

    A call that raises what the lake raises has done nothing: the next one does it.

    Args:
        bytes_max: about how much memory rows may take, over all copies of a piece.
        from_ms: leave out what is reached before this time, where a piece ended.
    """

    def __init__(
        self,
        lake: LakeReader,
        version: int,
        columns: StoredColumns,
        tasks: tuple[str, ...],
        order: StoredOrder,
        *,
        bytes_max: int,
        from_ms: int = 0,
    ) -> None:
        self._lake, self._version, self._columns, self._tasks, self._order = lake, version, columns, tasks, order
        self._bytes_max = bytes_max
        layout: LakeLayout = lake.layout(version)
        self.rows = sum(hour.rows for hour in layout.hours)
        """How many rows of all tasks the version has."""
        self._of_step, self._with_inputs = (
            [name for name in schema.names if name in layout.columns] for schema in (columns.step, columns.inputs)
        )
        self._read_inputs, self._readings = False, 0
        """Whether what features are made of is read at once, since the last rows needed it; and how many readings."""
        self._rows_max = max(1, bytes_max // SHARE // self._row_bytes(layout.hours)) if layout.hours else 1
        self._narrow_max = max(self._rows_max, bytes_max // SHARE // NARROW_BYTES)
        spans = _cut_at(lake.spans(version, self._rows_max), from_ms)
        self._partitions_P: Int64s = np.empty(0, np.int64)
        self._pool: pa.Table | None = None
        self._pooled: set[StoredSpan] = set()
        """What spans that were read have for later pieces, and which spans."""
        pieces = self._by_position(spans) if order == "position" else [_Piece((s,), s.span_ms[1]) for s in spans]
        self._left = [piece for piece in pieces if piece.end_ms > from_ms]

    @property
    def is_done(self) -> bool:
        """True once all pieces were read."""
        return not self._left

    def next(self) -> tuple[pa.Table, int]:
        """Return the rows of the next piece in order, none maybe, and the time up to which all is given then; -1 in the
        middle of a time. Raises what the lake raises, and `InvariantBroken` where rows are gone."""
        piece = self._left[0]
        unread = sum(max(0, span.rows) for span in piece.spans if span not in self._pooled)
        if not piece.is_cut and piece.since_P is not None and unread > self._rows_max:
            self._left[:1] = self._cut(piece)
            piece = self._left[0]
        ours, later, pooled, kept_bytes = [], [], set(self._pooled), 0
        if self._pool is not None:
            ours.append(self._between(self._pool, piece.since_P, piece.before_P))
            later.append(self._between(self._pool, piece.before_P, None))
            kept_bytes = later[0].nbytes
        for span in piece.spans:
            if span in self._pooled:
                continue
            rows = self._fetch(span)
            ours.append(self._between(rows, piece.since_P, piece.before_P))
            rest = rows.slice(0, 0) if piece.before_P is None else self._between(rows, piece.before_P, None)
            if rest.num_rows and kept_bytes + rest.nbytes <= self._bytes_max // KEPT_SHARE:
                later.append(rest if self._columns.needs_inputs(rest) else rest.select(self._of_step))
                pooled.add(span)
                kept_bytes += rest.nbytes
        ordered = self._together(ours)
        ordered = ordered.take(pa.array(rank_order(ordered, self._order, piece.reached_ms)))
        self._pool, self._pooled = _pool_of(later), pooled
        del self._left[0]
        return ordered, piece.end_ms

    def _together(self, tables: Sequence[pa.Table]) -> pa.Table:
        """Return rows of several spans as one table, with what features are made of where it was read for some."""
        is_wide = any(each.num_columns > len(self._of_step) for each in tables)
        schema = self._columns.inputs if is_wide else self._columns.step
        return conform(pa.concat_tables(tables, promote_options="default"), schema) if tables else schema.empty_table()

    def _fetch(self, span: StoredSpan) -> pa.Table:
        """Read the rows of a span with the columns that they need."""
        every = self._columns.shown_every
        is_shown = every > 0 and self._readings % every == 0
        self._readings += 1
        if not self._read_inputs and not is_shown:
            rows = self._read(span, self._of_step)
            if not self._columns.needs_inputs(rows):
                return rows
        rows = self._read(span, self._with_inputs)
        self._read_inputs = self._columns.needs_inputs(rows)
        return rows

    def _by_position(self, spans: Sequence[StoredSpan]) -> list[_Piece]:
        """Find where each partition first reaches the begin of each span."""
        if not spans:
            return []
        first_of: dict[tuple[int, int], int] = {}
        last_of: dict[tuple[int, int], int] = {}
        begins_S = np.array([span.span_ms[0] for span in spans], np.int64)
        for some in self._in_groups(spans):
            rows = self._read(some, NARROW)
            span_N = np.searchsorted(begins_S, rows["event_time_ms"].to_numpy(), "right") - 1
            for key, first, last in _extremes(span_N, rows["partition"].to_numpy(), _orders(rows)):
                first_of[key], last_of[key] = first, last
        self._partitions_P = np.array(sorted({partition for _, partition in first_of}), np.int64)
        first_SP, last_SP = (
            np.array([[of.get((s, p), none) for p in self._partitions_P.tolist()] for s in range(len(spans))], np.int64)
            for of, none in ((first_of, NONE), (last_of, -1))
        )
        # Of the spans from each on, the lowest position.
        since_SP = np.minimum.accumulate(first_SP[::-1], axis=0)[::-1]
        before_SP = np.r_[since_SP[1:], np.full((1, len(self._partitions_P)), NONE)]
        pieces = []
        for s, span in enumerate(spans):
            here_S = ((first_SP < before_SP[s]) & (last_SP >= since_SP[s])).any(axis=1)
            there = tuple(spans[i] for i in np.flatnonzero(here_S).tolist())
            pieces.append(_Piece(there, span.span_ms[1], since_SP[s], before_SP[s]))
        return pieces

    def _in_groups(self, spans: Sequence[StoredSpan]) -> Iterator[StoredSpan]:
        """Yield spans that follow one another as one, as many as their narrow columns leave room for."""
        group: list[StoredSpan] = []
        rows = 0
        for span in [*spans, None]:
            # Of a span whose rows are not known there are no more than of any.
            more = 0 if span is None else span.rows if span.rows >= 0 else self._rows_max
            if group and (span is None or rows + more > self._narrow_max):
                is_known = all(each.rows >= 0 for each in group)
                yield StoredSpan((group[0].span_ms[0], group[-1].span_ms[1]), rows if is_known else -1)
                group, rows = [], 0
            if span is not None:
                group.append(span)
                rows += more

    def _cut(self, piece: _Piece) -> list[_Piece]:
        """Cut a piece that is too big by the order of its rows: their places and times alone are read."""
        found = [] if self._pool is None else [self._pool.select(NARROW)]
        found += [self._read(span, NARROW) for span in piece.spans if span not in self._pooled]
        rows = pa.concat_tables([self._between(each, piece.since_P, piece.before_P) for each in found])
        if rows.num_rows <= self._rows_max or piece.since_P is None or piece.before_P is None:
            return [replace(piece, is_cut=True)]
        ordered_N = rank_order(rows, "position", piece.reached_ms)
        order_N, time_N = _orders(rows)[ordered_N], rows["event_time_ms"].to_numpy()[ordered_N]
        number_N = np.searchsorted(self._partitions_P, rows["partition"].to_numpy()[ordered_N])
        span_N = np.searchsorted([span.span_ms[0] for span in piece.spans], time_N, "right") - 1
        since_P, reached = piece.since_P, dict(piece.reached_ms or {})
        cut: list[_Piece] = []
        for begin in range(0, len(order_N), self._rows_max):
            here = slice(begin, begin + self._rows_max)
            is_last = begin + self._rows_max >= len(order_N)
            before_P = piece.before_P if is_last else since_P.copy()
            if not is_last:
                np.maximum.at(before_P, number_N[here], order_N[here] + 1)
            end_ms = piece.end_ms if is_last else -1
            spans = tuple(piece.spans[i] for i in np.unique(span_N[here]).tolist())
            cut.append(_Piece(spans, end_ms, since_P, before_P, dict(reached), is_cut=True))
            for number in np.unique(number_N[here]):
                partition = int(self._partitions_P[number])
                newest = int(time_N[here][number_N[here] == number].max())
                reached[partition] = max(reached.get(partition, 0), newest)
            since_P = before_P
        return cut

    def _between(self, rows: pa.Table, since_P: Int64s | None, before_P: Int64s | None) -> pa.Table:
        """Return the rows whose orders lie between those of their partitions."""
        if not rows.num_rows or (since_P is None and before_P is None):
            return rows
        order_N = _orders(rows)
        number_N = np.searchsorted(self._partitions_P, rows["partition"].to_numpy())
        here_N = np.ones(len(order_N), np.bool_) if since_P is None else order_N >= since_P[number_N]
        if before_P is not None:
            here_N &= order_N < before_P[number_N]
        return rows if here_N.all() else rows.filter(pa.array(here_N))

    def _read(self, span: StoredSpan, columns: list[str]) -> pa.Table:
        """Return the rows of our tasks in a span. Raises `InvariantBroken` where rows are gone."""
        rows = self._lake.read(self._version, columns, span_ms=span.span_ms)
        if span.rows >= 0 and rows.num_rows != span.rows:
            raise InvariantBroken(
                f"version {self._version} of the lake held {span.rows} rows of event times {span.span_ms[0]} to "
                f"{span.span_ms[1]} and {rows.num_rows} are left: retention dropped the others. Keep lake.retention_ms "
                "longer than what is to be learnt."
            )
        return of_tasks(rows, self._tasks)

    def _row_bytes(self, hours: Sequence[StoredHour]) -> int:
        """Return how many bytes a row takes, from some of the first hour and some of the last."""
        most = 1
        for hour in (hours[0], hours[-1]):
            span = self._lake.spans(self._version, SAMPLED_ROWS, within_ms=(hour.begin_ms, hour.begin_ms + HOUR_MS))[0]
            rows = self._lake.read(self._version, self._with_inputs, span_ms=span.span_ms)
            most = max(most, -(-rows.nbytes // max(1, rows.num_rows)))
        return most


def _pool_of(tables: Sequence[pa.Table]) -> pa.Table | None:
    """Return tables as one, or None where they have no rows."""
    if not any(each.num_rows for each in tables):
        return None
    pool = pa.concat_tables(tables, promote_options="default")
    return pool.combine_chunks() if pool.column(0).num_chunks > CHUNKS_MAX else pool


def _extremes(span_N: Int64s, partition_N: Int64s, order_N: Int64s) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yield each span and partition that has rows, with the least and the greatest order of them."""
    if not len(order_N):
        return
    placed_N = np.lexsort((order_N, partition_N, span_N))
    span_N, partition_N, order_N = span_N[placed_N], partition_N[placed_N], order_N[placed_N]
    is_first_N = np.r_[True, (np.diff(span_N) != 0) | (np.diff(partition_N) != 0)]
    firsts = np.flatnonzero(is_first_N)
    lasts = np.r_[firsts[1:], len(order_N)] - 1
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield (int(span_N[first]), int(partition_N[first])), int(order_N[first]), int(order_N[last])


def _orders(rows: pa.Table) -> Int64s:
    return orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())


def _cut_at(spans: Sequence[StoredSpan], at_ms: int) -> list[StoredSpan]:
    """Return the spans, one that has the time inside as two."""
    cut: list[StoredSpan] = []
    for (begin_ms, end_ms), rows in spans:
        if begin_ms < at_ms < end_ms:
            cut += [StoredSpan((begin_ms, at_ms), -1), StoredSpan((at_ms, end_ms), -1)]
        else:
            cut.append(StoredSpan((begin_ms, end_ms), rows))
    return cut
