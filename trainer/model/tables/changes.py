"""Which rows of an index change, and what they held before: so that a table is copied while it goes on learning.

Who is about to change rows says so first (`RowIndex.changing`). Of each row the first change since the last `freeze`
counts: the row is noted, and while a view is open its record is saved as it was. A view is read by another thread, page
by page: it copies the records as they lie, torn ones too, and then puts those that were saved over the copy. So:

1. *freeze* costs nothing that grows with the table. It is called between two steps, by the thread that learns.
2. A row is saved before it is changed; a copy is mended after it was made. Whatever the copy caught half changed, was
   saved before.
3. Pages that were copied are let go (`keep`): their rows need not be saved any more.

A change costs a look at one byte of the row, the first one of a row since a freeze 4 bytes, and a record while a view
is open. At most as many records are saved as the table has rows.

Axes: R rows of the index, N rows that change, M entries of a slab, K rows in question, W words of a record, P pages.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

import numba
import numpy as np

from headrace.contract.errors import InvariantBroken
from headrace.trainer.model.tables.row_index import HIGH, Int32s, Int64s, RowIndex, Uint8s, reserve

PAGE_BYTES = 16 * 1024 * 1024
"""A page is the largest power of two of rows that fits: what a copy of one takes in memory."""
_SLAB = 16_384
_GENERATIONS = 255


def page_rows_of(record_bytes: int) -> int:
    """Return how many rows a page has.

    >>> page_rows_of(56)
    262144
    """
    return 1 << max((PAGE_BYTES // record_bytes).bit_length() - 1, 0)


@dataclass
class _Slab:
    """Rows that were noted, in order, with what they held where it was saved; `count` of them so far."""

    rows_M: Int32s
    words_MW: Int32s
    count: int = 0


@numba.njit(cache=True)
def _note(
    words_RW: Int32s, rows_N: Int64s, marks_R: Uint8s, generation: int, noted_M: Int32s, noted: int,
    saved_M: Int32s, saved_MW: Int32s, saved: int, high: int, needed_P: Uint8s, page_rows: int,
) -> tuple[int, int]:  # fmt: skip
    for i in range(rows_N.shape[0]):
        row = rows_N[i]
        if row < 0 or marks_R[row] == generation:
            continue
        marks_R[row] = generation
        noted_M[noted] = row
        noted += 1
        if row < high and needed_P[row // page_rows]:
            saved_M[saved] = row
            saved_MW[saved] = words_RW[row]
            saved += 1
    return noted, saved


class Changes:
    """The changes of one index since the last `freeze`. All but the view's reading is for the thread that learns."""

    def __init__(self, index: RowIndex) -> None:
        # Not the index itself, which holds its listeners: its memory goes as soon as nobody else has it.
        self.words_RW, self._high_of = index.arrays.words_RW, index.arrays.head[HIGH:][:1]
        self.page_rows = page_rows_of(4 * index.words)
        self._marks_R, self._generation = reserve(index.rows_max), 1
        self._noted: list[_Slab] = []
        self._saved: list[_Slab] = []
        self._high = 0
        """Rows of the open view; 0 while none is open."""
        self._needed_P: Uint8s = reserve(index.rows_max // self.page_rows + 1)
        self._open: FrozenRows | None = None
        self._lock = threading.Lock()

    def note(self, rows_N: Int64s) -> None:
        """Take in that these rows are about to change, -1 for none; a row may be named twice."""
        rows_N = np.ascontiguousarray(rows_N)
        with self._lock:
            noted = self._slab(self._noted, len(rows_N), words=0)
            saved = self._slab(self._saved, len(rows_N) if self._high else 0, words=self.words_RW.shape[1])
            noted.count, saved.count = _note(
                *(self.words_RW, rows_N, self._marks_R, self._generation, noted.rows_M, noted.count),
                *(saved.rows_M, saved.words_MW, saved.count, self._high, self._needed_P, self.page_rows),
            )

    def freeze(self) -> FrozenRows:
        """Open a view of all rows as they are now, and begin to note anew. The view that was open before is closed."""
        with self._lock:
            self._generation += 1
            if self._generation > _GENERATIONS:
                # Marks are of one byte: after 255 freezes the numbers begin anew.
                self._marks_R[: int(self._high_of[0])] = 0
                self._generation = 1
            noted, self._noted, self._saved = self._noted, [], []
            self._high = int(self._high_of[0])
            self._needed_P[: self._high // self.page_rows + 1] = 1
            self._open = FrozenRows(self, self._high, [slab.rows_M[: slab.count] for slab in noted])
            return self._open

    def keep(self, pages: Collection[int]) -> None:
        """Let go of all pages of the view but these; from any thread."""
        with self._lock:
            self._needed_P[: self._high // self.page_rows + 1] = 0
            self._needed_P[list(pages)] = 1

    def let_go(self, page: int) -> None:
        """Let go of one page of the view: from any thread."""
        with self._lock:
            self._needed_P[page] = 0

    def close(self) -> None:
        """Close the view that is open; from any thread."""
        with self._lock:
            self._high, self._saved, self._open = 0, [], None

    @property
    def saved_bytes(self) -> int:
        """Bytes of records that are saved for the open view."""
        return sum(slab.words_MW.nbytes for slab in self._saved)

    def saved(self, view: FrozenRows) -> list[tuple[Int32s, Int32s]]:
        """Return the rows that were saved so far, and their records; from any thread. Raises where the view is not the
        one that is open: what it has copied is worth nothing."""
        with self._lock:
            if view is not self._open:
                raise InvariantBroken("a view of a table was read after it was closed.")
            return [(slab.rows_M[: slab.count], slab.words_MW[: slab.count]) for slab in self._saved]

    def _slab(self, slabs: list[_Slab], more: int, *, words: int) -> _Slab:
        """Return a slab that has room for so many more: what is full stays where it is."""
        if slabs and len(slabs[-1].rows_M) - slabs[-1].count >= more:
            return slabs[-1]
        if not more:
            return _Slab(np.empty(0, np.int32), np.empty((0, words), np.int32))
        size = max(more, _SLAB)
        slabs.append(_Slab(np.empty(size, np.int32), np.empty((size, words), np.int32)))
        return slabs[-1]


class FrozenRows:
    """All rows of an index as they were at a `freeze`, until it is closed. For one thread, another than the learner's.

    A record of a free row has the key `PAD`; its other words mean nothing.
    """

    def __init__(self, changes: Changes, high: int, noted: list[Int32s]) -> None:
        self._changes, self.high, self._noted = changes, high, noted
        self.page_rows = changes.page_rows

    @property
    def pages(self) -> int:
        """How many pages there are; the last one may be shorter."""
        return -(-self.high // self.page_rows)

    def changed(self) -> Int64s:
        """Return the rows that changed between the freeze before and this one, ascending, each once."""
        return np.unique(np.concatenate([np.empty(0, np.int32), *self._noted])).astype(np.int64)

    def page(self, page: int) -> Int32s:
        """Return a copy of a page's records: int32 [K, W]."""
        first = page * self.page_rows
        last = min(first + self.page_rows, self.high)
        words_KW = self._changes.words_RW[first:last].copy()
        for rows_M, saved_MW in self._changes.saved(self):
            here_M = np.flatnonzero((rows_M >= first) & (rows_M < last))
            words_KW[rows_M[here_M] - first] = saved_MW[here_M]
        return words_KW

    def take(self, rows_K: Int64s) -> Int32s:
        """Return a copy of the records of rows that ascend: int32 [K, W]."""
        words_KW = self._changes.words_RW[rows_K]
        for rows_M, saved_MW in self._changes.saved(self):
            at_M = np.searchsorted(rows_K, rows_M)
            here_M = np.flatnonzero((at_M < len(rows_K)) & (rows_K[np.minimum(at_M, len(rows_K) - 1)] == rows_M))
            words_KW[at_M[here_M]] = saved_MW[here_M]
        return words_KW

    def keep(self, pages: Collection[int]) -> None:
        """Say that only these pages will still be read."""
        self._changes.keep(pages)

    def let_go(self, page: int) -> None:
        """Say that this page will not be read any more."""
        self._changes.let_go(page)
