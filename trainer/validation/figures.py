"""The figures of progressive validation, from histograms: log loss, normalized entropy, AUC, calibration.

A tally counts scores by label in logit bins: 4,096 for all samples, 1,024 for a slice; ties within a bin count half in
the AUC. Tallies of windows add up to the tally of all of them, to the bit that floating point sums allow.

A correction is a positive that comes beside the negative that was counted before it (policy `eager`, late feedback): it
is counted as a positive, and its negative is taken back by the same score.

Axes: B samples, N bins, G slices, 2 labels (negative first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.table import Int64s

BINS, SLICE_BINS = 4_096, 1_024
_LOGIT_MAX = 8.0
_SCORE_MIN = 1e-6

Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
State = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Figures:
    """The figures of a tally. One is NaN where it has no meaning, such as `auc` while only one label was seen."""

    samples: int
    auc: float
    auc_item_rate: float
    log_loss: float
    log_loss_constant: float
    """The entropy of the base rate: the log loss of a model that knows that rate and nothing else."""
    label_rate: float = math.nan
    predicted_rate: float = math.nan
    """Mean of the scores."""
    auc_constant: float = 0.5

    @property
    def normalized_entropy(self) -> float:
        """Log loss by the base rate's entropy: below 1 is better than the constant.

        Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014, section 3.
        """
        return self.log_loss / self.log_loss_constant if self.log_loss_constant > 0 else math.nan

    @property
    def calibration(self) -> float:
        """Predicted positives by observed ones: 1 is right, above 1 it predicts too many. Source: the same."""
        return self.predicted_rate / self.label_rate if self.label_rate > 0 else math.nan

    def shown(self) -> dict[str, float]:
        """Return the four figures that every task and slice has, by the name of their metric."""
        return {
            "auc": self.auc,
            "log_loss": self.log_loss,
            "normalized_entropy": self.normalized_entropy,
            "calibration": self.calibration,
        }

    def beside(self) -> dict[str, float]:
        """Return the baselines."""
        return {"auc_item_rate": self.auc_item_rate, "log_loss_constant": self.log_loss_constant}


@dataclass(frozen=True)
class Scored:
    """Samples of one task with their scores. `groups_BK` are their slices, -1 for none."""

    score_B: Float32s
    item_B: Float32s
    positive_B: Bools
    correction_B: Bools
    groups_BK: Int64s
    label_B: Float32s = field(default_factory=lambda: np.empty(0, np.float32))
    """Values, of a task that learns one."""

    def where(self, keep_B: Bools) -> Scored:
        """Return the samples that `keep_B` marks, in their order."""
        return Scored(
            self.score_B[keep_B],
            self.item_B[keep_B],
            self.positive_B[keep_B],
            self.correction_B[keep_B],
            self.groups_BK[keep_B],
            self.label_B[keep_B] if len(self.label_B) else self.label_B,
        )


class Tally:
    """Counts of one task's samples by score: in all, by slice, and in all by the item rate's score."""

    def __init__(self) -> None:
        self.model_2N: Float64s = np.zeros((2, BINS))
        self.item_2N: Float64s = np.zeros((2, BINS))
        self.sums_2: Float64s = np.zeros(2)
        """Sum of the log losses, sum of the scores."""
        self.slices_G2N: Float64s = np.zeros((0, 2, SLICE_BINS))
        self.slice_sums_G2: Float64s = np.zeros((0, 2))

    def add(self, scored: Scored) -> None:
        """Count scored samples."""
        self._count(scored, scored.positive_B, 1.0)
        if scored.correction_B.any():
            back = scored.where(scored.correction_B)
            self._count(back, np.zeros(len(back.score_B), np.bool_), -1.0)

    def merge(self, other: Tally) -> None:
        """Add what `other` counted."""
        self.model_2N += other.model_2N
        self.item_2N += other.item_2N
        self.sums_2 += other.sums_2
        groups = len(other.slices_G2N)
        self._reserve(groups)
        self.slices_G2N[:groups] += other.slices_G2N
        self.slice_sums_G2[:groups] += other.slice_sums_G2

    @property
    def balance(self) -> tuple[float, float, float]:
        """Samples, sum of their labels, sum of the scores."""
        return float(self.model_2N.sum()), self.positives, float(self.sums_2[1])

    @property
    def positives(self) -> float:
        """How many samples are positive."""
        return float(self.model_2N[1].sum())

    def figures(self) -> Figures:
        """Return the figures of all samples."""
        return _figures(self.model_2N, self.sums_2, area_under_curve(self.item_2N))

    def slice_figures(self) -> dict[int, Figures]:
        """Return the figures of each slice that has samples."""
        full_G = self.slices_G2N.sum(axis=(1, 2)) > 0
        return {int(g): _figures(self.slices_G2N[g], self.slice_sums_G2[g], math.nan) for g in np.flatnonzero(full_G)}

    def state(self) -> State:
        """Return everything; `load` takes it."""
        return {
            "model": self.model_2N.copy(),
            "item": self.item_2N.copy(),
            "sums": self.sums_2.copy(),
            "slices": self.slices_G2N.copy(),
            "slice_sums": self.slice_sums_G2.copy(),
        }

    @staticmethod
    def load(state: Mapping[str, npt.NDArray[np.generic]]) -> Tally:
        """Return the tally whose `state` this is."""
        tally = Tally()
        tally.model_2N, tally.item_2N = np.array(state["model"], np.float64), np.array(state["item"], np.float64)
        tally.sums_2 = np.array(state["sums"], np.float64)
        tally.slices_G2N = np.array(state["slices"], np.float64)
        tally.slice_sums_G2 = np.array(state["slice_sums"], np.float64)
        return tally

    def _count(self, scored: Scored, positive_B: Bools, amount: float) -> None:
        p_B = np.clip(scored.score_B.astype(np.float64), _SCORE_MIN, 1 - _SCORE_MIN)
        loss_B = -np.log(np.where(positive_B, p_B, 1 - p_B))
        label_B = positive_B.astype(np.int64)
        self.sums_2 += (amount * float(loss_B.sum()), amount * float(p_B.sum()))
        self.model_2N += amount * _histogram(label_B, bins_of(p_B, BINS), BINS)
        item_B = np.clip(scored.item_B.astype(np.float64), _SCORE_MIN, 1 - _SCORE_MIN)
        self.item_2N += amount * _histogram(label_B, bins_of(item_B, BINS), BINS)
        if not scored.groups_BK.size:
            return
        groups = int(scored.groups_BK.max()) + 1
        self._reserve(groups)
        bin_B = bins_of(p_B, SLICE_BINS)
        for group_B in scored.groups_BK.T:
            in_B = group_B >= 0
            cell_B = (group_B[in_B] * 2 + label_B[in_B]) * SLICE_BINS + bin_B[in_B]
            cell_C, count_C = np.unique(cell_B, return_counts=True)
            self.slices_G2N.reshape(-1)[cell_C] += amount * count_C
            for at, value_B in ((0, loss_B), (1, p_B)):
                self.slice_sums_G2[:groups, at] += amount * np.bincount(group_B[in_B], value_B[in_B], groups)

    def _reserve(self, groups: int) -> None:
        missing = groups - len(self.slices_G2N)
        if missing > 0:
            self.slices_G2N = np.concatenate([self.slices_G2N, np.zeros((missing, 2, SLICE_BINS))])
            self.slice_sums_G2 = np.concatenate([self.slice_sums_G2, np.zeros((missing, 2))])


def bins_of(p_B: Float64s, bins: int) -> Int64s:
    """Return the logit bin of probabilities that lie strictly between 0 and 1: int64 [B]."""
    logit_B = np.clip(np.log(p_B / (1 - p_B)), -_LOGIT_MAX, _LOGIT_MAX)
    bin_B: Int64s = np.minimum(((logit_B + _LOGIT_MAX) * (bins / (2 * _LOGIT_MAX))).astype(np.int64), bins - 1)
    return bin_B


def area_under_curve(histogram_2N: Float64s) -> float:
    """Return the AUC of binned scores, negatives first; NaN without both labels. Source: Mann, Whitney, 1947."""
    negative_N, positive_N = histogram_2N
    pairs = negative_N.sum() * positive_N.sum()
    below_N = np.cumsum(negative_N) - negative_N
    return float((positive_N * (below_N + negative_N / 2)).sum() / pairs) if pairs else math.nan


def _histogram(label_B: Int64s, bin_B: Int64s, bins: int) -> Float64s:
    counts: Float64s = np.bincount(label_B * bins + bin_B, minlength=2 * bins).reshape(2, bins).astype(np.float64)
    return counts


def _figures(histogram_2N: Float64s, sums_2: Float64s, auc_item_rate: float) -> Figures:
    negatives, positives = histogram_2N.sum(axis=1)
    total = negatives + positives
    rate = positives / total if total else 0.5
    entropy = -sum(x * math.log(x) for x in (rate, 1 - rate) if x > 0)
    return Figures(
        samples=int(total),
        auc=area_under_curve(histogram_2N),
        auc_item_rate=auc_item_rate,
        log_loss=float(sums_2[0]) / total if total else math.nan,
        log_loss_constant=float(entropy),
        label_rate=float(rate) if total else math.nan,
        predicted_rate=float(sums_2[1]) / total if total else math.nan,
    )
