"""What a task learns: from what the model gives, z, to what it says; the derivative of the loss by z. Compiled, pure.

| objective | says | loss, where y is the value |
| --- | --- | --- |
| `log_loss` | sigmoid(l + z), l the log-odds of the base rate | log loss; see `headrace.trainer.model.calibration` |
| `weighted` | m e^z | -y' log sigmoid(z) - log(1 - sigmoid(z)), y' = y / m |
| `tweedie` | m e^z | y' e^((1 - p) z) / (p - 1) + e^((2 - p) z) / (2 - p), y' = y / m |
| `squared` | m + s z | (z - y')^2 / 2, y' = (y - m) / s |
| `huber` | m + s z | the same up to an error of `huber_delta`, linear beyond |

m and s are the running mean and standard deviation of the value (`headrace.trainer.model.moments`), so that steps are
alike for cents and for thousands. The first three are least where what is said is the mean of y; `weighted` is the log
loss of logistic regression where every impression is a negative and a value counts as so many positives.

A correction is a value that comes after its impression was learnt with the value 0. It takes that gradient back: its
own is the gradient of y less that of 0, so that both together are what the value alone would have been.

Source: Covington et al., "Deep neural networks for YouTube recommendations", RecSys 2016 (`weighted`); Yang et al.,
"Insurance premium prediction via gradient tree-boosted Tweedie compound Poisson models", 2018; Huber, 1964.

Axes: B samples, T tasks.
"""

from __future__ import annotations

from typing import get_args

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.recipe import Objective, Recipe

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Int8s = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]

KINDS: tuple[Objective, ...] = get_args(Objective)
LOG_LOSS, WEIGHTED, SQUARED, HUBER, TWEEDIE = range(5)
Z_LOW, Z_HIGH = np.float32(-30.0), np.float32(15.0)
"""Of z where e^z is taken: e^15 times the mean is beyond every value."""


def kinds_of(recipe: Recipe) -> Int8s:
    """Return the place in `KINDS` of what each task learns: int8 [T]."""
    return np.array([KINDS.index(recipe.objective(name)) for name in recipe.heads], np.int8)


def value_tasks(recipe: Recipe) -> Bools:
    """Say which tasks learn a value: bool [T]."""
    value_T: Bools = kinds_of(recipe) != LOG_LOSS
    return value_T


@numba.njit(cache=True)
def is_exponential(kind: int) -> bool:
    """Say whether what is said is the mean times e^z."""
    return kind in (WEIGHTED, TWEEDIE)


def values_said(kind_T: Int8s, z_NT: Float32s, targets_2T: Float32s) -> Float32s:
    """Return what the value tasks say from z, shaped as z; what stands for other tasks has no meaning."""
    mean_T, scale_T = targets_2T
    grown_NT = mean_T * np.exp(np.clip(z_NT, Z_LOW, Z_HIGH))
    exponential_T = (kind_T == WEIGHTED) | (kind_T == TWEEDIE)
    out_NT: Float32s = np.where(exponential_T, grown_NT, mean_T + scale_T * z_NT).astype(np.float32)
    return out_NT


def value_gradients(
    recipe: Recipe,
    z_B: Float32s,
    value_B: Float32s,
    weight_B: Float32s,
    task_B: Int8s,
    correction_B: Bools,
    target_2B: Float64s,
) -> Float32s:
    """Return the derivative of each sample's weighted loss by z, float32 [B]; 0 for samples of other tasks.

    Args:
        target_2B: mean and standard deviation of the value of each sample's task.
    """
    out_B = np.empty(len(z_B), np.float32)
    numbers = np.float32(recipe.tweedie_power), np.float32(recipe.huber_delta)
    _value_gradients(
        kinds_of(recipe), z_B, value_B, weight_B, task_B, correction_B, target_2B[0], target_2B[1], *numbers, out_B
    )
    return out_B


@numba.njit(cache=True)
def _value_gradients(
    kind_T: Int8s,
    z_B: Float32s,
    value_B: Float32s,
    weight_B: Float32s,
    task_B: Int8s,
    correction_B: Bools,
    mean_B: Float64s,
    scale_B: Float64s,
    power: np.float32,
    delta: np.float32,
    out_B: Float32s,
) -> None:
    for b in range(z_B.shape[0]):
        kind = kind_T[task_B[b]]
        if kind == LOG_LOSS:
            out_B[b] = np.float32(0.0)
            continue
        if is_exponential(kind):
            y, zero = np.float32(value_B[b] / mean_B[b]) if mean_B[b] > 0 else np.float32(0.0), np.float32(0.0)
        elif scale_B[b] > 0:
            y = np.float32((value_B[b] - mean_B[b]) / scale_B[b])
            zero = np.float32(-mean_B[b] / scale_B[b])
        else:
            y, zero = np.float32(0.0), np.float32(0.0)
        g = _derivative(kind, z_B[b], y, power, delta)
        if correction_B[b]:
            g -= _derivative(kind, z_B[b], zero, power, delta)
        out_B[b] = weight_B[b] * g


@numba.njit(cache=True)
def _derivative(kind: int, z: np.float32, y: np.float32, power: np.float32, delta: np.float32) -> np.float32:
    one = np.float32(1.0)
    if kind == SQUARED:
        return np.float32(z - y)
    if kind == HUBER:
        return np.float32(min(max(z - y, -delta), delta))
    at = min(max(z, Z_LOW), Z_HIGH)
    if kind == WEIGHTED:
        return np.float32((one + y) / (one + np.exp(-at)) - y)
    return np.float32(np.exp((np.float32(2.0) - power) * at) - y * np.exp((one - power) * at))
