"""Compiled passes between rows of the tables and the dense part: one read of the rows forward, one write back.

Single-threaded, in a fixed order. Axes: B samples, F slots, V = 1 + E values of a row, D numbers, X = F * E + D.
"""

from __future__ import annotations

import numba
import numpy as np

from headrace.trainer.model.scoring import Float32s


@numba.njit(cache=True)
def spread(
    values_BFV: Float32s,
    numeric_BD: Float32s,
    linear_B: Float32s,
    pairs_B: Float32s,
    sum_BE: Float32s,
    x_BX: Float32s,
) -> None:
    """Write what the dense part reads: the sum of linear weights, FM's pairs, the sum of embeddings, and x0."""
    slots, width, numerics = values_BFV.shape[1], values_BFV.shape[2] - 1, numeric_BD.shape[1]
    squares_E = np.empty(width, np.float32)
    for b in range(values_BFV.shape[0]):
        linear = np.float32(0.0)
        for e in range(width):
            sum_BE[b, e] = np.float32(0.0)
            squares_E[e] = np.float32(0.0)
        for f in range(slots):
            linear += values_BFV[b, f, 0]
            for e in range(width):
                v = values_BFV[b, f, 1 + e]
                sum_BE[b, e] += v
                squares_E[e] += v * v
                x_BX[b, f * width + e] = v
        pairs = np.float32(0.0)
        for e in range(width):
            pairs += sum_BE[b, e] * sum_BE[b, e] - squares_E[e]
        linear_B[b] = linear
        pairs_B[b] = np.float32(0.5) * pairs
        for d in range(numerics):
            x_BX[b, slots * width + d] = numeric_BD[b, d]


@numba.njit(cache=True)
def collect(
    values_BFV: Float32s,
    sum_BE: Float32s,
    linear_B: Float32s,
    pairs_B: Float32s,
    x_BX: Float32s,
    grad_BFV: Float32s,
) -> np.float32:
    """Write the gradients of rows from those of the sum of linear weights, of FM's pairs and of x0.

    Returns the sum of their squares, which is not finite where a gradient is not.
    """
    slots, width = values_BFV.shape[1], values_BFV.shape[2] - 1
    squares_E = np.zeros(width, np.float32)
    squares = np.float32(0.0)
    for b in range(values_BFV.shape[0]):
        linear, pairs = linear_B[b], pairs_B[b]
        squares += np.float32(slots) * linear * linear
        for f in range(slots):
            grad_BFV[b, f, 0] = linear
            for e in range(width):
                g = x_BX[b, f * width + e] + pairs * (sum_BE[b, e] - values_BFV[b, f, 1 + e])
                grad_BFV[b, f, 1 + e] = g
                squares_E[e] += g * g
    for e in range(width):
        squares += squares_E[e]
    return squares
