"""Compiled passes of the first layer over the distinct ids of a batch: each id is multiplied once, not once a sample.

The first layer's product of x0 is a sum over slots. So it is computed for each distinct id, and each sample adds up the
products of its ids; gradients go the other way. Products are tiled, so that a number that was loaded is used several
times. Single-threaded, in a fixed order.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), N those of one slot, V = 1 + E values of a row,
X = F * E + D, H the first layer's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numba
import numpy as np
import numpy.typing as npt

from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.row_index import Int32s, Int64s

BETA1, BETA2 = 0.9, 0.999
"""Adam's rates of decay, for dense weights."""

_CONTRACT = {"contract"}
_SUMS = {"contract", "reassoc"}


@numba.njit(cache=True, fastmath=_CONTRACT)
def project(
    values_UV: Float32s,
    begin_F: Int64s,
    index_FB: Int32s,
    weight_XH: Float32s,
    first_BH: Float32s,
    linear_B: Float32s,
    pairs_B: Float32s,
    sum_BE: Float32s,
) -> None:
    """Add the embeddings' part to the first layer; write sums of linear weights, FM's pairs, sums of embeddings."""
    slots, samples = index_FB.shape
    width, hidden = values_UV.shape[1] - 1, weight_XH.shape[1]
    product_NH, squares_N = np.empty((samples, hidden), np.float32), np.empty(samples, np.float32)
    linear_B[:], pairs_B[:], sum_BE[:] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for f in range(slots):
        begin = begin_F[f]
        value_NV = values_UV[begin : begin_F[f + 1]]
        product_NH[: value_NV.shape[0]] = np.float32(0.0)
        _add_product(value_NV[:, 1:], weight_XH[f * width : (f + 1) * width], product_NH)
        for n in range(value_NV.shape[0]):
            squares = np.float32(0.0)
            for e in range(width):
                squares += value_NV[n, 1 + e] * value_NV[n, 1 + e]
            squares_N[n] = squares
        for b in range(samples):
            n = index_FB[f, b] - begin
            linear_B[b] += value_NV[n, 0]
            pairs_B[b] -= squares_N[n]
            for e in range(width):
                sum_BE[b, e] += value_NV[n, 1 + e]
            for h in range(hidden):
                first_BH[b, h] += product_NH[n, h]
    for b in range(samples):
        for e in range(width):
            pairs_B[b] += sum_BE[b, e] * sum_BE[b, e]
        pairs_B[b] *= np.float32(0.5)


@numba.njit(cache=True, fastmath=_CONTRACT)
def collect(
    values_UV: Float32s,
    begin_F: Int64s,
    index_FB: Int32s,
    weight_XH: Float32s,
    first_BH: Float32s,
    linear_B: Float32s,
    pairs_B: Float32s,
    sum_BE: Float32s,
    grad_XH: Float32s,
    grad_UV: Float32s,
) -> None:
    """Write the gradients of the first layer's weights and of rows.

    They come from those of the first layer, of the sum of linear weights and of FM's pairs.
    """
    slots, samples = index_FB.shape
    width, hidden = values_UV.shape[1] - 1, weight_XH.shape[1]
    grad_NH, pairs_N = np.empty((samples, hidden), np.float32), np.empty(samples, np.float32)
    grad_UV[:], grad_XH[: slots * width] = np.float32(0.0), np.float32(0.0)
    pulled_BE = np.empty((samples, width), np.float32)
    for b in range(samples):
        for e in range(width):
            pulled_BE[b, e] = pairs_B[b] * sum_BE[b, e]
    for f in range(slots):
        begin, count = begin_F[f], begin_F[f + 1] - begin_F[f]
        value_NV, out_NV = values_UV[begin : begin + count], grad_UV[begin : begin + count]
        grad_NH[:count], pairs_N[:count] = np.float32(0.0), np.float32(0.0)
        for b in range(samples):
            n = index_FB[f, b] - begin
            out_NV[n, 0] += linear_B[b]
            pairs_N[n] += pairs_B[b]
            for e in range(width):
                out_NV[n, 1 + e] += pulled_BE[b, e]
            for h in range(hidden):
                grad_NH[n, h] += first_BH[b, h]
        for n in range(count):
            for e in range(width):
                out_NV[n, 1 + e] -= pairs_N[n] * value_NV[n, 1 + e]
        of_slot = slice(f * width, (f + 1) * width)
        _add_product(value_NV[:, 1:].T, grad_NH[:count], grad_XH[of_slot])
        _row_gradients(grad_NH, weight_XH[of_slot], out_NV)


@numba.njit(cache=True, fastmath=_CONTRACT)
def _add_product(a_RK: Float32s, b_KH: Float32s, out_RH: Float32s) -> None:
    """Add a times b, four rows of a and four of b at a time."""
    (rows, inner), hidden = a_RK.shape, b_KH.shape[1]
    for r in range(0, rows - 3, 4):
        out0, out1, out2, out3 = out_RH[r], out_RH[r + 1], out_RH[r + 2], out_RH[r + 3]
        for k in range(0, inner - 3, 4):
            a00, a01, a02, a03 = a_RK[r, k], a_RK[r, k + 1], a_RK[r, k + 2], a_RK[r, k + 3]
            a10, a11, a12, a13 = a_RK[r + 1, k], a_RK[r + 1, k + 1], a_RK[r + 1, k + 2], a_RK[r + 1, k + 3]
            a20, a21, a22, a23 = a_RK[r + 2, k], a_RK[r + 2, k + 1], a_RK[r + 2, k + 2], a_RK[r + 2, k + 3]
            a30, a31, a32, a33 = a_RK[r + 3, k], a_RK[r + 3, k + 1], a_RK[r + 3, k + 2], a_RK[r + 3, k + 3]
            b0, b1, b2, b3 = b_KH[k], b_KH[k + 1], b_KH[k + 2], b_KH[k + 3]
            for h in range(hidden):
                v0, v1, v2, v3 = b0[h], b1[h], b2[h], b3[h]
                out0[h] = out0[h] + a00 * v0 + a01 * v1 + a02 * v2 + a03 * v3
                out1[h] = out1[h] + a10 * v0 + a11 * v1 + a12 * v2 + a13 * v3
                out2[h] = out2[h] + a20 * v0 + a21 * v1 + a22 * v2 + a23 * v3
                out3[h] = out3[h] + a30 * v0 + a31 * v1 + a32 * v2 + a33 * v3
    # What the tiles leave over: the last of b for each row of a, all of b for the last rows.
    for r in range(rows):
        for k in range(inner - inner % 4 if r < rows - rows % 4 else 0, inner):
            v = a_RK[r, k]
            for h in range(hidden):
                out_RH[r, h] += v * b_KH[k, h]


@numba.njit(cache=True, fastmath=_SUMS)
def _row_gradients(grad_NH: Float32s, weight_EH: Float32s, out_NV: Float32s) -> None:
    """Add gradients times transposed weights, two ids and four numbers of theirs at a time.

    Sums are split over the lanes of a vector, always in the same way.
    """
    count, width, hidden = out_NV.shape[0], weight_EH.shape[0], weight_EH.shape[1]
    for n in range(0, count - 1, 2):
        g, k = grad_NH[n], grad_NH[n + 1]
        for e in range(0, width - 3, 4):
            w0, w1, w2, w3 = weight_EH[e], weight_EH[e + 1], weight_EH[e + 2], weight_EH[e + 3]
            g0 = g1 = g2 = g3 = k0 = k1 = k2 = k3 = np.float32(0.0)
            for h in range(hidden):
                g0 += g[h] * w0[h]
                g1 += g[h] * w1[h]
                g2 += g[h] * w2[h]
                g3 += g[h] * w3[h]
                k0 += k[h] * w0[h]
                k1 += k[h] * w1[h]
                k2 += k[h] * w2[h]
                k3 += k[h] * w3[h]
            out_NV[n, 1 + e] += g0
            out_NV[n, 2 + e] += g1
            out_NV[n, 3 + e] += g2
            out_NV[n, 4 + e] += g3
            out_NV[n + 1, 1 + e] += k0
            out_NV[n + 1, 2 + e] += k1
            out_NV[n + 1, 3 + e] += k2
            out_NV[n + 1, 4 + e] += k3
    # What the tiles leave over: the last numbers of each id, and a last id without a partner.
    tiled_ids, tiled_numbers = count - count % 2, width - width % 4
    for n in range(count):
        for e in range(tiled_numbers if n < tiled_ids else 0, width):
            g0 = np.float32(0.0)
            for h in range(hidden):
                g0 += grad_NH[n, h] * weight_EH[e, h]
            out_NV[n, 1 + e] += g0


@numba.njit(cache=True)
def spread(values_UV: Float32s, index_FB: Int32s, numeric_BD: Float32s, x_BX: Float32s) -> None:
    """Write x0: each sample's embeddings, and its numbers."""
    slots, samples = index_FB.shape
    width = values_UV.shape[1] - 1
    for b in range(samples):
        for f in range(slots):
            u = index_FB[f, b]
            for e in range(width):
                x_BX[b, f * width + e] = values_UV[u, 1 + e]
        for d in range(numeric_BD.shape[1]):
            x_BX[b, slots * width + d] = numeric_BD[b, d]


@numba.njit(cache=True)
def collect_spread(x_BX: Float32s, index_FB: Int32s, grad_UV: Float32s) -> None:
    """Add the gradient of x0 to those of rows."""
    slots, samples = index_FB.shape
    width = grad_UV.shape[1] - 1
    for b in range(samples):
        for f in range(slots):
            u = index_FB[f, b]
            for e in range(width):
                grad_UV[u, 1 + e] += x_BX[b, f * width + e]


@numba.njit(cache=True, fastmath=_SUMS)
def squares_of(array_UV: Float32s) -> np.float32:
    """Return the sum of the squares, which is not finite where a number is not."""
    squares = np.float32(0.0)
    for u in range(array_UV.shape[0]):
        for v in range(array_UV.shape[1]):
            squares += array_UV[u, v] * array_UV[u, v]
    return squares


class StepSizes:
    """How dense weights learn from steps of unlike sizes: every sample weighs the same, whatever step it comes in.

    With `rate_rows` of 0 a step is along the mean of its gradients. Live, positives come alone and negatives together
    when time moves on, so that in a mean a sample of a small step counts for more: a positive, mostly. With `rate_rows`
    gradients are divided by what is the same for neighbouring steps, sqrt(rate_rows n) for steps of n rows on average;
    and the rate is lr sqrt(n / rate_rows) while n is below, since Adam makes the many steps of few rows as long as
    others.

    Source: Malladi et al., "On the SDEs and scaling rules for adaptive gradient algorithms", NeurIPS 2022.
    """

    def __init__(self, lr: float, rate_rows: int) -> None:
        self.lr, self.rate_rows, self.mean_rows = lr, rate_rows, 0.0

    def next(self, samples: int, step: int) -> tuple[float, float]:
        """Return the rate of step number `step`, from 1, and by what its summed gradients are divided."""
        if not self.rate_rows:
            return self.lr, samples
        self.mean_rows += (samples - self.mean_rows) * max(1 - BETA2, 1 / step)
        rate = self.lr * math.sqrt(min(1.0, self.mean_rows / self.rate_rows))
        return rate, math.sqrt(self.rate_rows * self.mean_rows)

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what `load` takes; empty with `rate_rows` of 0."""
        return {"mean_rows": np.array([self.mean_rows])} if self.rate_rows else {}

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Go on from `state`."""
        if self.rate_rows:
            self.mean_rows = float(state["mean_rows"][0])


def adam(
    weight_P: Float32s, grad_P: Float32s, first_P: Float32s, second_P: Float32s, *, lr: float, step: int, samples: float
) -> None:
    """Take step number `step` (from 1) along the mean of gradients that are summed over so many samples.

    Source: Kingma, Ba, "Adam", ICLR 2015, Algorithm 1.
    """
    rate = lr * math.sqrt(1 - BETA2**step) / (1 - BETA1**step)
    adam_step(weight_P, grad_P, first_P, second_P, np.float32(rate), np.float32(1 / samples))


@numba.njit(cache=True, error_model="numpy")
def adam_step(
    weight_P: Float32s, grad_P: Float32s, first_P: Float32s, second_P: Float32s, rate: np.float32, share: np.float32
) -> None:
    """Take one step at a rate that is corrected for the beginning, along `share` times the gradients."""
    beta1, beta2, epsilon, one = np.float32(BETA1), np.float32(BETA2), np.float32(1e-8), np.float32(1.0)
    for p in range(weight_P.shape[0]):
        g = grad_P[p] * share
        first_P[p] = beta1 * first_P[p] + (one - beta1) * g
        second_P[p] = beta2 * second_P[p] + (one - beta2) * g * g
        weight_P[p] -= rate * first_P[p] / (np.sqrt(second_P[p]) + epsilon)
