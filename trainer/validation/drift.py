"""Watches the label rate: a sudden change is reported once, with numbers, and the new rate is the usual one then.

A closed window of impression time has a rate that no late label changes any more. Windows are put together to groups of
`SAMPLES_MIN` samples. The newest group, and the newest two, four and eight together, are compared with the usual rate,
that of up to `PAST` groups before them. The score counts the difference in units of what chance and the past's own ups
and downs explain:

    score = (a(rate) - a(usual)) / sqrt(1 / n + 1 / n_past + spread^2 (1 + 1 / k))
    a = 2 arcsin sqrt((positives + 3/8) / (samples + 3/4))

a makes the variance of a rate 1 / n whatever the rate is (Anscombe, Biometrika 1948), so that rare clicks raise no
false alarm. `spread` is how much the k past rates vary beyond chance, by their median absolute deviation, so that one
group with both sides of a change in it does not hide the change; daily ups and downs are part of the usual. A change
is sudden where |score| >= `SCORE_MIN` and the rate moved by at least `MOVE_MIN` of the usual one: the first condition
keeps chance out, the second changes too small to matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from headrace.trainer.validation.figures import Float64s

PAST = 24
PAST_MIN = 10
"""Fewest groups that make a usual rate."""
SAMPLES_MIN = 1_000
SCORE_MIN = 6.0
MOVE_MIN = 0.2
_TOGETHER = (1, 2, 4, 8)
_MAD = 1.4826
"""A normal distribution's standard deviation in units of its median absolute deviation."""


@dataclass(frozen=True)
class RateChange:
    """The newest label rate compared with the usual one; `is_sudden` where it deserves an alarm."""

    rate: float
    usual: float
    """NaN while too little is known."""
    score: float
    samples: int
    is_sudden: bool


class LabelRateWatch:
    """Watches the label rate of one task. Takes closed windows in order."""

    def __init__(self) -> None:
        self._groups_K2: Float64s = np.zeros((0, 2))
        """Past groups, oldest first: positives, samples."""
        self._open_2: Float64s = np.zeros(2)

    def take(self, positives: float, samples: int) -> RateChange | None:
        """Count a closed window. Return what the group that it completes says; None while the group is too small."""
        self._open_2 = self._open_2 + np.array([positives, samples])
        if self._open_2[1] < SAMPLES_MIN:
            return None
        self._groups_K2 = np.concatenate([self._groups_K2, self._open_2[None]])[-(PAST + max(_TOGETHER)) :]
        self._open_2 = np.zeros(2)
        newest = self._groups_K2[-1]
        found = RateChange(float(newest[0] / newest[1]), math.nan, 0.0, int(newest[1]), False)
        for together in _TOGETHER:
            past_K2, new_M2 = self._groups_K2[:-together], self._groups_K2[-together:]
            if len(past_K2) < PAST_MIN:
                continue
            change = _compared(new_M2, past_K2)
            if abs(change.score) > abs(found.score) or math.isnan(found.usual):
                found = change
        if found.is_sudden:
            self._groups_K2 = np.zeros((0, 2))
        return found

    def state(self) -> Float64s:
        """Return everything as one array; `load` takes it."""
        return np.concatenate([self._groups_K2, self._open_2[None]])

    def load(self, state: Float64s) -> None:
        """Replace everything by what `state` returned."""
        self._groups_K2, self._open_2 = np.array(state[:-1], np.float64), np.array(state[-1], np.float64)


def _compared(new_M2: Float64s, past_K2: Float64s) -> RateChange:
    positives, past = (float(x) for x in past_K2.sum(axis=0))
    clicks, n = (float(x) for x in new_M2.sum(axis=0))
    usual, rate = positives / past, clicks / n
    angle_K = _angle(past_K2[:, 0], past_K2[:, 1])
    varied = _MAD * float(np.median(np.abs(angle_K - np.median(angle_K))))
    # Twice what chance alone makes: a spread from so few groups is itself uncertain by half.
    spread_squared = max(varied**2 - 2 * float((1 / past_K2[:, 1]).mean()), 0.0)
    apart = float(_angle(clicks, n) - _angle(positives, past))
    score = apart / math.sqrt(1 / n + 1 / past + spread_squared * (1 + 1 / len(past_K2)))
    is_sudden = abs(score) >= SCORE_MIN and abs(rate - usual) >= MOVE_MIN * usual
    return RateChange(rate, usual, score, int(n), is_sudden)


def _angle(positives: float | Float64s, samples: float | Float64s) -> Float64s:
    return np.asarray(2 * np.arcsin(np.sqrt((positives + 3 / 8) / (samples + 3 / 4))))
