"""How rows of the tables learn: one compiled kernel an optimizer, which gathers, adds up and applies.

Each kernel does one step. It adds the gradients of a row that appears several times, in the order given, applies
the sum once, and sets the row's last use. Rows are touched in order of first appearance. Nothing is allocated by row:
while a batch is added up, the word of a row's last use holds the row's position among those that the batch touches.

A record's words after its header: V values (the linear weight, then the embedding), then the optimizer's S numbers.
g is a row's gradient sum, with l2 * w added except for FTRL, which has l2 in its formula.

Axes: N ids of a batch (samples x slots), R rows, W words of a record, V values of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import ConfigRejected
from headrace.trainer.model.tables.row_index import HEADER_WORDS, LAST_USE, Float32s, Int32s, Int64s

UInt32s = npt.NDArray[np.uint32]
Kind = Literal["adagrad_row", "adagrad", "ftrl", "adam"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_V = HEADER_WORDS
_EPSILON = np.float32(1e-6)
_ADAM_EPSILON = np.float32(1e-8)
_ONE = np.float32(1.0)
_GROUP = 64


@dataclass(frozen=True)
class Optimizer:
    """One way for rows to learn, and its numbers.

    | kind | numbers a row | formula |
    | --- | --- | --- |
    | `adagrad_row` | 2 | see `step_adagrad_row`: s += g^2, s += mean(g^2); w -= lr g / (sqrt(s) + 1e-6) |
    | `adagrad` | V | the same with an s for every number |
    | `ftrl` | 2 V | see `step_ftrl`; weights within `l1` are exactly 0 |
    | `adam` | 2 V + 1 | see `step_adam` |
    """

    kind: Kind = "adagrad_row"
    lr: float = 0.05
    l2: float = 0.0
    l1: float = 0.0
    """FTRL only."""
    beta: float = 1.0
    """FTRL only: lr / (beta + sqrt(n)) is the rate of a number."""
    beta1: float = 0.9
    beta2: float = 0.999
    """Adam only."""
    half_life_ms: int = 0
    """Adagrad only: in so much event time a sum of squares halves, so that the rate of a row does not end at 0 and an
    idle row learns fast again. Sums shrink when their row is touched, before g^2 is added. 0: never."""
    squares: float = 0.0
    """Adagrad only: what the sums of a new row begin with."""

    def __post_init__(self) -> None:
        if self.kind not in _STEPS:
            raise ConfigRejected(f"optimizer {self.kind!r} of the tables is not one of {sorted(_STEPS)}.")
        if self.lr <= 0 or self.l1 < 0 or self.l2 < 0 or self.beta < 0:
            raise ConfigRejected(f"{self}: lr must be above 0; l1, l2 and beta must not be below.")
        if self.squares < 0 or (self.squares and not self.kind.startswith("adagrad")):
            raise ConfigRejected(f"{self}: squares is for adagrad and adagrad_row, and not below 0; leave it 0.")
        if self.half_life_ms < 0 or (self.half_life_ms and not self.kind.startswith("adagrad")):
            raise ConfigRejected(f"{self}: half_life_ms is for adagrad and adagrad_row, and not below 0; leave it 0.")
        if self.l1 and self.kind != "ftrl":
            raise ConfigRejected(f"{self}: only ftrl knows l1; leave it 0, or choose ftrl.")

    def state_words(self, values: int) -> int:
        """Return how many numbers a row of so many values keeps beside them."""
        return {"adagrad_row": 2, "adagrad": values, "ftrl": 2 * values, "adam": 2 * values + 1}[self.kind]

    def squares_at(self, values: int) -> int:
        """Return which of a row's numbers is the sum of squares of its linear weight; -1 where none only grows."""
        return {"adagrad_row": 0, "adagrad": 0, "ftrl": values, "adam": -1}[self.kind]

    def begin(self, floats_RW: Float32s, rows_K: Int64s, *, values: int) -> None:
        """Set the optimizer's numbers of new rows whose values are set."""
        z = np.float32(self.beta / self.lr + self.l2) if self.kind == "ftrl" else np.float32(-1)
        first = (np.float32(self.squares), z, np.float32(self.l1))
        _begin(floats_RW, rows_K, values, self.state_words(values), *first)

    def step(self, words_RW: Int32s, floats_RW: Float32s, rows_N: Int64s, grad_NV: Float32s, *, now_s: int) -> Int64s:
        """Apply one step and return the touched rows in order of first appearance; row -1 is left out."""
        touched_N, used_N = np.empty(len(rows_N) + 1, np.int64), np.empty(len(rows_N), np.uint32)
        sums_NV = np.empty(grad_NV.shape, np.float32)
        batch = (rows_N, grad_NV, touched_N, used_N, sums_NV)
        count = _STEPS[self.kind](words_RW, floats_RW, *batch, now_s, self.numbers())
        return touched_N[:count]

    def touch(self, words_RW: Int32s, rows_N: Int64s, *, now_s: int) -> Int64s:
        """Return the rows in order of first appearance, each once, and set their last use; row -1 is left out."""
        touched_N, used_N = np.empty(len(rows_N) + 1, np.int64), np.empty(len(rows_N), np.uint32)
        nothing_N0 = np.empty((len(rows_N), 0), np.float32)
        count = _add_up(words_RW, rows_N, nothing_N0, touched_N, used_N, nothing_N0, now_s)
        return touched_N[:count]

    def numbers(self) -> Float32s:
        """Return what kernels read: lr, l2, l1, beta, beta1, beta2, half-life in seconds."""
        return np.array(
            [self.lr, self.l2, self.l1, self.beta, self.beta1, self.beta2, self.half_life_ms / 1_000], np.float32
        )


@numba.njit(cache=True)
def _begin(
    floats_RW: Float32s, rows_K: Int64s, values: int, states: int, squares: np.float32, z: np.float32, l1: np.float32
) -> None:
    for i in range(rows_K.shape[0]):
        row = rows_K[i]
        for j in range(_V + values, _V + values + states):
            floats_RW[row, j] = squares
        if z >= 0:
            for j in range(values):
                w = floats_RW[row, _V + j]
                floats_RW[row, _V + values + j] = -w * z - np.sign(w) * l1


@numba.njit(cache=True)
def _add_up(
    words_RW: Int32s,
    rows_N: Int64s,
    grad_NV: Float32s,
    touched_N: Int64s,
    used_N: UInt32s,
    sums_NV: Float32s,
    now_s: int,
) -> int:
    """Add gradients by row, and keep when each was last used.

    A row's word gives its position in `touched_N`, and counts only where that position names the row. The layers have
    driven the rows out of the caches: both ends of a group of records are read first, so that their misses overlap.

    Source: Briggs, Torczon, "An Efficient Representation for Sparse Sets", 1993.
    """
    count, width = 0, grad_NV.shape[1]
    asked, last = np.int64(0), words_RW.shape[1] - 1
    for i in range(rows_N.shape[0]):
        if i % _GROUP == 0:
            for ahead in range(i, min(i + _GROUP, rows_N.shape[0])):
                row = max(rows_N[ahead], 0)
                asked += np.int64(words_RW[row, LAST_USE]) ^ np.int64(words_RW[row, last])
        row = rows_N[i]
        if row < 0:
            continue
        position = np.int64(np.uint32(words_RW[row, LAST_USE]))
        if position >= count or touched_N[position] != row:
            used_N[count] = np.uint32(words_RW[row, LAST_USE])
            words_RW[row, LAST_USE] = np.int32(count)
            touched_N[count] = row
            for j in range(width):
                sums_NV[count, j] = grad_NV[i, j]
            count += 1
        else:
            for j in range(width):
                sums_NV[position, j] += grad_NV[i, j]
    stamp = np.int32(np.uint32(now_s))
    for k in range(count):
        words_RW[touched_N[k], LAST_USE] = stamp
    touched_N[rows_N.shape[0]] = asked  # Behind all rows, where nobody reads it: so that the compiler keeps the reads.
    return count


@numba.njit(cache=True)
def _kept(used_s: np.uint32, now_s: int, numbers: Float32s) -> np.float32:
    """Return what is left of a sum of squares: 2 ** (-idle / half-life)."""
    half_life_s = numbers[6]
    if half_life_s == 0:
        return _ONE
    return np.float32(2.0 ** (-np.float64(now_s - np.int64(used_s)) / np.float64(half_life_s)))


@numba.njit(cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def step_adagrad_row(
    words_RW: Int32s,
    floats_RW: Float32s,
    rows_N: Int64s,
    grad_NV: Float32s,
    touched_N: Int64s,
    used_N: UInt32s,
    sums_NV: Float32s,
    now_s: int,
    numbers: Float32s,
) -> int:
    """Step by Adagrad with one sum for the linear weight and one, of mean squares, for the embedding.

    Source: Duchi et al., "Adaptive Subgradient Methods", JMLR 2011; row-wise as in Naumov et al., DLRM, 2019.
    """
    lr, l2 = numbers[0], numbers[1]
    width = grad_NV.shape[1]
    count = _add_up(words_RW, rows_N, grad_NV, touched_N, used_N, sums_NV, now_s)
    for k in range(count):
        row_W, sums_V = floats_RW[touched_N[k]], sums_NV[k]
        kept = _kept(used_N[k], now_s, numbers)
        g = sums_V[0] + l2 * row_W[_V]
        s = kept * row_W[_V + width] + g * g
        row_W[_V + width] = s
        row_W[_V] -= lr * g / (np.sqrt(s) + _EPSILON)
        if width == 1:
            continue
        mean = np.float32(0.0)
        for j in range(1, width):
            g = sums_V[j] + l2 * row_W[_V + j]
            mean += g * g
        s = kept * row_W[_V + width + 1] + mean / np.float32(width - 1)
        row_W[_V + width + 1] = s
        rate = lr / (np.sqrt(s) + _EPSILON)
        for j in range(1, width):
            row_W[_V + j] -= rate * (sums_V[j] + l2 * row_W[_V + j])
    return count


@numba.njit(cache=True)
def step_adagrad(
    words_RW: Int32s,
    floats_RW: Float32s,
    rows_N: Int64s,
    grad_NV: Float32s,
    touched_N: Int64s,
    used_N: UInt32s,
    sums_NV: Float32s,
    now_s: int,
    numbers: Float32s,
) -> int:
    """Step by Adagrad with a sum of squares for every number: s += g^2, w -= lr g / (sqrt(s) + 1e-6).

    Source: Duchi et al., "Adaptive Subgradient Methods", JMLR 2011.
    """
    lr, l2 = numbers[0], numbers[1]
    width = grad_NV.shape[1]
    count = _add_up(words_RW, rows_N, grad_NV, touched_N, used_N, sums_NV, now_s)
    for k in range(count):
        row = touched_N[k]
        kept = _kept(used_N[k], now_s, numbers)
        for j in range(width):
            g = sums_NV[k, j] + l2 * floats_RW[row, _V + j]
            s = kept * floats_RW[row, _V + width + j] + g * g
            floats_RW[row, _V + width + j] = s
            floats_RW[row, _V + j] -= lr * g / (np.sqrt(s) + _EPSILON)
    return count


@numba.njit(cache=True)
def step_ftrl(
    words_RW: Int32s,
    floats_RW: Float32s,
    rows_N: Int64s,
    grad_NV: Float32s,
    touched_N: Int64s,
    used_N: UInt32s,
    sums_NV: Float32s,
    now_s: int,
    numbers: Float32s,
) -> int:
    """Step by FTRL-proximal, each number by itself.

        sigma = (sqrt(n + g^2) - sqrt(n)) / lr;  z += g - sigma w;  n += g^2
        w = 0 where |z| <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2)

    A new row's z is the one that gives its initial values, so that an embedding begins where the others do.

    Source: McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013, Algorithm 1.
    """
    lr, l2, l1, beta = numbers[0], numbers[1], numbers[2], numbers[3]
    width = grad_NV.shape[1]
    count = _add_up(words_RW, rows_N, grad_NV, touched_N, used_N, sums_NV, now_s)
    for k in range(count):
        row = touched_N[k]
        for j in range(width):
            g, n = sums_NV[k, j], floats_RW[row, _V + 2 * width + j]
            root = np.sqrt(n + g * g)
            z = floats_RW[row, _V + width + j] + g - (root - np.sqrt(n)) / lr * floats_RW[row, _V + j]
            floats_RW[row, _V + width + j] = z
            floats_RW[row, _V + 2 * width + j] = n + g * g
            if abs(z) <= l1:
                floats_RW[row, _V + j] = np.float32(0.0)
            else:
                floats_RW[row, _V + j] = -(z - np.sign(z) * l1) / ((beta + root) / lr + l2)
    return count


@numba.njit(cache=True)
def step_adam(
    words_RW: Int32s,
    floats_RW: Float32s,
    rows_N: Int64s,
    grad_NV: Float32s,
    touched_N: Int64s,
    used_N: UInt32s,
    sums_NV: Float32s,
    now_s: int,
    numbers: Float32s,
) -> int:
    """Step by Adam, lazily: moments of rows that a batch does not touch stay, and t counts a row's own steps.

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + 1e-8)

    t stops at 2^24, where float32 ends to count; both corrections are 1 long before.

    Source: Kingma, Ba, "Adam", ICLR 2015, section 2.
    """
    lr, l2, beta1, beta2 = numbers[0], numbers[1], numbers[4], numbers[5]
    width = grad_NV.shape[1]
    count = _add_up(words_RW, rows_N, grad_NV, touched_N, used_N, sums_NV, now_s)
    for k in range(count):
        row = touched_N[k]
        t = floats_RW[row, _V + 3 * width] + _ONE
        floats_RW[row, _V + 3 * width] = t
        steps = np.float64(t)
        rate = np.float32(lr * math.sqrt(1.0 - np.float64(beta2) ** steps) / (1.0 - np.float64(beta1) ** steps))
        for j in range(width):
            g = sums_NV[k, j] + l2 * floats_RW[row, _V + j]
            m = beta1 * floats_RW[row, _V + width + j] + (_ONE - beta1) * g
            v = beta2 * floats_RW[row, _V + 2 * width + j] + (_ONE - beta2) * g * g
            floats_RW[row, _V + width + j] = m
            floats_RW[row, _V + 2 * width + j] = v
            floats_RW[row, _V + j] -= rate * m / (np.sqrt(v) + _ADAM_EPSILON)
    return count


_STEPS: dict[str, Callable[..., int]] = {
    "adagrad_row": step_adagrad_row,
    "adagrad": step_adagrad,
    "ftrl": step_ftrl,
    "adam": step_adam,
}
