"""Progressive validation without hindsight: each sample is scored by a model that knew nothing later than it.

Positives come soon and negatives at the window's end, so a score taken when the sample is *learnt* gives away its
label (on KuaiRand it shows an AUC of 0.96). Instead a few lagged models are kept, and the newest one whose knowledge
ends before the impression scores it, whatever the label. Scores are grouped by impression time and count once their
window is closed. Stored samples come in event-time order with their labels, so there the score just before learning is
honest.

Lagged models are not copies. At each step of a grid of event time an overlay begins. While it is the newest, it keeps,
of the keys that learning touches, the values that they had when it began. The lagged model of an overlay is the
learner's values of today, replaced by the old values of the overlays, from the newest down to that one. So memory
follows what `OVERLAYS` grid steps touch and not the table, and any learner that can look up and score can be evaluated.
A row that expired since then scores as one that was never learnt.

Baselines, by the same rules: the constant (AUC 0.5; its log loss is that of the windows' own base rate) and the item's
click rate so far. Figures are kept for each task, and for each slice of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.project import Task
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.scoring import Float32s, Lookup
from headrace.trainer.model.tables.table import Int64s, KeyIndex
from headrace.trainer.validation.drift import LabelRateWatch, RateChange
from headrace.trainer.validation.figures import Bools, Figures, Float64s, Scored, State, Tally
from headrace.trainer.validation.slices import Slices

logger = logging.getLogger("headrace.train")

OVERLAYS = 8
FORMAT = 2
"""The format of `state`. Figures begin anew where a checkpoint holds another."""
_PRIOR, _STRENGTH = 0.5, 10.0


@dataclass(frozen=True)
class ClosedWindow:
    """A window of impression time of one task that is over: none of its labels is still to come."""

    end_ms: int
    task: str
    figures: Figures
    slices: Mapping[str, Figures]
    change: RateChange | None
    """The label rate compared with the usual one; None while too few samples came since the last comparison."""


class Scorer(Protocol):
    """What evaluation needs of a learner."""

    def score(self, batch: Batch, *, lookup: Lookup, dense: Mapping[str, Float32s]) -> Float32s:
        """Return the scores that these weights give in place of the learner's: float32 [B]."""

    def lookup(self, keys_K: Int64s) -> Float32s:
        """Return the values of keys, the initial ones where a key has no row: float32 [K, V]."""

    def dense(self) -> dict[str, Float32s]:
        """Return copies of all other weights by name."""


class _OldValues:
    """The values that keys had when they were first touched, one row for each key."""

    def __init__(self, width: int, kind: type[np.float32] | type[np.float64]) -> None:
        self.index = KeyIndex()
        self._kind = kind
        self._values_RV: npt.NDArray[np.floating] = np.empty((1_024, width), kind)

    def remember(self, keys_K: Int64s, values_of: Callable[[Int64s], npt.NDArray[np.floating]]) -> None:
        """Keep the present values of those keys that have none here yet."""
        before = len(self.index)
        self.index.insert(keys_K)
        count = len(self.index)
        if count == before:
            return
        if count > len(self._values_RV):
            room = max(count, 2 * len(self._values_RV))
            grown_RV = np.empty((room, self._values_RV.shape[1]), self._kind)
            grown_RV[:before] = self._values_RV[:before]
            self._values_RV = grown_RV
        self._values_RV[before:count] = values_of(self.index.keys_R[before:count].copy())

    def put_over(self, keys_K: Int64s, values_KV: npt.NDArray[np.floating]) -> None:
        """Replace values by the old ones, where a key has one here."""
        rows_K = self.index.find(keys_K)
        kept_K = rows_K >= 0
        values_KV[kept_K] = self._values_RV[rows_K[kept_K]]


@dataclass
class _Overlay:
    known_ms: int
    dense: dict[str, Float32s]
    rows: _OldValues
    items: _OldValues


class Evaluation:
    """Scores samples honestly and keeps the figures. Changes nothing of the learner."""

    def __init__(self, features: FeatureSpec, tasks: Sequence[Task], *, key_field: str, slices: Slices) -> None:
        window_ms = max(task.window_ms + task.correct_ms for task in tasks)
        self.tasks, self.slices = tuple(task.name for task in tasks), slices
        self.grid_ms = max(max(task.window_ms for task in tasks) // 4, 100)
        self.span_ms = max(5 * max(task.window_ms for task in tasks), 10_000)
        self.close_after_ms = window_ms
        self.item_slot = item_slot(features, key_field)
        self.known_ms = -1
        self.totals = [Tally() for _ in tasks]
        self.newest = [Tally() for _ in tasks]
        self.label_rates = [LabelRateWatch() for _ in tasks]
        self.unscored = 0
        """Samples that no lagged model could score: those of the first moments after a start, and very late ones."""
        self._open: dict[int, list[Tally]] = {}
        self._closed_below = -1
        self._overlays: deque[_Overlay] = deque(maxlen=OVERLAYS)
        self._items = KeyIndex()
        self._counts_RC: Float64s = np.zeros((0, 2 * len(tasks)))
        """By item: clicks and impressions of each task."""

    def before(self, learner: Scorer, batch: Batch) -> tuple[Float32s, Float32s]:
        """Return the lagged scores of the model and of the item rate; NaN where no lagged model is old enough.

        Call it before each batch is learnt: what the batch will change is remembered here.
        """
        score_B, item_B = np.full(len(batch), np.nan, np.float32), np.full(len(batch), np.nan, np.float32)
        which_B = (
            np.searchsorted([overlay.known_ms for overlay in self._overlays], batch.event_time_ms_B, side="right") - 1
        )
        for which in np.unique(which_B[which_B >= 0]):
            here_B = which_B == which
            part = batch.where(here_B)
            lookup = partial(self._rows_at, learner, int(which))
            score_B[here_B] = learner.score(part, lookup=lookup, dense=self._overlays[which].dense)
            item_B[here_B] = self._item_rate(part, int(which))
        self._remember(learner, batch)
        return score_B, item_B

    def before_stored(self, learner: Scorer, batch: Batch) -> Float32s:
        """Prepare for stored samples, whose own prediction is honest. Return the present score of the item rate."""
        self._remember(learner, batch)
        return self._item_rate(batch, len(self._overlays))

    def after(
        self, learner: Scorer, batch: Batch, rows: pa.Table, score_B: Float32s, item_B: Float32s, known_ms_B: Int64s
    ) -> list[ClosedWindow]:
        """Count a batch that was learnt, `rows` its samples; return the windows that it closed, oldest first."""
        good_B = np.isfinite(score_B)
        self.unscored += int((~good_B).sum())
        correction_B = _marked(rows)
        scored = Scored(score_B, item_B, batch.label_B > 0.5, correction_B, self.slices.numbers(rows))
        window_B = batch.event_time_ms_B // self.span_ms
        for window in np.unique(window_B[good_B]):
            late = int(window) <= self._closed_below
            tallies = self.totals if late else self._open.setdefault(int(window), [Tally() for _ in self.tasks])
            for task, tally in enumerate(tallies):
                here_B = good_B & (window_B == window) & (batch.task_B == task)
                if here_B.any():
                    tally.add(scored.where(here_B))
        self._count_items(batch, correction_B)
        known = max(self.known_ms, int(known_ms_B.max(initial=-1)))
        if known // self.grid_ms > self.known_ms // self.grid_ms or not self._overlays:
            self._begin_overlay(learner, known)
        self.known_ms = known
        return self._close()

    def state(self) -> State:
        """Return what a checkpoint keeps; overlays are not kept, so a restart leaves a window unscored."""
        windows = sorted(self._open)
        out: State = {
            "format": np.array([FORMAT]),
            "tasks": np.array(self.tasks),
            "slices": np.array(list(self.slices.names), np.str_),
            "windows": np.array(windows, np.int64),
            "times": np.array([self.known_ms, self._closed_below, self.unscored], np.int64),
            "item_keys": self._items.keys_R[: len(self._items)].copy(),
            "item_counts": self._counts_RC[: len(self._items)].copy(),
        }
        out |= {f"label_rate.{task}": watch.state() for task, watch in enumerate(self.label_rates)}
        for number, tallies in enumerate((self.totals, self.newest, *(self._open[w] for w in windows))):
            for task, tally in enumerate(tallies):
                out |= {f"{number}.{task}.{name}": array for name, array in tally.state().items()}
        return out

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned; a state of another format or other tasks changes nothing."""
        if int(state.get("format", np.zeros(1))[0]) != FORMAT or tuple(state["tasks"].tolist()) != self.tasks:
            logger.warning("the checkpoint holds figures of another format or other tasks: figures begin anew")
            return
        self.slices.load([str(name) for name in state["slices"].tolist()])
        windows = [int(w) for w in state["windows"]]
        loaded = [
            [
                Tally.load({n.removeprefix(lead): a for n, a in state.items() if n.startswith(lead)})
                for lead in (f"{number}.{task}." for task in range(len(self.tasks)))
            ]
            for number in range(2 + len(windows))
        ]
        self.totals, self.newest = loaded[0], loaded[1]
        self._open = dict(zip(windows, loaded[2:], strict=True))
        for task, watch in enumerate(self.label_rates):
            watch.load(np.asarray(state[f"label_rate.{task}"], np.float64))
        self.known_ms, self._closed_below, self.unscored = (int(x) for x in state["times"])
        self._overlays.clear()
        self._items = KeyIndex()
        self._items.insert(state["item_keys"].astype(np.int64))
        self._counts_RC = np.array(state["item_counts"], np.float64)

    def total(self, task: str) -> tuple[Figures, dict[str, Figures]]:
        """Return a task's figures over all closed windows, and those of its slices by name."""
        return self._named(self.totals[self.tasks.index(task)])

    def _named(self, tally: Tally) -> tuple[Figures, dict[str, Figures]]:
        names = self.slices.names
        return tally.figures(), {names[g]: figures for g, figures in tally.slice_figures().items()}

    def _close(self) -> list[ClosedWindow]:
        closed = []
        for window in sorted(self._open):
            end = (window + 1) * self.span_ms
            if end + self.close_after_ms > self.known_ms:
                break
            self.newest = self._open.pop(window)
            self._closed_below = window
            for task, tally in enumerate(self.newest):
                self.totals[task].merge(tally)
                figures, slices = self._named(tally)
                if figures.samples > 0:
                    positives = float(tally.model_2N[1].sum())
                    change = self.label_rates[task].take(positives, figures.samples)
                    closed.append(ClosedWindow(end, self.tasks[task], figures, slices, change))
        return closed

    def _begin_overlay(self, learner: Scorer, known_ms: int) -> None:
        """Begin an overlay; where there are `OVERLAYS` already, the oldest goes."""
        width = learner.lookup(np.empty(0, np.int64)).shape[1]
        rows, items = _OldValues(width, np.float32), _OldValues(self._counts_RC.shape[1], np.float64)
        self._overlays.append(_Overlay(known_ms, learner.dense(), rows, items))

    def _rows_at(self, learner: Scorer, which: int, keys_K: Int64s) -> Float32s:
        values_KV = learner.lookup(keys_K)
        for overlay in reversed([*self._overlays][which:]):
            overlay.rows.put_over(keys_K, values_KV)
        return values_KV

    def _remember(self, learner: Scorer, batch: Batch) -> None:
        if not self._overlays:
            return
        newest = self._overlays[-1]
        newest.rows.remember(batch.slots_BF.reshape(-1), learner.lookup)
        if self.item_slot >= 0:
            newest.items.remember(np.ascontiguousarray(batch.slots_BF[:, self.item_slot]), self._item_counts)

    def _items_at(self, which: int, keys_K: Int64s) -> Float64s:
        counts_KC = self._item_counts(keys_K)
        for overlay in reversed([*self._overlays][which:]):
            overlay.items.put_over(keys_K, counts_KC)
        return counts_KC

    def _item_counts(self, keys_K: Int64s) -> Float64s:
        counts_KC = np.zeros((len(keys_K), self._counts_RC.shape[1]))
        rows_K = self._items.find(keys_K)
        counts_KC[rows_K >= 0] = self._counts_RC[rows_K[rows_K >= 0]]
        return counts_KC

    def _item_rate(self, batch: Batch, which: int) -> Float32s:
        if self.item_slot < 0:
            return np.full(len(batch), _PRIOR, np.float32)
        counts_BC = self._items_at(which, np.ascontiguousarray(batch.slots_BF[:, self.item_slot]))
        at_B, task_B = np.arange(len(batch)), 2 * batch.task_B.astype(np.int64)
        clicks_B, shown_B = counts_BC[at_B, task_B], counts_BC[at_B, task_B + 1]
        rate_B: Float32s = ((clicks_B + _PRIOR * _STRENGTH) / (shown_B + _STRENGTH)).astype(np.float32)
        return rate_B

    def _count_items(self, batch: Batch, correction_B: Bools) -> None:
        if self.item_slot < 0:
            return
        rows_B = self._items.insert(np.ascontiguousarray(batch.slots_BF[:, self.item_slot]))
        missing = len(self._items) - len(self._counts_RC)
        if missing > 0:
            self._counts_RC = np.concatenate([self._counts_RC, np.zeros((missing, self._counts_RC.shape[1]))])
        known_B = rows_B >= 0
        task_B = 2 * batch.task_B.astype(np.int64)
        np.add.at(self._counts_RC, (rows_B[known_B], task_B[known_B]), batch.label_B[known_B])
        shown_B = known_B & ~correction_B
        np.add.at(self._counts_RC, (rows_B[shown_B], task_B[shown_B] + 1), 1.0)


def known_times(rows: pa.Table, tasks: Sequence[Task]) -> Int64s:
    """Return when each sample was known, in event time: int64 [B].

    That is the feedback's time for a positive; for a negative the window's end or, under the policy `eager`, the
    impression's own time: it says only that there was one.
    """
    task_B = pc.index_in(rows["task"], value_set=pa.array([task.name for task in tasks])).to_numpy()
    wait_T = np.array([0 if task.policy == "eager" else task.window_ms for task in tasks], np.int64)
    by_window = pc.add(rows["event_time_ms"], pa.array(wait_T[task_B]))
    return np.array(pc.coalesce(rows["feedback_time_ms"], by_window), np.int64)


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
    counted = [c.key for c in features.counters if isinstance(c.key, str) and c.key != key_field]
    wanted = [*counted, *(name for name in names if name not in ("", key_field))]
    return next((names.index(name) for name in wanted if name in names), -1)


def _marked(rows: pa.Table) -> Bools:
    return np.array(pc.fill_null(rows["correction"], False), np.bool_)
