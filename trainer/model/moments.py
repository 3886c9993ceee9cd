"""Running moments: of the numbers a model reads, and of what each task learns. Part of a model's state. Compiled, pure.

1. **Numbers.** x is learnt as (x - mean) / standard deviation, within +-10, and as 0 while no second value was seen.
   Beyond the first rows a number moves both as if it were within 10 standard deviations, so that a single wrong one
   does not flatten all others.
2. **Targets.** The base rate of a task, or mean and standard deviation of its value. What is learnt is added to them,
   so that a model begins calibrated: see `headrace.trainer.model.objectives`.
3. **Recent base rates** (`Recipe.recent_base`). A task's n-th sample weighs as n^3 in its base rate b, so that the
   time in which no late label had come yet is soon forgotten. Weights have learnt to make up for the b of then. So
   what the model gives, z, is followed too: s is the like mean of sigmoid(logit b + z) / b, and the log-odds that z is
   added to are 2 logit(b) - logit(s b). To the first order the mean of what is said is then b, whatever z is on
   average.

All are means over all samples up to `MEMORY`, and then over about the last `MEMORY`, each older one weighing less.
Rows count one after another. A batch is read by what was known before it; sample after sample each is read by what was
known before itself.

Source: Welford, Technometrics 1962; standard deviations of a stream as in Ioffe, Szegedy, ICML 2015, though by row;
means that weigh the n-th as a power of n in Shamir, Zhang, "Stochastic gradient descent for non-smooth optimization",
ICML 2013, section 4.

Axes: B samples, D numbers, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.recipe import Recipe
from headrace.trainer.model.objectives import LOG_LOSS, Bools, Float32s, Float64s, Int8s, kinds_of

MEMORY = 65_536.0
"""Samples."""
CLIP = 10.0
"""Standard deviations."""
_EARLY = 32
_TINY = 1e-12
_RECENT = 3.0
_LEAST = 1e-6
"""Of a base rate, and of its distance from 1."""
NUMBERS, TARGETS = "numbers", "targets"
"""Names of the dense weights: mean and 1 / standard deviation of each number [2, D]; of each task [2, T] log-odds of
the base rate and 1, or mean and standard deviation of the value."""


class Known(NamedTuple):
    """A batch by what was known: numbers as they are learnt, and its targets, [2, B], as in `TARGETS`."""

    numeric_BD: Float32s
    before_2B: Float64s
    """Before the batch or the sample."""
    after_2B: Float64s
    """With it."""


class Moments:
    """The running moments of one model."""

    def __init__(self, recipe: Recipe, numerics: int) -> None:
        self._kind_T, self._standardize = kinds_of(recipe), recipe.standardize
        self._share = recipe.negative_share
        self._power_T = np.where((self._kind_T == LOG_LOSS) & recipe.recent_base & recipe.standardize, _RECENT, 0.0)
        self.excess_T: Float64s = np.ones(len(self._kind_T))
        """What the model says without it by the base rate, where base rates are recent."""
        # Count, mean, variance; of a task the second moment in place of the variance.
        self.numbers_3D: Float64s = np.zeros((3, numerics))
        self.targets_3T: Float64s = np.zeros((3, len(self._kind_T)))
        # A base rate begins at one half, as if half a click had been seen in one impression.
        self.targets_3T[:, self._kind_T == LOG_LOSS] = np.array([[1.0], [0.5], [0.5]])

    def take(
        self,
        numeric_BD: Float32s,
        label_B: Float32s,
        weight_B: Float32s,
        task_B: Int8s,
        *,
        more_B: Bools,
        in_order: bool,
    ) -> Known:
        """Count what is learnt and return what was known of it.

        Args:
            more_B: where a sample is beside one that was counted: it adds its label, and no sample.
            in_order: sample after sample.
        """
        dense, before_2B, after_2B = self.dense(), np.empty((2, len(label_B))), np.empty((2, len(label_B)))
        own_T = (self._kind_T != LOG_LOSS) | self._standardize
        wide_B = weight_B.astype(np.float64) / np.where((label_B == 0) & ~more_B, self._share, 1.0)
        targets_3T = self.targets_3T
        _take(self._kind_T, own_T, self._power_T, label_B, wide_B, task_B, more_B, targets_3T, before_2B, after_2B)
        read_BD = numeric_BD
        if self._standardize and numeric_BD.shape[1]:
            read_BD = np.empty(numeric_BD.shape, np.float32)
            _standardize(numeric_BD, self.numbers_3D, read_BD)
        if not in_order:
            read_BD = as_learnt(numeric_BD, dense[NUMBERS]) if self._standardize else numeric_BD
            before_2B = dense[TARGETS][:, task_B].astype(np.float64)
            after_2B = self.dense()[TARGETS][:, task_B].astype(np.float64)
        return Known(read_BD, before_2B, after_2B)

    def follow(
        self, base_T: Float64s, z_B: Float32s, label_B: Float32s, weight_B: Float32s, task_B: Int8s, *, more_B: Bools
    ) -> None:
        """Take in what the model gave for a batch that `take` has counted, of the same labels and weights.

        Args:
            base_T: the base rates before the batch, `base_rates` of then.
        """
        for task in np.flatnonzero(self._power_T):
            here_B = (task_B == task) & ~more_B
            wide_B = weight_B[here_B] / np.where(label_B[here_B] == 0, self._share, 1.0)
            total, base = float(wide_B.sum()), float(base_T[task])
            if total <= 0:
                continue
            said_B = 1.0 / (1.0 + (1.0 - base) / base * np.exp(-np.clip(z_B[here_B].astype(np.float64), -30.0, 30.0)))
            step = min(total * (_RECENT + 1.0) / (self.targets_3T[0, task] + _RECENT), 1.0)
            self.excess_T[task] += step * (float((wide_B * said_B).sum()) / total / base - self.excess_T[task])

    def base_rates(self) -> Float64s:
        """Return a copy of the mean of each task: float64 [T]."""
        mean_T: Float64s = self.targets_3T[1].copy()
        return mean_T

    def dense(self) -> dict[str, Float32s]:
        """Return what scores: copies of `NUMBERS` and `TARGETS`."""
        targets_2T = np.empty((2, len(self._kind_T)), np.float32)
        for task, kind in enumerate(self._kind_T):
            is_own = kind != LOG_LOSS or self._standardize
            targets_2T[:, task] = _known(kind, self.targets_3T[:, task]) if is_own else (0.0, 1.0)
            if self._power_T[task]:
                base = float(self.targets_3T[1, task])
                with_excess = min(max(float(self.excess_T[task]) * base, _LEAST), 1.0 - _LEAST)
                targets_2T[0, task] = 2.0 * math.log(base / (1.0 - base)) - math.log(with_excess / (1.0 - with_excess))
        out = {TARGETS: targets_2T}
        if self._standardize:
            variance_D = self.numbers_3D[2]
            inverse_D = np.array([_inverse(m, v) for m, v in zip(self.numbers_3D[1], variance_D, strict=True)])
            out[NUMBERS] = np.stack([self.numbers_3D[1], inverse_D]).astype(np.float32)
        return out

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of everything."""
        out: dict[str, npt.NDArray[np.generic]] = {
            "numbers": self.numbers_3D.copy(),
            "targets": self.targets_3T.copy(),
        }
        return out | ({"excess": self.excess_T.copy()} if self._power_T.any() else {})

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.numbers_3D = np.array(state["numbers"], np.float64)
        self.targets_3T = np.array(state["targets"], np.float64)
        if self._power_T.any():
            self.excess_T = np.array(state["excess"], np.float64)


def as_learnt(numeric_BD: Float32s, numbers_2D: Float32s) -> Float32s:
    """Return numbers as a model of these moments reads them: float32 [B, D]; NaN where one is not finite."""
    scaled_BD = np.clip((numeric_BD - numbers_2D[0]) * numbers_2D[1], -CLIP, CLIP)
    out_BD: Float32s = (scaled_BD + (numeric_BD - numeric_BD)).astype(np.float32)
    return out_BD


@numba.njit(cache=True)
def _inverse(mean: float, variance: float) -> float:
    # A number that was always the same says nothing, and neither do the roundings of a mean of it.
    return 1.0 / math.sqrt(variance) if variance > _TINY * mean * mean and variance > 0 else 0.0


@numba.njit(cache=True)
def _standardize(numeric_BD: Float32s, numbers_3D: Float64s, out_BD: Float32s) -> None:
    for b in range(numeric_BD.shape[0]):
        for d in range(numeric_BD.shape[1]):
            count, mean, variance = numbers_3D[0, d], numbers_3D[1, d], numbers_3D[2, d]
            x = np.float64(numeric_BD[b, d])
            out_BD[b, d] = min(max((x - mean) * _inverse(mean, variance), -CLIP), CLIP)
            away = x - mean
            if count >= _EARLY and variance > 0:
                most = CLIP * math.sqrt(variance)
                away = min(max(away, -most), most)
            count = min(count + 1.0, MEMORY)
            mean += away / count
            variance += (away * away * (1.0 - 1.0 / count) - variance) / count
            numbers_3D[0, d], numbers_3D[1, d], numbers_3D[2, d] = count, mean, variance


@numba.njit(cache=True)
def _known(kind: int, target_3: Float64s) -> tuple[float, float]:
    mean = target_3[1]
    if kind == LOG_LOSS:
        return math.log(mean / (1.0 - mean)), 1.0
    return mean, math.sqrt(max(target_3[2] - mean * mean, 0.0))


@numba.njit(cache=True)
def _take(
    kind_T: Int8s,
    own_T: Bools,
    power_T: Float64s,
    label_B: Float32s,
    weight_B: Float64s,
    task_B: Int8s,
    more_B: Bools,
    targets_3T: Float64s,
    before_2B: Float64s,
    after_2B: Float64s,
) -> None:
    for b in range(label_B.shape[0]):
        task = task_B[b]
        if not own_T[task]:
            before_2B[:, b], after_2B[:, b] = (0.0, 1.0), (0.0, 1.0)
            continue
        before_2B[0, b], before_2B[1, b] = _known(kind_T[task], targets_3T[:, task])
        weight, y, count = weight_B[b], float(label_B[b]), targets_3T[0, task]
        if kind_T[task] == LOG_LOSS:
            y = min(y, 1.0)
        if weight > 0:
            power = power_T[task]
            wide, most = weight * (power + 1.0), MEMORY * (power + 1.0)
            if not more_B[b]:
                count = min(count + weight, most + weight)
            over = count + power
            if power > 0:
                wide = min(wide, over)
            if not more_B[b]:
                targets_3T[1, task] -= wide * targets_3T[1, task] / over
                targets_3T[2, task] -= wide * targets_3T[2, task] / over
            if count > 0:
                targets_3T[1, task] += wide * y / over
                targets_3T[2, task] += wide * y * y / over
            targets_3T[0, task] = count
            if kind_T[task] == LOG_LOSS:
                targets_3T[1, task] = min(max(targets_3T[1, task], _LEAST), 1.0 - _LEAST)
        after_2B[0, b], after_2B[1, b] = _known(kind_T[task], targets_3T[:, task])
