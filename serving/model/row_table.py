"""The rows of one copy of the shared model: find, apply and remove keys in arrays that the region holds. Compiled.

A row that holds the values that its key begins with needs no place: a look-up of a key without a row gives the same.
The trainer leaves such rows out and names those that went back to it; before format 2 it published them with their
first values, and so rows that it expired leave here by themselves (`split_initial`).

Key 0 marks an empty place of the index; no slot id is ever 0, and no kernel takes or finds it. A search begins at the
place that the key chooses and goes on to the next (linear probing); a removal moves later entries back into the hole.
Rows lie without gaps: the last one moves into the place of one that leaves.

Legend: C places of the index (a power of 2, at least twice R), R rows at most, V values a row, K keys.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.formats.snapshot import Weights
from headrace.contract.recipe import Recipe
from headrace.trainer.model.tables.table import initial_values

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]


@numba.njit(cache=True, nogil=True)
def find(index_2C: Int64s, wanted_K: Int64s, out_K: Int64s) -> None:
    """Write the row of each key to `out_K`, -1 where it has none."""
    mask = index_2C.shape[1] - 1
    for i in range(wanted_K.shape[0]):
        key = wanted_K[i]
        at = (key ^ (key >> 29)) & mask
        out_K[i] = -1
        if key == 0:
            continue
        for _ in range(mask + 1):
            found = index_2C[0, at]
            if found == key:
                out_K[i] = index_2C[1, at]
                break
            if found == 0:
                break
            at = (at + 1) & mask


@numba.njit(cache=True, nogil=True)
def apply(index_2C: Int64s, keys_R: Int64s, values_RV: Float32s, rows: int, keys_K: Int64s, values_KV: Float32s) -> int:
    """Return how many rows there are now, or -1: then nothing was written past the end, and the copy is spoilt."""
    mask = index_2C.shape[1] - 1
    if values_KV.shape[0] != keys_K.shape[0] or values_KV.shape[1] > values_RV.shape[1]:
        return -1
    for i in range(keys_K.shape[0]):
        key = keys_K[i]
        if key == 0:
            return -1
        at = (key ^ (key >> 29)) & mask
        while index_2C[0, at] != key and index_2C[0, at] != 0:
            at = (at + 1) & mask
        if index_2C[0, at] == 0:
            if rows >= values_RV.shape[0]:
                return -1
            index_2C[1, at] = rows
            index_2C[0, at] = key
            keys_R[rows] = key
            rows += 1
        row = index_2C[1, at]
        for j in range(values_KV.shape[1]):
            values_RV[row, j] = values_KV[i, j]
    return rows


@numba.njit(cache=True, nogil=True)
def remove(index_2C: Int64s, keys_R: Int64s, values_RV: Float32s, rows: int, gone_K: Int64s) -> int:
    """Take rows out and return how many are left; nothing happens for a key that has none."""
    mask = index_2C.shape[1] - 1
    for i in range(gone_K.shape[0]):
        key = gone_K[i]
        if key == 0:
            continue
        hole = (key ^ (key >> 29)) & mask
        while index_2C[0, hole] != key and index_2C[0, hole] != 0:
            hole = (hole + 1) & mask
        if index_2C[0, hole] == 0:
            continue
        row = index_2C[1, hole]
        at = hole
        while True:
            at = (at + 1) & mask
            other = index_2C[0, at]
            if other == 0:
                break
            # An entry may move back into the hole unless its search begins behind the hole.
            home = (other ^ (other >> 29)) & mask
            if ((at - home) & mask) >= ((at - hole) & mask):
                index_2C[0, hole], index_2C[1, hole] = other, index_2C[1, at]
                hole = at
        index_2C[0, hole] = 0
        rows -= 1
        if row != rows:
            last = keys_R[rows]
            at = (last ^ (last >> 29)) & mask
            while index_2C[0, at] != last:
                at = (at + 1) & mask
            index_2C[1, at] = row
            keys_R[row] = last
            for j in range(values_RV.shape[1]):
                values_RV[row, j] = values_RV[rows, j]
    return rows


@numba.njit(cache=True, nogil=True)
def touch(bytes_N: npt.NDArray[np.uint8]) -> int:
    """Read a byte of each page, so that this process has it mapped; return their sum."""
    total = 0
    for at in range(0, bytes_N.shape[0], 4096):
        total += bytes_N[at]
    return total


def split_initial(weights: Weights, recipe: Recipe) -> Weights:
    """Return these with only the rows that need a place; the keys of the others, which hold the values that they began
    with, are among those that have no row. Format 2 comes like that already."""
    first_KV = initial_values(weights.keys_K, dim=recipe.row_dim, seed=recipe.seed, scale=recipe.row_scale)
    is_first_K = (weights.values_KV == first_KV).all(axis=1)
    if not is_first_K.any():
        return weights
    stays_K, gone_K = ~is_first_K, np.concatenate([weights.gone_K, weights.keys_K[is_first_K]])
    return Weights(weights.keys_K[stays_K], weights.values_KV[stays_K], weights.dense, gone_K)
