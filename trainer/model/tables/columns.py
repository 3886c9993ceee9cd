"""The columns of a record: what a state and a checkpoint call the words of a row.

Axes: K rows, R rows of an index, W words of a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from headrace.contract.spec import PAD
from headrace.trainer.model.tables.row_index import HEADER_WORDS, LAST_USE, Int32s, Int64s, RowIndex

State = dict[str, npt.NDArray[np.generic]]
V = TypeVar("V")
KEYS, LAST_S = "keys", "last_s"


class StoredRows(NamedTuple):
    """The rows of one index as they were stored, for an index that takes them piece by piece."""

    high: int
    """Rows, free ones among them."""
    pieces: Iterator[tuple[slice | Int64s, State]]
    """Where rows lie, and their columns; what comes later lies over what came before. It can be read once."""


AllStoredRows = Mapping[str, StoredRows]
"""By what the names of their columns begin with."""
NO_ROWS: AllStoredRows = {}


class Column(NamedTuple):
    """Words of a record that its owner asked for."""

    name: str
    dtype: type[np.generic]
    """Of 4 bytes."""
    width: int
    """How many; 0 is one word and no axis."""


class Columns(NamedTuple):
    """The columns of an index's records: `keys` (int64 [K]), `last_s` (uint32 [K]), then its owner's, in order."""

    own: tuple[Column, ...]

    def of(self, words_KW: Int32s) -> State:
        """Return records as columns. Rows that are free have the key `PAD` and are 0 otherwise."""
        words_KW = np.ascontiguousarray(words_KW)
        keys_K = words_KW.view(np.int64)[:, 0].copy()
        out: State = {KEYS: keys_K, LAST_S: words_KW[:, LAST_USE].view(np.uint32).copy()}
        first = HEADER_WORDS
        for name, dtype, width in self.own:
            column = words_KW[:, first : first + max(width, 1)].view(dtype)
            # A copy in any case: a single row is contiguous where it lies.
            out[name] = (column if width else column[:, 0]).copy()
            first += max(width, 1)
        free_K = np.flatnonzero(keys_K == PAD)
        for name, column in out.items():
            if name != KEYS and len(free_K):
                column[free_K] = 0
        return out

    def load_pieces(self, index: RowIndex, rows: StoredRows) -> None:
        """Give an empty index stored rows, each at its place, with no second copy of them all."""
        index.begin(rows.high)
        words_RW, keys_R = index.arrays.words_RW, index.arrays.keys_RX[:, 0]
        for where, columns in rows.pieces:
            keys_R[where] = columns[KEYS].astype(np.int64, copy=False)
            words_RW[where, LAST_USE] = columns[LAST_S].astype(np.uint32, copy=False).view(np.int32)
            first = HEADER_WORDS
            for name, dtype, width in self.own:
                column = np.ascontiguousarray(columns[name], dtype).reshape(-1, max(width, 1))
                words_RW[where, first : first + max(width, 1)] = column.view(np.int32)
                first += max(width, 1)
        index.number()

    def load(self, index: RowIndex, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Give an empty index the rows of `of`, each at its place."""
        keys_R = state[KEYS].astype(np.int64)
        index.place(keys_R)
        live_R, words_RW = keys_R != PAD, index.arrays.words_RW[: len(keys_R)]
        words_RW[live_R, LAST_USE] = state[LAST_S][live_R].astype(np.uint32).view(np.int32)
        first = HEADER_WORDS
        for name, dtype, width in self.own:
            column = words_RW[:, first : first + max(width, 1)].view(dtype)
            column[:] = state[name].reshape(len(keys_R), max(width, 1))
            first += max(width, 1)


def live(rows: State) -> State:
    """Return the columns without the rows that are free."""
    live_K = rows[KEYS] != PAD
    return rows if live_K.all() else {name: column[live_K] for name, column in rows.items()}


def below(prefix: str, named: Mapping[str, V]) -> dict[str, V]:
    """Return what has a name that begins so, by the rest of its name."""
    return {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
