"""What serving holds of a run, as far as it was published: a hash a row, their sum, and the dense weights.

Deltas are made from it: a row is sent when its values, as they travel, are others than those that were sent before; a
key is named as gone when its row was sent and now holds the values that its key begins with. So the digest of what is
served after each delta is known without a look at the other rows. That of a snapshot is computed from all rows anew
(`as_snapshot`), and both must agree.

Memory: 32 bytes a row, and 6.4 to 12.8 for the index; the dense weights once.

Axes: K keys, V values a row, 2 the hashes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.contract.formats.dense_change import Bits, DenseChange, change_of
from headrace.contract.formats.snapshot import Weights, as_served, served_digest
from headrace.contract.recipe import Recipe
from headrace.kernels.row_sums import RowSum, row_hashes, row_sum, sum_of
from headrace.trainer.model.tables.row_index import RowIndex
from headrace.trainer.model.tables.table import Int64s, initial_values

# Behind key, last use and a word that keeps hashes on 8 bytes lie the two hashes of a row.
_WORDS, _LOW, _HIGH = 5, 2, 3
_PIECE_ROWS = 65_536
"""Rows of a snapshot that are looked at in one call: other threads go on between two."""


@dataclass(frozen=True)
class Change:
    """What a delta says, and what holds once it is sent."""

    weights: Weights
    dense: DenseChange
    served: str
    """The digest of what is then served."""
    sum: RowSum
    dense_N: Bits
    hashes_K2: npt.NDArray[np.uint64]
    """Of `weights.keys_K`."""


class ServedRows:
    """What was published last. Not thread-safe."""

    def __init__(self, recipe: Recipe, rows: str) -> None:
        """Begin with nothing; `rows` says how the values of rows travel."""
        self._recipe, self._rows = recipe, rows
        self.forget()

    def __len__(self) -> int:
        return len(self._index)

    def forget(self) -> None:
        """Begin anew: nothing is served yet."""
        self._index, self._sum = RowIndex(words=_WORDS), RowSum()
        self._dense_N: Bits | None = None

    def begin(self, snapshot: Weights, dense_N: Bits) -> None:
        """Note that a snapshot, as `as_snapshot` returns it, is all that is served. Piece by piece, so that other
        threads go on."""
        self.forget()
        self._dense_N = dense_N
        for begin in range(0, len(snapshot.keys_K), _PIECE_ROWS):
            here = slice(begin, begin + _PIECE_ROWS)
            hashes_K2 = row_hashes(snapshot.keys_K[here], snapshot.values_KV[here])
            self._put(snapshot.keys_K[here], hashes_K2)
            self._sum = self._sum + sum_of(hashes_K2)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self._index.nbytes + (0 if self._dense_N is None else self._dense_N.nbytes)

    def change(self, weights: Weights) -> Change:
        """Return what leads from what was published to these weights, of these keys; changes nothing.

        Args:
            weights: the learner's, with each key once.
        """
        now = as_snapshot(weights, self._recipe, self._rows)
        hashes_K2 = row_hashes(now.keys_K, now.values_KV)
        at_K = self._index.find(now.keys_K)
        before_K2 = self._hashes(at_K)
        is_new_K = (at_K < 0) | (hashes_K2 != before_K2).any(axis=1)
        had_K = is_new_K & (at_K >= 0)
        gone_at_K = self._index.find(now.gone_K)
        gone_K = now.gone_K[gone_at_K >= 0]
        after = self._sum + sum_of(hashes_K2[is_new_K]) - sum_of(before_K2[had_K])
        after = after - sum_of(self._hashes(gone_at_K[gone_at_K >= 0]))
        dense, dense_N = change_of(weights.dense, self._dense_N)
        changed = Weights(now.keys_K[is_new_K], now.values_KV[is_new_K], weights.dense, gone_K)
        served = served_digest(after.text, dense.sha256)
        return Change(changed, dense, served, after, dense_N, hashes_K2[is_new_K])

    def take(self, change: Change) -> None:
        """Note that a change was published, or is in the snapshot that will be."""
        self._index.remove(change.weights.gone_K)
        self._put(change.weights.keys_K, change.hashes_K2)
        self._sum, self._dense_N = change.sum, change.dense_N

    def _put(self, keys_K: Int64s, hashes_K2: npt.NDArray[np.uint64]) -> None:
        at_K, _ = self._index.insert(keys_K)
        columns_RX, bits_K2 = self._index.arrays.keys_RX, hashes_K2.view(np.int64)
        columns_RX[at_K, _LOW], columns_RX[at_K, _HIGH] = bits_K2[:, 0], bits_K2[:, 1]

    def _hashes(self, at_K: Int64s) -> npt.NDArray[np.uint64]:
        """Return the hashes of rows, 0 where there is none: uint64 [K, 2]."""
        columns_RX = self._index.arrays.keys_RX
        found_K2 = np.stack([columns_RX[at_K, _LOW], columns_RX[at_K, _HIGH]], axis=1).view(np.uint64)
        found_K2[at_K < 0] = 0
        return found_K2


def as_snapshot(weights: Weights, recipe: Recipe, rows: str) -> Weights:
    """Return what serving holds of these: rows as they travel, without those that hold what their key begins with,
    whose keys are `gone_K`."""
    kept: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)]
    for begin in range(0, len(weights.keys_K), _PIECE_ROWS):
        here = slice(begin, begin + _PIECE_ROWS)
        keys_K, values_KV = weights.keys_K[here], weights.values_KV[here]
        first_KV = initial_values(keys_K, dim=recipe.row_dim, seed=recipe.seed, scale=recipe.row_scale)
        kept.append((values_KV != first_KV).any(axis=1))
    is_kept_K = np.concatenate(kept)
    gone_K = weights.keys_K[~is_kept_K]
    if len(gone_K):
        weights = Weights(weights.keys_K[is_kept_K], weights.values_KV[is_kept_K], weights.dense)
    return Weights(weights.keys_K, as_served(weights.values_KV, rows), weights.dense, gone_K)


def digest_of(snapshot: Weights, dense_sha256: str) -> str:
    """Return the digest of what is served of a whole model, as `as_snapshot` returns it."""
    return served_digest(row_sum(snapshot.keys_K, snapshot.values_KV).text, dense_sha256)
