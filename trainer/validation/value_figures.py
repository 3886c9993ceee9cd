"""The figures of tasks that learn a value: mean and root mean square error, concordance, calibration.

A tally has a histogram of what was said by the value that came: 1,025 bins of the one, 129 of the other, 8 and 1 an
octave. So tallies add up as those of `figures` do. The constant is the windows' own mean.

**Concordance** is the share of pairs of impressions with different values that are scored in the order of their values,
equal scores counting half. It is 0.5 for a constant; of values 0 and 1 it is the AUC. Values within one bin, a factor
of 2, count as equal, and scores within one bin too.

Source: Harrell et al., JAMA 1982, without censoring.

Axes: B samples, V bins of values, P bins of scores, G slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headrace.trainer.model.tables.table import Int64s
from headrace.trainer.validation.figures import Float64s, Scored, State

_SCORE_BINS, _VALUE_BINS = 8, 1
"""An octave."""
_LEAST, _OCTAVES = -24.0, 64
"""From 2^-24 on, both ways; nearer to 0 is 0."""


@dataclass(frozen=True)
class ValueFigures:
    """The figures of a tally. One is NaN where it has no meaning."""

    samples: int
    mae: float
    rmse: float
    mae_constant: float
    """Of the values' own mean, which a constant could say at best."""
    rmse_constant: float
    """The values' standard deviation."""
    concordance: float
    concordance_item_rate: float
    """Of the item's mean value so far."""
    label_rate: float
    """Mean of the values."""
    predicted_rate: float
    """Mean of what was said."""
    auc_constant: float = 0.5

    @property
    def calibration(self) -> float:
        """Sum of what was said by the sum of the values: 1 is right, above 1 it says too much."""
        return self.predicted_rate / self.label_rate if self.label_rate else math.nan

    def shown(self) -> dict[str, float]:
        """Return the figures that every task and slice has, by the name of their metric."""
        return {
            "mae": self.mae,
            "rmse": self.rmse,
            "concordance": self.concordance,
            "calibration": self.calibration,
        }

    def beside(self) -> dict[str, float]:
        """Return the baselines."""
        return {
            "concordance_item_rate": self.concordance_item_rate,
            "mae_constant": self.mae_constant,
            "rmse_constant": self.rmse_constant,
        }


class ValueTally:
    """Counts of one task's samples by score and value. Slices have no concordance: their sums alone are kept."""

    def __init__(self) -> None:
        scores, values = _bins(_SCORE_BINS), _bins(_VALUE_BINS)
        self.model_VP: Float64s = np.zeros((values, scores))
        self.item_VP: Float64s = np.zeros((values, scores))
        self.values_V: Float64s = np.zeros(values)
        """Sum of the values, by bin."""
        self.sums_6: Float64s = np.zeros(6)
        self.slice_sums_G6: Float64s = np.zeros((0, 6))

    def add(self, scored: Scored) -> None:
        """Count scored samples."""
        value_B = scored.label_B.astype(np.float64)
        self._count(scored, value_B, 1.0)
        if scored.correction_B.any():
            back = scored.where(scored.correction_B)
            self._count(back, np.zeros(len(back.score_B)), -1.0)

    def _count(self, scored: Scored, value_B: Float64s, amount: float) -> None:
        said_B = scored.score_B.astype(np.float64)
        error_B = said_B - value_B
        sums_B6 = np.stack([np.ones(len(said_B)), np.abs(error_B), error_B**2, value_B, value_B**2, said_B], axis=1)
        self.sums_6 += amount * sums_B6.sum(axis=0)
        value_bin_B = bins_of(value_B, _VALUE_BINS)
        np.add.at(self.model_VP, (value_bin_B, bins_of(said_B, _SCORE_BINS)), amount)
        item_bin_B = bins_of(scored.item_B.astype(np.float64), _SCORE_BINS)
        np.add.at(self.item_VP, (value_bin_B, item_bin_B), amount)
        np.add.at(self.values_V, value_bin_B, amount * value_B)
        if scored.groups_BK.size:
            self._reserve(int(scored.groups_BK.max()) + 1)
            for group_B in scored.groups_BK.T:
                in_B = group_B >= 0
                np.add.at(self.slice_sums_G6, group_B[in_B], amount * sums_B6[in_B])

    def merge(self, other: ValueTally) -> None:
        """Add what `other` counted."""
        self.model_VP += other.model_VP
        self.item_VP += other.item_VP
        self.values_V += other.values_V
        self.sums_6 += other.sums_6
        self._reserve(len(other.slice_sums_G6))
        self.slice_sums_G6[: len(other.slice_sums_G6)] += other.slice_sums_G6

    @property
    def balance(self) -> tuple[float, float, float]:
        """Samples, sum of their values, sum of what was said."""
        return float(self.sums_6[0]), float(self.sums_6[3]), float(self.sums_6[5])

    @property
    def positives(self) -> float:
        """How many samples have a value other than 0."""
        return float(self.model_VP.sum() - self.model_VP[len(self.model_VP) // 2].sum())

    def figures(self) -> ValueFigures:
        """Return the figures of all samples."""
        count, mean = self.sums_6[0], self.sums_6[3] / self.sums_6[0] if self.sums_6[0] else math.nan
        apart_V = np.abs(self.values_V - self.model_VP.sum(axis=1) * mean)
        mae = float(apart_V.sum() / count) if count else math.nan
        return _figures(self.sums_6, mae, concordance(self.model_VP), concordance(self.item_VP))

    def slice_figures(self) -> dict[int, ValueFigures]:
        """Return the figures of each slice that has samples."""
        nan = math.nan
        return {
            int(g): _figures(self.slice_sums_G6[g], nan, nan, nan) for g in np.flatnonzero(self.slice_sums_G6[:, 0])
        }

    def state(self) -> State:
        """Return everything; `load` takes it. The histograms are nearly empty: cells and counts are kept."""
        out: State = {"values": self.values_V.copy(), "sums": self.sums_6.copy(), "slices": self.slice_sums_G6.copy()}
        for name, histogram_VP in (("model", self.model_VP), ("item", self.item_VP)):
            cell_C = np.flatnonzero(histogram_VP)
            out |= {f"{name}_cells": cell_C, f"{name}_counts": histogram_VP.reshape(-1)[cell_C]}
        return out

    @staticmethod
    def load(state: Mapping[str, np.ndarray]) -> ValueTally:
        """Return the tally whose `state` this is."""
        tally = ValueTally()
        tally.values_V, tally.sums_6 = np.array(state["values"], np.float64), np.array(state["sums"], np.float64)
        tally.slice_sums_G6 = np.array(state["slices"], np.float64)
        for name, histogram_VP in (("model", tally.model_VP), ("item", tally.item_VP)):
            histogram_VP.reshape(-1)[state[f"{name}_cells"]] = state[f"{name}_counts"]
        return tally

    def _reserve(self, groups: int) -> None:
        missing = groups - len(self.slice_sums_G6)
        if missing > 0:
            self.slice_sums_G6 = np.concatenate([self.slice_sums_G6, np.zeros((missing, 6))])


def _bins(octave: int) -> int:
    return 2 * octave * _OCTAVES + 1


def bins_of(number_B: Float64s, octave: int) -> Int64s:
    """Return the bin of numbers by their size, `octave` bins for a factor of 2, ascending: int64 [B]."""
    most = octave * _OCTAVES
    with np.errstate(divide="ignore"):
        size_B = np.floor((np.log2(np.abs(number_B)) - _LEAST) * octave) + 1
    bin_B: Int64s = (most + np.sign(number_B) * np.clip(size_B, 0, most)).astype(np.int64)
    return bin_B


def concordance(histogram_VP: Float64s) -> float:
    """Return the share of pairs of different values that are in the right order; NaN without such a pair."""
    above_VP = histogram_VP[1:]
    lower_VP = np.cumsum(histogram_VP, axis=0)[:-1]
    beside_VP = np.cumsum(lower_VP, axis=1) - lower_VP / 2
    pairs = float((above_VP.sum(axis=1) * lower_VP.sum(axis=1)).sum())
    return float((above_VP * beside_VP).sum() / pairs) if pairs > 0 else math.nan


def _figures(sums_6: Float64s, mae_constant: float, ordered: float, item_ordered: float) -> ValueFigures:
    count, errors, squares, values, value_squares, said = (float(x) for x in sums_6)
    if count <= 0:
        nan = math.nan
        return ValueFigures(0, nan, nan, nan, nan, nan, nan, nan, nan)
    mean = values / count
    return ValueFigures(
        samples=int(count),
        mae=errors / count,
        rmse=math.sqrt(max(squares / count, 0.0)),
        mae_constant=mae_constant,
        rmse_constant=math.sqrt(max(value_squares / count - mean * mean, 0.0)),
        concordance=ordered,
        concordance_item_rate=item_ordered,
        label_rate=mean,
        predicted_rate=said / count,
    )
