"""Collisionless tables: every 64-bit slot id has rows of its own, found by an open-addressing index that grows.

A row holds a linear weight and an embedding (`values_RV`, float32 [R, 1 + dim]), the two Adagrad sums of squared
gradients that go with them (`squares_R2`), and the event time of its last use. A new row's values follow from its key
and the seed alone, so the order in which keys arrive does not matter. Kernels are single-threaded and add in a fixed
order: equal batches give equal bits.

Axes: B samples of a batch, F slots of a sample, K keys, R rows of the table, V = 1 + dim values of a row.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.spec import PAD

Int64s = npt.NDArray[np.int64]
Float32s = npt.NDArray[np.float32]

# 1024 rows: small enough to be free, large enough that a first batch needs one growth at most.
_ROWS_MIN = 1024
_PAD = np.int64(PAD)


@numba.njit(cache=True)
def _mix(key: np.uint64) -> np.uint64:
    z = key + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True)
def _find(index_C: Int64s, keys_R: Int64s, wanted_K: Int64s, out_K: Int64s) -> None:
    mask = np.uint64(index_C.shape[0] - 1)
    for i in range(wanted_K.shape[0]):
        key = wanted_K[i]
        at = _mix(np.uint64(key)) & mask
        row = index_C[at]
        while row >= 0 and keys_R[row] != key:
            at = (at + np.uint64(1)) & mask
            row = index_C[at]
        out_K[i] = row


@numba.njit(cache=True)
def _insert(index_C: Int64s, keys_R: Int64s, count: int, wanted_K: Int64s, out_K: Int64s) -> int:
    mask = np.uint64(index_C.shape[0] - 1)
    for i in range(wanted_K.shape[0]):
        key = wanted_K[i]
        if key == _PAD:
            out_K[i] = -1
            continue
        at = _mix(np.uint64(key)) & mask
        row = index_C[at]
        while row >= 0 and keys_R[row] != key:
            at = (at + np.uint64(1)) & mask
            row = index_C[at]
        if row < 0:
            row = count
            index_C[at] = row
            keys_R[row] = key
            count += 1
        out_K[i] = row
    return count


@numba.njit(cache=True)
def _fill_initial(values_KV: Float32s, keys_K: Int64s, seed: np.uint64, scale: np.float32) -> None:
    step = np.float64(1.0 / 9007199254740992.0)
    for i in range(keys_K.shape[0]):
        if keys_K[i] == _PAD:
            values_KV[i, :] = np.float32(0.0)
            continue
        state = _mix(np.uint64(keys_K[i]) ^ _mix(seed))
        values_KV[i, 0] = np.float32(0.0)
        for j in range(1, values_KV.shape[1]):
            state = _mix(state)
            unit = np.float64(state >> np.uint64(11)) * step
            values_KV[i, j] = np.float32((2.0 * unit - 1.0) * scale)


@numba.njit(cache=True)
def _gather(values_RV: Float32s, rows_N: Int64s, out_NV: Float32s) -> None:
    for i in range(rows_N.shape[0]):
        row = rows_N[i]
        if row < 0:
            out_NV[i, :] = np.float32(0.0)
            continue
        for j in range(values_RV.shape[1]):
            out_NV[i, j] = values_RV[row, j]


@numba.njit(cache=True)
def _sum_by_row(rows_N: Int64s, grad_NV: Float32s, place_R: Int64s, touched_N: Int64s, sums_NV: Float32s) -> int:
    count = 0
    for i in range(rows_N.shape[0]):
        row = rows_N[i]
        if row < 0:
            continue
        place = place_R[row]
        if place < 0:
            place = count
            place_R[row] = place
            touched_N[place] = row
            sums_NV[place, :] = np.float32(0.0)
            count += 1
        for j in range(grad_NV.shape[1]):
            sums_NV[place, j] += grad_NV[i, j]
    for k in range(count):
        place_R[touched_N[k]] = -1
    return count


@numba.njit(cache=True)
def _adagrad(
    values_RV: Float32s, squares_R2: Float32s, touched_K: Int64s, sums_KV: Float32s, lr: np.float32, l2: np.float32
) -> None:
    width = values_RV.shape[1]
    for k in range(touched_K.shape[0]):
        row = touched_K[k]
        g = sums_KV[k, 0] + l2 * values_RV[row, 0]
        squares_R2[row, 0] += g * g
        values_RV[row, 0] -= lr * g / (np.sqrt(squares_R2[row, 0]) + np.float32(1e-6))
        if width == 1:
            continue
        mean = np.float32(0.0)
        for j in range(1, width):
            g = sums_KV[k, j] + l2 * values_RV[row, j]
            sums_KV[k, j] = g
            mean += g * g
        squares_R2[row, 1] += mean / np.float32(width - 1)
        rate = lr / (np.sqrt(squares_R2[row, 1]) + np.float32(1e-6))
        for j in range(1, width):
            values_RV[row, j] -= rate * sums_KV[k, j]


@numba.njit(cache=True)
def _touch(last_ms_R: Int64s, rows_BF: Int64s, event_time_ms_B: Int64s) -> None:
    for b in range(rows_BF.shape[0]):
        for f in range(rows_BF.shape[1]):
            row = rows_BF[b, f]
            if row >= 0 and event_time_ms_B[b] > last_ms_R[row]:
                last_ms_R[row] = event_time_ms_B[b]


def initial_values(keys_K: Int64s, *, dim: int, seed: int, scale: float) -> Float32s:
    """Return what a row that was never learnt holds: float32 [K, 1 + dim], a function of key and seed alone.

    The linear weight is 0; the embedding is uniform in +-`scale`. `PAD` is all zeros. Serving uses it for keys that a
    snapshot lacks.
    """
    values_KV = np.empty((len(keys_K), 1 + dim), np.float32)
    _fill_initial(values_KV, np.ascontiguousarray(keys_K), np.uint64(seed), np.float32(scale))
    return values_KV


class KeyIndex:
    """Maps int64 keys to rows 0, 1, 2 ... in order of first insertion. Never more than half full."""

    def __init__(self) -> None:
        self.count = 0
        self.keys_R: Int64s = np.empty(_ROWS_MIN, np.int64)
        self._index_C: Int64s = np.full(4 * _ROWS_MIN, -1, np.int64)

    def __len__(self) -> int:
        return self.count

    def find(self, keys_K: Int64s) -> Int64s:
        """Return the row of each key, -1 where it has none."""
        rows_K = np.empty(len(keys_K), np.int64)
        _find(self._index_C, self.keys_R, np.ascontiguousarray(keys_K), rows_K)
        return rows_K

    def insert(self, keys_K: Int64s) -> Int64s:
        """Return the row of each key; a key that has none gets the next one, `PAD` gets -1."""
        self._reserve(self.count + len(keys_K))
        rows_K = np.empty(len(keys_K), np.int64)
        self.count = _insert(self._index_C, self.keys_R, self.count, np.ascontiguousarray(keys_K), rows_K)
        return rows_K

    def _reserve(self, rows: int) -> None:
        capacity = len(self.keys_R)
        if rows <= capacity:
            return
        while capacity < rows:
            capacity *= 2
        known_R = self.keys_R[: self.count].copy()
        self.keys_R = np.empty(capacity, np.int64)
        self._index_C = np.full(4 * capacity, -1, np.int64)
        _insert(self._index_C, self.keys_R, 0, known_R, np.empty(len(known_R), np.int64))


class Table:
    """The rows of all slots, with row-wise Adagrad. Not thread-safe."""

    def __init__(self, *, dim: int, seed: int, scale: float) -> None:
        self.dim, self.seed, self.scale = dim, seed, scale
        self.index = KeyIndex()
        self.values_RV: Float32s = np.empty((_ROWS_MIN, 1 + dim), np.float32)
        self.squares_R2: Float32s = np.zeros((_ROWS_MIN, 2), np.float32)
        self.last_ms_R: Int64s = np.full(_ROWS_MIN, -1, np.int64)
        self._place_R: Int64s = np.full(_ROWS_MIN, -1, np.int64)

    def __len__(self) -> int:
        return len(self.index)

    def rows_for(self, keys_BF: Int64s) -> Int64s:
        """Return the row of each key, making those that are missing: int64, shaped as the keys; -1 for `PAD`."""
        before = len(self.index)
        rows_N = self.index.insert(keys_BF.reshape(-1))
        self._grow(len(self.index.keys_R))
        fresh = slice(before, len(self.index))
        if fresh.stop > before:
            keys_K = self.index.keys_R[fresh]
            self.values_RV[fresh] = initial_values(keys_K, dim=self.dim, seed=self.seed, scale=self.scale)
        return rows_N.reshape(keys_BF.shape)

    def gather(self, rows_BF: Int64s) -> Float32s:
        """Return a copy of the rows' values, zeros for row -1: float32 [B, F, V]."""
        out_NV = np.empty((rows_BF.size, 1 + self.dim), np.float32)
        _gather(self.values_RV, rows_BF.reshape(-1), out_NV)
        return out_NV.reshape(*rows_BF.shape, 1 + self.dim)

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of each key, the initial ones where it has no row: float32 [K, V]. Changes nothing."""
        rows_K = self.index.find(keys_K)
        out_KV = self.values_RV[np.maximum(rows_K, 0)]
        missing_K = rows_K < 0
        if missing_K.any():
            out_KV[missing_K] = initial_values(keys_K[missing_K], dim=self.dim, seed=self.seed, scale=self.scale)
        return out_KV

    def update(self, rows_BF: Int64s, grad_BFV: Float32s, event_time_ms_B: Int64s, *, lr: float, l2: float) -> Int64s:
        """Apply one Adagrad step and return the touched rows in order of first appearance.

        Gradients of a row that appears several times are added in (sample, slot) order and applied once. The linear
        weight has an Adagrad sum of its own; the embedding has one of the mean square over its numbers.

        Source: Duchi et al., "Adaptive Subgradient Methods", JMLR 2011; row-wise as in Naumov et al., DLRM, 2019.
        """
        rows_N = rows_BF.reshape(-1)
        touched_N = np.empty(len(rows_N), np.int64)
        sums_NV = np.empty((len(rows_N), 1 + self.dim), np.float32)
        grad_NV = np.ascontiguousarray(grad_BFV.reshape(len(rows_N), 1 + self.dim))
        count = _sum_by_row(rows_N, grad_NV, self._place_R, touched_N, sums_NV)
        touched_K = touched_N[:count]
        _adagrad(self.values_RV, self.squares_R2, touched_K, sums_NV[:count], np.float32(lr), np.float32(l2))
        _touch(self.last_ms_R, rows_BF, event_time_ms_B)
        return touched_K

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of all rows, in row order; `load` reads them."""
        n = len(self)
        return {
            "keys": self.index.keys_R[:n].copy(),
            "values": self.values_RV[:n].copy(),
            "squares": self.squares_R2[:n].copy(),
            "last_ms": self.last_ms_R[:n].copy(),
        }

    def load(self, state: dict[str, npt.NDArray[np.generic]]) -> None:
        """Replace all rows by what `state` returned."""
        self.index = KeyIndex()
        keys_R = state["keys"].astype(np.int64)
        self.index.insert(keys_R)
        self.values_RV = np.empty((0, 1 + self.dim), np.float32)
        self.squares_R2, self.last_ms_R = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)
        self._place_R = np.zeros(0, np.int64)
        self._grow(len(self.index.keys_R))
        n = len(keys_R)
        self.values_RV[:n] = state["values"]
        self.squares_R2[:n] = state["squares"]
        self.last_ms_R[:n] = state["last_ms"]

    def _grow(self, capacity: int) -> None:
        have = len(self.values_RV)
        if have >= capacity:
            return
        more = capacity - have
        self.values_RV = np.concatenate([self.values_RV, np.empty((more, 1 + self.dim), np.float32)])
        self.squares_R2 = np.concatenate([self.squares_R2, np.zeros((more, 2), np.float32)])
        self.last_ms_R = np.concatenate([self.last_ms_R, np.full(more, -1, np.int64)])
        self._place_R = np.concatenate([self._place_R, np.full(more, -1, np.int64)])
