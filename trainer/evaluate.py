"""Progressive validation that does not peek: each sample is scored by a model that knew nothing later than it.

Positives come soon and negatives at the window's end, so a score taken when the sample is *learnt* gives away its
label (on KuaiRand it shows an AUC of 0.96). Instead the newest of a few lagged copies scores it whose knowledge ends
before the impression, whatever the label. Copies are taken on a grid of event time and hold values only. Scores are
grouped by impression time and count once their window is closed. Stored samples come in event-time order with their
labels, so there the score just before learning is honest.

Baselines, by the same rules: the constant (AUC 0.5; its log loss is that of the windows' own base rate) and the
item's click rate so far. AUC comes from histograms of 4,096 logit bins, ties within a bin count half.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import Learner
from headrace.trainer.model.scoring import Float32s, score
from headrace.trainer.model.tables import Int64s, KeyIndex, initial_values

BINS = 4_096
COPIES = 8
_LOGIT_MAX = 8.0
_PRIOR, _STRENGTH = 0.5, 10.0
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """Over all closed windows, or the newest one. `auc` values are NaN while only one label was seen."""

    samples: int
    auc: float
    auc_item_rate: float
    log_loss: float
    log_loss_constant: float
    auc_constant: float = 0.5


@dataclass
class _Copy:
    known_ms: int
    values_RV: Float32s
    dense: dict[str, Float32s]
    counts_R2: Float64s


class Tally:
    """Histograms of scores by label: the model's and the item rate's, and sums for the log loss."""

    def __init__(self) -> None:
        self.model_2N: Float64s = np.zeros((2, BINS))
        self.item_2N: Float64s = np.zeros((2, BINS))
        self.loss = 0.0

    def add(self, score_B: Float32s, item_B: Float32s, positive_B: npt.NDArray[np.bool_]) -> None:
        """Count scored samples."""
        p_B = np.clip(score_B.astype(np.float64), 1e-6, 1 - 1e-6)
        self.loss -= float(np.log(np.where(positive_B, p_B, 1 - p_B)).sum())
        for histogram_2N, values_B in ((self.model_2N, p_B), (self.item_2N, item_B.astype(np.float64))):
            values_B = np.clip(values_B, 1e-6, 1 - 1e-6)
            logit_B = np.clip(np.log(values_B / (1 - values_B)), -_LOGIT_MAX, _LOGIT_MAX)
            bin_B = np.minimum(((logit_B + _LOGIT_MAX) * (BINS / (2 * _LOGIT_MAX))).astype(np.int64), BINS - 1)
            for label in (0, 1):
                histogram_2N[label] += np.bincount(bin_B[positive_B == bool(label)], minlength=BINS)

    def merge(self, other: Tally) -> None:
        """Add what `other` counted."""
        self.model_2N += other.model_2N
        self.item_2N += other.item_2N
        self.loss += other.loss

    def figures(self) -> Figures:
        """Return the figures so far."""
        negatives, positives = self.model_2N.sum(axis=1)
        total = negatives + positives
        rate = positives / total if total else 0.5
        entropy = -sum(x * np.log(x) for x in (rate, 1 - rate) if x > 0)
        return Figures(
            int(total),
            area_under_curve(self.model_2N),
            area_under_curve(self.item_2N),
            self.loss / total if total else float("nan"),
            float(entropy),
        )


def area_under_curve(histogram_2N: Float64s) -> float:
    """Return the AUC of binned scores, negatives first; NaN without both labels. Source: Mann, Whitney, 1947."""
    negative_N, positive_N = histogram_2N
    pairs = negative_N.sum() * positive_N.sum()
    below_N = np.cumsum(negative_N) - negative_N
    return float((positive_N * (below_N + negative_N / 2)).sum() / pairs) if pairs else float("nan")


class Evaluation:
    """Scores samples honestly and keeps the figures. Changes nothing of the learner."""

    def __init__(self, features: FeatureSpec, *, window_ms: int, key_field: str) -> None:
        self.grid_ms = max(window_ms // 4, 100)
        self.span_ms = max(5 * window_ms, 10_000)
        self.close_after_ms = window_ms
        self.item_slot = item_slot(features, key_field)
        self.known_ms = -1
        self.total, self.newest = Tally(), Tally()
        self.unscored = 0
        """Samples that no copy could score: those of the first moments after a start, and very late ones."""
        self._open: dict[int, Tally] = {}
        self._closed_below = -1
        self._copies: deque[_Copy] = deque(maxlen=COPIES)
        self._items = KeyIndex()
        self._counts_R2: Float64s = np.zeros((0, 2))

    def before(self, learner: Learner, batch: Batch) -> tuple[Float32s, Float32s]:
        """Return the scores of the model and of the item rate for a live batch; NaN where no copy is old enough.

        Call it before the batch is learnt.
        """
        score_B, item_B = np.full(len(batch), np.nan, np.float32), np.full(len(batch), np.nan, np.float32)
        which_B = np.searchsorted([c.known_ms for c in self._copies], batch.event_time_ms_B, side="right") - 1
        for which in np.unique(which_B[which_B >= 0]):
            copy, here_B = self._copies[which], which_B == which
            score_B[here_B] = score(
                batch.slots_BF[here_B],
                batch.numeric_BD[here_B],
                lookup=lambda keys, c=copy: _lookup(learner, c, keys),  # type: ignore[misc]
                dense=copy.dense,
            )
            item_B[here_B] = self._item_rate(batch.where(here_B), copy.counts_R2)
        return score_B, item_B

    def item_rate(self, batch: Batch) -> Float32s:
        """Return the items' click rate as of now."""
        return self._item_rate(batch, self._counts_R2)

    def after(
        self, learner: Learner, batch: Batch, score_B: Float32s, item_B: Float32s, known_ms_B: Int64s
    ) -> list[tuple[int, Figures]]:
        """Count a batch that was learnt; return (end of window in event time, figures) of windows that it closed."""
        good_B = np.isfinite(score_B)
        self.unscored += int((~good_B).sum())
        window_B = batch.event_time_ms_B // self.span_ms
        for window in np.unique(window_B[good_B]):
            here_B = good_B & (window_B == window)
            late = int(window) <= self._closed_below
            tally = self.total if late else self._open.setdefault(int(window), Tally())
            tally.add(score_B[here_B], item_B[here_B], batch.label_B[here_B] > 0.5)
        self._count_items(batch)
        known = max(self.known_ms, int(known_ms_B.max(initial=-1)))
        if known // self.grid_ms > self.known_ms // self.grid_ms or not self._copies:
            n = len(learner.table)
            self._copies.append(
                _Copy(known, learner.table.values_RV[:n].copy(), learner.dense.dense(), self._counts_R2.copy())
            )
        self.known_ms = known
        return self._close()

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what a checkpoint keeps; lagged copies are not kept, so a restart leaves a window unscored."""
        windows = sorted(self._open)
        tallies = [self.total, self.newest, *(self._open[w] for w in windows)]
        return {
            "windows": np.array(windows, np.int64),
            "times": np.array([self.known_ms, self._closed_below, self.unscored], np.int64),
            "model": np.stack([t.model_2N for t in tallies]),
            "item": np.stack([t.item_2N for t in tallies]),
            "loss": np.array([t.loss for t in tallies]),
            "item_keys": self._items.keys_R[: len(self._items)].copy(),
            "item_counts": self._counts_R2[: len(self._items)].copy(),
        }

    def load(self, state: dict[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        tallies = []
        for model, item, loss in zip(state["model"], state["item"], state["loss"], strict=True):
            tally = Tally()
            tally.model_2N, tally.item_2N, tally.loss = np.array(model), np.array(item), float(loss)
            tallies.append(tally)
        self.total, self.newest = tallies[0], tallies[1]
        self._open = {int(w): t for w, t in zip(state["windows"], tallies[2:], strict=True)}
        self.known_ms, self._closed_below, self.unscored = (int(x) for x in state["times"])
        self._copies.clear()
        self._items = KeyIndex()
        self._items.insert(state["item_keys"].astype(np.int64))
        self._counts_R2 = np.array(state["item_counts"], np.float64)

    def _close(self) -> list[tuple[int, Figures]]:
        closed = []
        for window in sorted(self._open):
            end = (window + 1) * self.span_ms
            if end + self.close_after_ms > self.known_ms:
                break
            self.newest = self._open.pop(window)
            self.total.merge(self.newest)
            self._closed_below = window
            closed.append((end, self.newest.figures()))
        return closed

    def _item_rate(self, batch: Batch, counts_R2: Float64s) -> Float32s:
        if self.item_slot < 0:
            return np.full(len(batch), _PRIOR, np.float32)
        rows_B = self._items.find(batch.slots_BF[:, self.item_slot])
        known_B = (rows_B >= 0) & (rows_B < len(counts_R2))
        clicks_B, shown_B = np.zeros(len(batch)), np.zeros(len(batch))
        clicks_B[known_B], shown_B[known_B] = counts_R2[rows_B[known_B]].T
        rate_B: Float32s = ((clicks_B + _PRIOR * _STRENGTH) / (shown_B + _STRENGTH)).astype(np.float32)
        return rate_B

    def _count_items(self, batch: Batch) -> None:
        if self.item_slot < 0:
            return
        rows_B = self._items.insert(batch.slots_BF[:, self.item_slot])
        missing = len(self._items) - len(self._counts_R2)
        if missing > 0:
            self._counts_R2 = np.concatenate([self._counts_R2, np.zeros((missing, 2))])
        clicks_R, shown_R = self._counts_R2[:, 0], self._counts_R2[:, 1]
        np.add.at(clicks_R, rows_B, batch.label_B)
        np.add.at(shown_R, rows_B, 1.0)


def item_slot(features: FeatureSpec, key_field: str) -> int:
    """Return which slot holds the item: the key of the first counter that is not the partition key; -1 without one.

    >>> item_slot(FeatureSpec(features=(Categorical(field="user"), Categorical(field="item"))), "user")
    1
    """
    names = [
        feature.field if isinstance(feature, Categorical) else ""
        for feature in features.features
        for _ in range(feature.slots)
    ]
    counted = [c.key for c in features.counters if c.key != key_field]
    wanted = [*counted, *(name for name in names if name not in ("", key_field))]
    return next((names.index(name) for name in wanted if name in names), -1)


def _lookup(learner: Learner, copy: _Copy, keys_K: Int64s) -> Float32s:
    table = learner.table
    rows_K = table.index.find(keys_K)
    missing_K = (rows_K < 0) | (rows_K >= len(copy.values_RV))
    out_KV = np.empty((len(keys_K), 1 + table.dim), np.float32)
    out_KV[~missing_K] = copy.values_RV[rows_K[~missing_K]]
    if missing_K.any():
        out_KV[missing_K] = initial_values(keys_K[missing_K], dim=table.dim, seed=table.seed, scale=table.scale)
    return out_KV
