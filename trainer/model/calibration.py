"""What corrects a loss or a score: down-sampled negatives, late positives, calibration. NumPy, pure.

1. **Down-sampling.** A share r of the negatives is learnt, so the odds among what is learnt are 1 / r of the true ones.
   The loss takes sigmoid(z - log r) for what the model gives as z: z stays the true log-odds, and nothing has to be
   corrected afterwards. Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
2. **Late positives.** With policy `eager` an impression is a negative at once and, where feedback comes, a positive
   too. `fake_negative_weighted` weighs a positive by 1 + p and a negative by (1 - p)(1 + p), p being what the model
   says; then the loss is least where p is the true rate. `fake_negative_calibrated` learns them as they come, which
   gives b = q / (1 + q), whose log-odds are log q. Source: Ktena et al., RecSys 2019, equations 6 to 8.
   `taken_back` needs no rate: the positive's gradient is that of a positive less that of the negative before, which is
   -1 whatever the model says. Both together are what a positive alone would have been.
3. **Calibration.** Two numbers a task, a and b: sigmoid(a z + b). They learn by Adagrad from z as it was before its
   labels were learnt. So they correct a model that is too sure of itself, which it cannot see from samples that it has
   learnt. Ranking of one task does not change while a > 0. Source: Platt, 1999.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.hashing import U64, mix64
from headrace.contract.recipe import Recipe
from headrace.trainer.model.batch import Batch, Int8s
from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.row_index import Int64s

Bools = npt.NDArray[np.bool_]
Float64s = npt.NDArray[np.float64]

_PLATT_RATE = 0.02
_VALUE_MAX = 1e12
"""Of a value, either way: its square is far from float32's end."""
_UNIT = 1.0 / 9007199254740992.0


def left_out(recipe: Recipe, label_B: Float32s, id_B: Int64s) -> Bools:
    """Say which samples are negatives that are not learnt: bool [B], a function of label, hash of the id, and seed."""
    if recipe.negative_share == 1.0:
        return np.zeros(len(label_B), np.bool_)
    seed = mix64(np.array([recipe.seed], U64))
    unit_B = (mix64(id_B.view(U64) ^ seed) >> U64(11)).astype(np.float64) * _UNIT
    out_B: Bools = (label_B == 0) & (unit_B >= recipe.negative_share)
    return out_B


def gradients(recipe: Recipe, logit_B: Float32s, label_B: Float32s, weight_B: Float32s) -> Float32s:
    """Return the derivative of each sample's weighted log loss by its log-odds: float32 [B]."""
    out_B = np.empty(len(logit_B), np.float32)
    _gradients(logit_B, label_B, weight_B, *corrections(recipe), out_B)
    return out_B


def corrections(recipe: Recipe) -> tuple[np.float32, bool]:
    """Return the last arguments of `gradient_of`: the offset of down-sampled negatives, whether positives come late."""
    return np.float32(-math.log(recipe.negative_share)), recipe.delayed == "fake_negative_weighted"


TAKEN_BACK = np.float32(2.0)
"""The label, for `gradient_of`, of a positive that takes the negative before it back."""


@numba.njit(cache=True)
def _gradients(
    logit_B: Float32s, label_B: Float32s, weight_B: Float32s, offset: np.float32, is_weighted: bool, out_B: Float32s
) -> None:
    for b in range(logit_B.shape[0]):
        out_B[b] = gradient_of(logit_B[b], label_B[b], weight_B[b], offset, is_weighted)


@numba.njit(cache=True)
def gradient_of(
    logit: np.float32, label: np.float32, weight: np.float32, offset: np.float32, is_weighted: bool
) -> np.float32:
    """Return the derivative of one sample's weighted log loss by its log-odds; `offset` is -log(negative_share)."""
    one = np.float32(1.0)
    if label > one:
        return np.float32(-weight)
    if is_weighted:
        p = _sigmoid(logit)
        weight *= (one + p) * (one if label > 0 else one - p)
    out: np.float32 = weight * (_sigmoid(logit + offset) - label)
    return out


@numba.njit(cache=True)
def _sigmoid(logit: np.float32) -> np.float32:
    small, one = np.exp(-abs(logit)), np.float32(1.0)
    out: np.float32 = one / (one + small) if logit >= 0 else small / (one + small)
    return out


def acceptable(batch: Batch, recipe: Recipe) -> Bools:
    """Say which samples may be learnt, see `Learner.learn`: bool [B]. Every learner refuses the others."""
    keep_B = np.empty(len(batch), np.bool_)
    bounds = {"log_loss": (0.0, 1.0), "weighted": (0.0, _VALUE_MAX), "tweedie": (0.0, _VALUE_MAX)}
    bound_T2 = np.array([bounds.get(recipe.objective(n), (-_VALUE_MAX, _VALUE_MAX)) for n in recipe.heads])
    _acceptable(batch.numeric_BD, batch.label_B, batch.weight_B, batch.task_B, bound_T2, keep_B)
    return keep_B


@numba.njit(cache=True)
def _acceptable(
    numeric_BD: Float32s, label_B: Float32s, weight_B: Float32s, task_B: Int8s, bound_T2: Float64s, keep_B: Bools
) -> None:
    for b in range(label_B.shape[0]):
        keep = np.isfinite(weight_B[b]) and weight_B[b] >= 0 and 0 <= task_B[b] < bound_T2.shape[0]
        keep = keep and bound_T2[task_B[b], 0] <= label_B[b] <= bound_T2[task_B[b], 1]
        for d in range(numeric_BD.shape[1]):
            keep = keep and np.isfinite(numeric_BD[b, d])
        keep_B[b] = keep


class Platt:
    """Scale and offset of the log-odds, one pair for each task."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        tasks = len(recipe.heads)
        self.weights_2T: Float32s = np.stack([np.ones(tasks, np.float32), np.zeros(tasks, np.float32)])
        self.squares_2T: Float32s = np.zeros((2, tasks), np.float32)

    def learn(self, logit_B: Float32s, label_B: Float32s, weight_B: Float32s, task_B: Int8s) -> None:
        """Take one Adagrad step a task, along the mean gradient of its samples."""
        for task in range(self.weights_2T.shape[1]):
            here_B = task_B == task
            if not here_B.any():
                continue
            z_B = logit_B[here_B]
            scale, offset = self.weights_2T[:, task]
            g_B = gradients(self._recipe, scale * z_B + offset, label_B[here_B], weight_B[here_B])
            step_2 = np.array([(g_B * z_B).mean(), g_B.mean()], np.float32)
            self.squares_2T[:, task] += step_2 * step_2
            self.weights_2T[:, task] -= np.float32(_PLATT_RATE) * step_2 / (np.sqrt(self.squares_2T[:, task]) + 1e-6)
