"""The digest of what this replica serves, kept as rows come and go. It reads the rows that lie in shared memory.

A delta takes the hash of each old row off, as it lies there, and adds that of the new one. So a row that went wrong
here is found out when its turn comes; `sum_held` finds any.

Axes: K keys, V values a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from headrace.contract.formats.dense_change import Bits, sha256_of
from headrace.contract.formats.snapshot import Weights
from headrace.kernels.row_sums import RowSum, row_hashes, row_sum, sum_of
from headrace.serving.model.row_table import find
from headrace.serving.model.shared_region import Held


def sum_after(before: RowSum, held: Held, weights: Weights) -> RowSum:
    """Return the sum of the rows as it will be once a delta is applied; `before` is that of what is held."""
    keys_K = np.concatenate([weights.keys_K, weights.gone_K])
    rows_K = np.empty(len(keys_K), np.int64)
    find(held.index_2C, keys_K, rows_K)
    had_K = rows_K >= 0
    old_KV = held.values_RV[rows_K[had_K], : weights.values_KV.shape[1]]
    old = sum_of(row_hashes(keys_K[had_K], old_KV))
    return before - old + sum_of(row_hashes(weights.keys_K, weights.values_KV))


def sum_held(held: Held, *, width: int) -> RowSum:
    """Return the sum of all rows that are held, of `width` values each."""
    return row_sum(held.keys_R, held.values_RV[:, :width])


def dense_bits(held: Held, shapes: Mapping[str, list[int]]) -> Bits:
    """Return the bits of the dense weights that are held, a view: uint32 [N]."""
    return held.dense_N[: sum(math.prod(shape) for shape in shapes.values())]


def dense_sha256(held: Held, shapes: Mapping[str, list[int]]) -> str:
    """Return SHA-256 of the dense weights that are held, in hex."""
    return sha256_of(dense_bits(held, shapes))
