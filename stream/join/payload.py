"""The columns of impressions while they wait, found by sequence number: pieces of Arrow batches.

Each record brings a piece. Many small ones are joined; a full one never changes again, and is spilled to disk where
memory is short. A piece goes when nothing waits for any of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from headrace.contract.formats.events import fit
from headrace.kernels.arrays import I64s

PIECE_ROWS = 32_768
"""Rows of a full piece, at least."""
PIECES_OPEN_MAX = 32
"""Pieces that are not full; one more joins them."""


class Spill(Protocol):
    """Where full pieces lie when memory is short. What is lost there can be read from the log again."""

    def put(self, name: str, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Store a batch and return it as it lies in the store, not in memory."""

    def drop(self, name: str) -> None:
        """Delete a batch."""


@dataclass(slots=True)
class Piece:
    """Rows with the sequence numbers `first` <= s < `first + batch.num_rows`; `live` (impression, task) pairs wait."""

    first: int
    batch: pa.RecordBatch
    live: int
    spilled: bool = False
    bytes: int = 0


class Payload:
    """All pieces of one partition; `memory_bytes` bounds what is not in `spill`, if there is one."""

    def __init__(self, name: str, *, spill: Spill | None = None, memory_bytes: int = 0) -> None:
        self.name, self.spill, self.memory_bytes = name, spill, memory_bytes
        self.full: list[Piece] = []
        self.open: list[Piece] = []
        self._firsts: I64s | None = None

    def __len__(self) -> int:
        """How many (impression, task) pairs wait."""
        return sum(piece.live for piece in (*self.full, *self.open))

    @property
    def bytes(self) -> int:
        """Bytes of the pieces in memory."""
        return sum(piece.bytes for piece in (*self.full, *self.open) if not piece.spilled)

    def append(self, first: int, batch: pa.RecordBatch, tasks: int) -> None:
        """Keep rows that begin at sequence number `first`, each for `tasks` tasks."""
        self.open.append(Piece(first, batch, batch.num_rows * tasks, bytes=batch.nbytes))
        self._firsts = None
        if sum(piece.batch.num_rows for piece in self.open) >= PIECE_ROWS:
            self.full.append(_joined(self.open))
            self.open = []
            self._spill()
        elif len(self.open) > PIECES_OPEN_MAX:
            self.open = [_joined(self.open)]

    def seal(self) -> None:
        """Close the open pieces: what comes next has other columns."""
        if self.open:
            self.full.append(_joined(self.open))
            self.open, self._firsts = [], None
            self._spill()

    def take(self, seq_L: I64s, schema: pa.Schema) -> pa.RecordBatch:
        """Return the rows with these sequence numbers, in this order, as `schema`; each is needed once less."""
        pieces, piece_L = self._places(seq_L)
        low, high = int(piece_L.min()), int(piece_L.max())
        if low == high:
            pieces[low].live -= len(seq_L)
            rows = fit(pieces[low].batch.take(pa.array(seq_L - pieces[low].first)), schema)
        else:
            order_L = np.argsort(piece_L, kind="stable")
            ends = np.cumsum(np.bincount(piece_L, minlength=len(pieces)))
            runs = []
            for at in np.unique(piece_L):
                mine = seq_L[order_L[ends[at - 1] if at else 0 : ends[at]]]
                pieces[at].live -= len(mine)
                runs.append(fit(pieces[at].batch.take(pa.array(mine - pieces[at].first)), schema))
            back_L = np.empty(len(seq_L), np.int64)
            back_L[order_L] = np.arange(len(seq_L))
            rows = pa.concat_batches(runs)
            if not np.array_equal(back_L, np.arange(len(seq_L))):
                rows = rows.take(pa.array(back_L))
        if any(not pieces[at].live for at in {low, high} | set(piece_L.tolist())):
            self._sweep()
        return rows

    def release(self, seq_L: I64s) -> None:
        """Drop each of these rows without reading it; each is needed once less."""
        pieces, piece_L = self._places(seq_L)
        for at, count in enumerate(np.bincount(piece_L, minlength=len(pieces)).tolist()):
            pieces[at].live -= count
        self._sweep()

    def _places(self, seq_L: I64s) -> tuple[list[Piece], I64s]:
        """Return all pieces, and in which of them each row is."""
        pieces = [*self.full, *self.open]
        if self._firsts is None:
            self._firsts = np.array([piece.first for piece in pieces], np.int64)
        return pieces, np.searchsorted(self._firsts, seq_L, side="right") - 1

    def load(self, pieces: Sequence[Piece]) -> None:
        """Take over full pieces, ascending."""
        self.full, self.open, self._firsts = list(pieces), [], None
        self._spill()

    def clear(self) -> None:
        """Drop everything, what was spilled too."""
        for piece in self.full:
            piece.live = 0
        self.open = []
        self._sweep()

    def _sweep(self) -> None:
        for piece in self.full:
            if not piece.live and piece.spilled and self.spill is not None:
                self.spill.drop(self._name_of(piece))
        # Open pieces stay, for they are joined by sequence number.
        self.full = [piece for piece in self.full if piece.live]
        self._firsts = None

    def _spill(self) -> None:
        """Spill the oldest full pieces until the rest fits."""
        if self.spill is None or self.bytes <= self.memory_bytes:
            return
        for piece in self.full:
            if not piece.spilled:
                piece.batch = self.spill.put(self._name_of(piece), piece.batch)
                piece.spilled = True
                if self.bytes <= self.memory_bytes:
                    return

    def _name_of(self, piece: Piece) -> str:
        return f"{self.name}-{piece.first:020d}"


def _joined(pieces: Sequence[Piece]) -> Piece:
    batch = pa.concat_batches([piece.batch for piece in pieces])
    return Piece(pieces[0].first, batch, sum(piece.live for piece in pieces), bytes=batch.nbytes)
