"""Which keys get a row: those that were seen often enough. Counts depend on the order of keys alone, not on batches.

A key is held back until its n-th sighting; from that one on it has a row. `exact` counts in a table of its own, 16
bytes and its index a waiting key, without an error; keys that are not seen for the tables' expiry time are forgotten.
`sketch` counts in 4 MiB whatever comes: four rows of 2^20 counters of a byte, conservatively updated, all halved after
every 2^18 counted sightings. With N sightings since, the estimate is too high by more than e N / 2^20 <= 0.68, that is
by 1 or more, with a probability of at most e^-4 = 2 %: then a key comes in early. It is too low only by halving: a key
whose n sightings lie more than 2^18 counted ones apart comes in late. Keys that have a row are not counted.

Source: Cormode, Muthukrishnan, "An Improved Data Stream Summary: the Count-Min Sketch", 2005; conservative update:
Estan, Varghese, SIGCOMM 2002; halving: Einziger et al., TinyLFU, 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.kernels.hashes import mix
from headrace.trainer.model.tables.columns import NO_ROWS, AllStoredRows, Column, Columns, State, below
from headrace.trainer.model.tables.row_index import HEADER_WORDS, LAST_USE, Int32s, Int64s, RowIndex, Uint8s

Bools = npt.NDArray[np.bool_]

_WIDTH_BITS, _DEPTH = 20, 4
_AGE_AFTER = 1 << (_WIDTH_BITS - 2)
_COUNT = HEADER_WORDS
_COLUMNS, _WAITING = Columns((Column("seen", np.int32, 0),)), "waiting."


@dataclass(frozen=True)
class Admission:
    """A key gets a row at its `after`-th sighting."""

    after: int = 1
    by: Literal["exact", "sketch"] = "exact"

    def __post_init__(self) -> None:
        if not 1 <= self.after <= 255:
            raise ConfigRejected(f"admit_after is {self.after}; it must lie in 1..255 sightings.")
        if self.by not in ("exact", "sketch"):
            raise ConfigRejected(f"admit_by is {self.by!r}; it is exact or sketch.")


@numba.njit(cache=True)
def _count_exactly(
    words_RW: Int32s, rows_K: Int64s, fresh_K: Int64s, now_s: int, oldest: int, after: int, admitted_K: Bools
) -> None:
    for i in range(fresh_K.shape[0]):
        words_RW[fresh_K[i], _COUNT] = 0
    for i in range(rows_K.shape[0]):
        row = rows_K[i]
        if np.int64(np.uint32(words_RW[row, LAST_USE])) < oldest:
            words_RW[row, _COUNT] = 0
        words_RW[row, _COUNT] += 1
        words_RW[row, LAST_USE] = np.int32(np.uint32(now_s))
        admitted_K[i] = words_RW[row, _COUNT] >= after


@numba.njit(cache=True)
def _count_in_sketch(cells: Uint8s, keys_K: Int64s, counted: int, after: int, admitted_K: Bools) -> int:
    """Count sightings in order, ageing all counters in time; returns how many since the last ageing."""
    columns = np.empty(_DEPTH, np.int64)
    for i in range(keys_K.shape[0]):
        mixed = mix(np.uint64(keys_K[i]))
        # Two halves of one hash give the column in each row. Source: Kirsch, Mitzenmacher, ESA 2006.
        low, step = mixed & np.uint64(0xFFFFFFFF), (mixed >> np.uint64(32)) | np.uint64(1)
        least = np.int64(255)
        for row in range(_DEPTH):
            columns[row] = np.int64((low + np.uint64(row) * step) & np.uint64((1 << _WIDTH_BITS) - 1))
            least = min(least, np.int64(cells[row, columns[row]]))
        if least < after:
            for row in range(_DEPTH):
                if cells[row, columns[row]] == least:
                    cells[row, columns[row]] = np.uint8(least + 1)
            least += 1
            counted += 1
        admitted_K[i] = least >= after
        if counted == _AGE_AFTER:
            counted = 0
            for row in range(_DEPTH):
                for column in range(cells.shape[1]):
                    cells[row, column] >>= np.uint8(1)
    return counted


class Everyone:
    """Admits at the first sighting."""

    nbytes = 0

    def admit(self, keys_K: Int64s, *, now_s: int, oldest: int) -> Bools:
        """Say of each sighting of a key without a row, in order, whether the key has been seen often enough.

        What was last seen before `oldest` begins to count anew.
        """
        return np.ones(len(keys_K), np.bool_)

    def sweep(self, part: int, *, oldest: int) -> None:
        """Forget what was last seen before `oldest` in this part; see `RowIndex.sweep`."""

    def rest(self) -> State:
        """Return a copy of all counts that no index holds."""
        return {}

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """Return the indexes that hold counts, by what their columns' names begin with."""
        return {}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """Replace all counts by those of a state; `rows` as `Table.load`."""


class Exact:
    """Counts waiting keys one by one."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.waiting = RowIndex(words=1)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.waiting.nbytes

    def admit(self, keys_K: Int64s, *, now_s: int, oldest: int) -> Bools:
        """See `Everyone.admit`."""
        rows_K, fresh_K = self.waiting.insert(keys_K)
        admitted_K = np.empty(len(keys_K), np.bool_)
        self.waiting.changing(rows_K)
        _count_exactly(self.waiting.arrays.words_RW, rows_K, fresh_K, now_s, oldest, self.after, admitted_K)
        self.waiting.remove(keys_K[admitted_K])
        return admitted_K

    def sweep(self, part: int, *, oldest: int) -> None:
        """See `Everyone.sweep`."""
        self.waiting.sweep(part, oldest=oldest)

    def rest(self) -> State:
        """See `Everyone.rest`."""
        return {}

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """See `Everyone.indexes`."""
        return {_WAITING: (self.waiting, _COLUMNS)}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """See `Everyone.load`."""
        self.waiting = RowIndex(words=1)
        if _WAITING in rows:
            _COLUMNS.load_pieces(self.waiting, rows[_WAITING])
        else:
            _COLUMNS.load(self.waiting, below(_WAITING, state))


class Sketch:
    """Estimates counts in 4 MiB."""

    def __init__(self, after: int) -> None:
        self.after, self.counted = after, 0
        self.cells: Uint8s = np.zeros((_DEPTH, 1 << _WIDTH_BITS), np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.cells.nbytes

    def admit(self, keys_K: Int64s, *, now_s: int, oldest: int) -> Bools:
        """See `Everyone.admit`."""
        admitted_K = np.empty(len(keys_K), np.bool_)
        self.counted = int(_count_in_sketch(self.cells, keys_K, self.counted, self.after, admitted_K))
        return admitted_K

    def sweep(self, part: int, *, oldest: int) -> None:
        """Do nothing: the sketch forgets by halving."""

    def rest(self) -> State:
        """See `Everyone.rest`."""
        return {"sketch.cells": self.cells.copy(), "sketch.counted": np.array([self.counted], np.int64)}

    def indexes(self) -> dict[str, tuple[RowIndex, Columns]]:
        """See `Everyone.indexes`."""
        return {}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]], rows: AllStoredRows = NO_ROWS) -> None:
        """See `Everyone.load`."""
        self.cells = np.array(state["sketch.cells"], np.uint8)
        self.counted = int(state["sketch.counted"][0])


def counter_for(admission: Admission) -> Everyone | Exact | Sketch:
    """Return what counts sightings as `admission` says."""
    if admission.after == 1:
        return Everyone()
    return Exact(admission.after) if admission.by == "exact" else Sketch(admission.after)
