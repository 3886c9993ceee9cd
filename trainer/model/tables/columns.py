"""The columns of a record: what a state and a checkpoint call the words of a row.

Axes: K rows, R rows of an index, W words of a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.contract.spec import PAD
from headrace.trainer.model.tables.row_index import HEADER_WORDS, LAST_USE, Int32s, RowIndex

State = dict[str, npt.NDArray[np.generic]]
KEYS, LAST_S = "keys", "last_s"


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
