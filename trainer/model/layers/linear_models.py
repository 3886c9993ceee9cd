"""The dense part of the linear models, `logistic` and `fm`: compiled, without torch and layers, two passes a step.

Its weights are a bias and D numbers for each task, and `mix` where there are several tasks; formulas are those of
`scoring`. A step costs microseconds besides its rows, so small batches pay: each sees the weights that the last made.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), V = 1 + E values of a row, D numbers, T tasks,
P dense weights in one flat array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.layers.kernels import StepSizes, adam, squares_of
from headrace.trainer.model.layers.norms import Norms
from headrace.trainer.model.scoring import BESIDE, Float32s, shapes_of
from headrace.trainer.model.tables.distinct_ids import DistinctIds
from headrace.trainer.model.tables.row_index import Int32s

# Sums may be split over the lanes of a vector, always in the same way; NaN and infinity count as they do everywhere.
_SUMS = {"reassoc", "contract"}


@numba.njit(cache=True, fastmath=_SUMS)
def _forward(
    values_UV: Float32s,
    index_FB: Int32s,
    numeric_BD: Float32s,
    weight_P: Float32s,
    is_fm: bool,
    sums_BX: Float32s,
    out_BT: Float32s,
) -> None:
    """Write log-odds, and to `sums_BX` what `_backward` needs: FM's sum of embeddings, of linear weights, its pairs."""
    slots, width, tasks = index_FB.shape[0], values_UV.shape[1] - 1, out_BT.shape[1]
    numerics = numeric_BD.shape[1]
    mix = tasks * (1 + numerics)
    for b in range(numeric_BD.shape[0]):
        for t in range(tasks):
            out = weight_P[t]
            for d in range(numerics):
                out += numeric_BD[b, d] * weight_P[tasks * (1 + d) + t]
            out_BT[b, t] = out
        if not is_fm:
            for f in range(slots):
                for t in range(tasks):
                    out_BT[b, t] += values_UV[index_FB[f, b], t]
            continue
        linear, squares, pairs = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for e in range(width):
            sums_BX[b, e] = np.float32(0.0)
        for f in range(slots):
            u = index_FB[f, b]
            linear += values_UV[u, 0]
            for e in range(width):
                v = values_UV[u, 1 + e]
                sums_BX[b, e] += v
                squares += v * v
        for e in range(width):
            pairs += sums_BX[b, e] * sums_BX[b, e]
        pairs = np.float32(0.5) * (pairs - squares)
        sums_BX[b, width], sums_BX[b, width + 1] = linear, pairs
        for t in range(tasks):
            if tasks > 1:
                out_BT[b, t] += weight_P[mix + t] * linear + weight_P[mix + tasks + t] * pairs
            else:
                out_BT[b, t] += linear + pairs


@numba.njit(cache=True, fastmath=_SUMS)
def _backward(
    values_UV: Float32s,
    index_FB: Int32s,
    numeric_BD: Float32s,
    weight_P: Float32s,
    is_fm: bool,
    sums_BX: Float32s,
    grad_BT: Float32s,
    grad_P: Float32s,
    grad_UV: Float32s,
) -> tuple[np.float32, np.float32]:
    """Write the gradients of dense weights, summed over the batch, and of rows; return the sums of their squares."""
    slots, width, tasks = index_FB.shape[0], values_UV.shape[1] - 1, grad_BT.shape[1]
    numerics = numeric_BD.shape[1]
    mix = tasks * (1 + numerics)
    grad_P[:], grad_UV[:] = np.float32(0.0), np.float32(0.0)
    for b in range(numeric_BD.shape[0]):
        for t in range(tasks):
            g = grad_BT[b, t]
            grad_P[t] += g
            for d in range(numerics):
                grad_P[tasks * (1 + d) + t] += g * numeric_BD[b, d]
        if not is_fm:
            for f in range(slots):
                for t in range(tasks):
                    grad_UV[index_FB[f, b], t] += grad_BT[b, t]
            continue
        linear, pairs = grad_BT[b, 0], grad_BT[b, 0]
        if tasks > 1:
            linear = pairs = np.float32(0.0)
            for t in range(tasks):
                g = grad_BT[b, t]
                linear += g * weight_P[mix + t]
                pairs += g * weight_P[mix + tasks + t]
                grad_P[mix + t] += g * sums_BX[b, width]
                grad_P[mix + tasks + t] += g * sums_BX[b, width + 1]
        for f in range(slots):
            u = index_FB[f, b]
            grad_UV[u, 0] += linear
            for e in range(width):
                grad_UV[u, 1 + e] += pairs * (sums_BX[b, e] - values_UV[u, 1 + e])
    dense = np.float32(0.0)
    for p in range(grad_P.shape[0]):
        dense += grad_P[p] * grad_P[p]
    return squares_of(grad_UV), dense


class LinearModel:
    """Dense weights of `logistic` and `fm`. Call `forward`, then `backward`, then perhaps `update`."""

    def __init__(self, recipe: Recipe, features: FeatureSpec) -> None:
        self.shapes = {name: shape for name, shape in shapes_of(recipe, features).items() if name not in BESIDE}
        self.lr, self.step, self._is_fm, self._tasks = recipe.lr_dense, 0, recipe.model == "fm", len(recipe.heads)
        self.sizes = StepSizes(recipe.lr_dense, recipe.rate_rows)
        self._row_values = 1 + recipe.row_dim
        size = sum(math.prod(shape) for shape in self.shapes.values())
        self.weight_P, self.grad_P, self.first_P, self.second_P = (np.zeros(size, np.float32) for _ in range(4))
        if "mix" in self.shapes:
            self.weight_P[size - math.prod(self.shapes["mix"]) :] = 1

    def forward(self, values_UV: Float32s, ids: DistinctIds, numeric_BD: Float32s) -> Float32s:
        """Return the log-odds of each task, float32 [B, T], and keep what `backward` needs."""
        self._read = values_UV, ids.index_FB, np.ascontiguousarray(numeric_BD)
        # The sum of embeddings, of linear weights, and the pairs.
        self._sums_BX = np.empty((len(numeric_BD), self._row_values + 1 if self._is_fm else 0), np.float32)
        out_BT = np.empty((len(numeric_BD), self._tasks), np.float32)
        _forward(*self._read, self.weight_P, self._is_fm, self._sums_BX, out_BT)
        return out_BT

    def backward(self, grad_BT: Float32s) -> tuple[Float32s, Norms]:
        """Return the gradients of the rows from those of the log-odds, float32 [U, V], and the norms."""
        grad_UV = np.empty(self._read[0].shape, np.float32)
        rows, dense = _backward(*self._read, self.weight_P, self._is_fm, self._sums_BX, grad_BT, self.grad_P, grad_UV)
        return grad_UV, Norms(math.sqrt(rows), math.sqrt(dense))

    def update(self, samples: int) -> None:
        """Take one Adam step along the gradients' mean."""
        self.step += 1
        lr, count = self.sizes.next(samples, self.step)
        adam(self.weight_P, self.grad_P, self.first_P, self.second_P, lr=lr, step=self.step, samples=count)

    def named(self, flat_P: Float32s) -> dict[str, Float32s]:
        """Return views of a flat array by the names of its weights."""
        out, at = {}, 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            out[name] = flat_P[at : at + count].reshape(shape)
            at += count
        return out

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the weights by name."""
        return self.named(self.weight_P.copy())

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of weights, moments and step."""
        return self.sizes.state() | {
            "step": np.array([self.step], np.int64),
            "weight": self.weight_P.copy(),
            "first": self.first_P.copy(),
            "second": self.second_P.copy(),
        }

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.step = int(state["step"][0])
        self.sizes.load(state)
        self.weight_P[:], self.first_P[:], self.second_P[:] = state["weight"], state["first"], state["second"]
