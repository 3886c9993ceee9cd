"""The distinct ids of a batch, slot by slot. A row is read, multiplied and learnt once, however many samples have it.

Axes: B samples, F slots, U distinct ids (of each slot by itself), K slots of one table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from headrace.trainer.model.tables.row_index import Int32s, Int64s

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DistinctIds:
    """The distinct ids of a batch, those of slot f at `begin_F[f] : begin_F[f + 1]`, in order of first appearance.

    An id that stands in several slots is there once for each.
    """

    keys_U: Int64s
    rows_U: Int64s
    """-1: `PAD`, or not admitted yet."""
    index_FB: Int32s
    """Index in U of the id of a slot and sample; int32 [F, B], slot by slot because that is how it is read."""
    begin_F: Int64s
    """Int64 [F + 1]."""

    def of(self, slots_K: Int64s) -> Int64s:
        """Return the indices in U of the ids of some slots."""
        return np.concatenate([np.arange(self.begin_F[f], self.begin_F[f + 1]) for f in slots_K])


def distinct(keys_BF: Int64s, admitted_BF: Bools | None = None) -> tuple[Int64s, Int32s, Int64s]:
    """Return the distinct ids of each slot, the index of each sample's id, and where slots begin: see `DistinctIds`.

    An id for which `admitted_BF` says yes and no in one batch is there twice: it was admitted between two sightings.
    """
    samples, slots = keys_BF.shape
    keys_U = np.empty(keys_BF.size, np.int64)
    index_FB, begin_F = np.empty((slots, samples), np.int32), np.empty(slots + 1, np.int64)
    admitted_BF = np.empty((0, 0), np.bool_) if admitted_BF is None else admitted_BF
    count = _distinct(np.ascontiguousarray(keys_BF), admitted_BF, keys_U, index_FB, begin_F)
    return keys_U[:count], index_FB, begin_F


@numba.njit(cache=True)
def _distinct(keys_BF: Int64s, admitted_BF: Bools, keys_U: Int64s, index_FB: Int32s, begin_F: Int64s) -> int:
    """Look each id up among those of its slot: open addressing, at most half full."""
    samples, slots = keys_BF.shape
    bits = 1
    while (1 << bits) < 2 * samples:
        bits += 1
    found_M, mask = np.empty(1 << bits, np.int32), (1 << bits) - 1
    admitted_U = np.zeros(keys_U.shape[0] if admitted_BF.shape[0] else 0, np.bool_)
    count = 0
    for f in range(slots):
        begin_F[f] = count
        found_M[:] = -1
        for b in range(samples):
            key, admitted = keys_BF[b, f], admitted_BF.shape[0] > 0 and admitted_BF[b, f]
            at = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
            while True:
                index = found_M[at]
                if index < 0:
                    found_M[at], keys_U[count], index_FB[f, b] = count, key, count
                    if admitted_BF.shape[0]:
                        admitted_U[count] = admitted
                    count += 1
                    break
                if keys_U[index] == key and (not admitted_BF.shape[0] or admitted_U[index] == admitted):
                    index_FB[f, b] = index
                    break
                at = (at + 1) & mask
    begin_F[slots] = count
    return count
