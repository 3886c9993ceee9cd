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

Each task has a grid and windows of its own (`windows`), so a fast task does not wait for a slow one. Overlays begin at
the steps of every grid; a task is scored by those of its own grid, whatever the label. One that no grid needs any more
is put into the one before it.

Baselines, by the same rules: the constant (AUC 0.5; its log loss is that of the windows' own base rate) and the item's
click rate so far. Figures are kept for each task, and for each slice of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
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
from headrace.trainer.validation.value_figures import ValueFigures, ValueTally
from headrace.trainer.validation.windows import AnyTally, TaskWindows

logger = logging.getLogger("headrace.train")

AnyFigures = Figures | ValueFigures
OVERLAYS = 8
"""Of each grid."""
FORMAT = 3
"""The format of `state`. Figures begin anew where a checkpoint holds another."""
COUNTED_MIN = 65_536
"""So many rows may be noted one by one, however few items there are."""
_PRIOR, _STRENGTH = 0.5, 10.0


@dataclass(frozen=True)
class ClosedWindow:
    """A window of impression time of one task that is over: none of its labels is still to come."""

    end_ms: int
    task: str
    figures: AnyFigures
    slices: Mapping[str, AnyFigures]
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

    def slots_of(self, batch: Batch) -> Int64s:
        """Return the slots of all samples that learning this batch learns, those held before among them: [B, F]."""


@dataclass(frozen=True)
class Standing:
    """What is told of one task before and after its first window is closed."""

    figures: AnyFigures
    slices: Mapping[str, AnyFigures]
    is_provisional: bool
    """True while no window is closed: the figures are of what is resolved so far, and late feedback may change them."""
    next_in_ms: int
    """Event time to the first provisional figure, then to the first closed window; then 0."""
    recent_samples: int
    recent_calibration: float
    """Of the newest impressions whose windows have passed, a window's length or more of them; late feedback aside."""


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

    def take_in(self, later: _OldValues) -> None:
        """Become the old values of both spans: what both touched has this one's."""
        keys_K = later.index.keys_R[: len(later.index)].copy()
        self.remember(keys_K, lambda fresh_K: later._values_RV[later.index.find(fresh_K)])

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
    grids: set[int]
    """Grids, by their step, of which it is."""


class Evaluation:
    """Scores samples honestly and keeps the figures. Changes nothing of the learner."""

    def __init__(
        self,
        features: FeatureSpec,
        tasks: Sequence[Task],
        *,
        key_field: str,
        slices: Slices,
        values: Collection[str] = (),
    ) -> None:
        self.tasks, self.slices = tuple(task.name for task in tasks), slices
        self.is_value_T = np.array([task.name in values for task in tasks])
        """Tasks that learn a value."""
        self.windows = [TaskWindows(task, ValueTally if task.name in values else Tally) for task in tasks]
        self.grid_ms_T = [max(task.window_ms // 4, 100) for task in tasks]
        self.item_slot = item_slot(features, key_field)
        self.known_ms = -1
        self.label_rates = [LabelRateWatch() for _ in tasks]
        self.unscored = 0
        """Samples that no lagged model could score: those of the first moments after a start, and very late ones."""
        self._overlays: deque[_Overlay] = deque()
        self._items = KeyIndex()
        self._counts_RC: Float64s = np.zeros((0, 2 * len(tasks)))
        """By item: clicks, or the sum of values, and impressions of each task. Rows beyond the items are 0."""
        self._kept_RC: Float64s = self._counts_RC
        """What `frozen` returned last."""
        self._counted: list[Int64s] | None = None
        """Rows that were counted since, as often as they were; None: any may have been."""
        self._counted_rows = 0

    def before(self, learner: Scorer, batch: Batch) -> tuple[Float32s, Float32s]:
        """Return the lagged scores of the model and of the item rate; NaN where no lagged model is old enough.

        Call it before each batch is learnt: what the batch will change is remembered here.
        """
        score_B, item_B = np.full(len(batch), np.nan, np.float32), np.full(len(batch), np.nan, np.float32)
        which_B = self._which(batch)
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
        good_B &= np.isfinite(batch.label_B)
        correction_B = _marked(rows)
        scored = Scored(
            *(score_B, item_B, batch.label_B > 0.5, correction_B, self.slices.numbers(rows)),
            batch.label_B if self.is_value_T.any() else np.empty(0, np.float32),
        )
        for task, windows in enumerate(self.windows):
            here_B = good_B & (batch.task_B == task)
            if here_B.any():
                windows.add(scored.where(here_B), batch.event_time_ms_B[here_B])
        self._count_items(batch, correction_B)
        known = max(self.known_ms, int(known_ms_B.max(initial=-1)))
        due = {g for g in self.grid_ms_T if known // g > self.known_ms // g or not self._overlays}
        if due:
            self._begin_overlay(learner, known)
            self._overlays[-1].grids = due
            self._thin_out()
        self.known_ms = known
        return self._close()

    def state(self) -> State:
        """Return what a checkpoint keeps; overlays are not kept, so a restart leaves a window unscored."""
        items = len(self._items)
        return self._state(self._items.keys_R[:items].copy(), self._counts_RC[:items].copy())

    def frozen(self) -> State:
        """Return what `state` does, at the cost of what was counted since the last call. It holds until the next."""
        items = len(self._items)
        if self._counted is None:
            self._kept_RC = self._counts_RC.copy()
        else:
            if len(self._kept_RC) < items:
                self._kept_RC = _grown(self._kept_RC, items)
            for rows_K in self._counted:
                self._kept_RC[rows_K] = self._counts_RC[rows_K]
        self._counted, self._counted_rows = [], 0
        # A key stays where it is: what comes lies behind.
        return self._state(self._items.keys_R[:items], self._kept_RC[:items])

    def _state(self, keys_R: Int64s, counts_RC: Float64s) -> State:
        out: State = {
            "format": np.array([FORMAT]),
            "tasks": np.array(self.tasks),
            "values": self.is_value_T.copy(),
            "slices": np.array(list(self.slices.names), np.str_),
            "times": np.array([self.known_ms, self.unscored], np.int64),
            "item_keys": keys_R,
            "item_counts": counts_RC,
        }
        out |= {f"label_rate.{task}": watch.state() for task, watch in enumerate(self.label_rates)}
        for task, windows in enumerate(self.windows):
            out |= {f"windows.{task}.{name}": array for name, array in windows.state().items()}
        return out

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned; a state of another format or other tasks changes nothing."""
        if int(state.get("format", np.zeros(1))[0]) != FORMAT or (
            tuple(state["tasks"].tolist()) != self.tasks or state["values"].tolist() != self.is_value_T.tolist()
        ):
            logger.warning("the checkpoint holds figures of another format or other tasks: figures begin anew")
            return
        self.slices.load([str(name) for name in state["slices"].tolist()])
        for task, windows in enumerate(self.windows):
            lead = f"windows.{task}."
            windows.load({n.removeprefix(lead): a for n, a in state.items() if n.startswith(lead)})
        for task, watch in enumerate(self.label_rates):
            watch.load(np.asarray(state[f"label_rate.{task}"], np.float64))
        self.known_ms, self.unscored = (int(x) for x in state["times"])
        self._overlays.clear()
        self._items = KeyIndex()
        self._items.insert(state["item_keys"].astype(np.int64))
        self._counts_RC, self._counted = np.array(state["item_counts"], np.float64), None

    def total(self, task: str) -> tuple[AnyFigures, dict[str, AnyFigures]]:
        """Return a task's figures over all closed windows, and those of its slices by name."""
        return self._named(self.windows[self.tasks.index(task)].total)

    def standing(self, task: str) -> Standing:
        """Return what is known of a task now: `total`, or before that what is resolved so far."""
        windows = self.windows[self.tasks.index(task)]
        settled = windows.is_settled or windows.total.figures().samples > 0
        tally = windows.total if settled else windows.provisional(self.known_ms)
        figures, slices = self._named(tally)
        next_in_ms = 0 if settled else windows.next_in_ms(self.known_ms, provisional=figures.samples > 0)
        return Standing(figures, slices, not settled, next_in_ms, *windows.recent())

    def _named(self, tally: AnyTally) -> tuple[AnyFigures, dict[str, AnyFigures]]:
        names = self.slices.names
        return tally.figures(), {names[g]: figures for g, figures in tally.slice_figures().items()}

    def _close(self) -> list[ClosedWindow]:
        closed = []
        for task, windows in enumerate(self.windows):
            for end, tally in windows.close(self.known_ms):
                figures, slices = self._named(tally)
                if figures.samples > 0:
                    change = self.label_rates[task].take(tally.positives, figures.samples)
                    closed.append(ClosedWindow(end, self.tasks[task], figures, slices, change))
        return sorted(closed, key=lambda window: window.end_ms)

    def _which(self, batch: Batch) -> Int64s:
        """Return which overlay scores each sample, the newest of its task's grid that knew nothing later: int64 [B]."""
        which_B = np.full(len(batch), -1, np.int64)
        for grid in set(self.grid_ms_T):
            own = np.array([i for i, overlay in enumerate(self._overlays) if grid in overlay.grids], np.int64)
            if not len(own):
                continue
            known = [self._overlays[i].known_ms for i in own]
            at_B = np.searchsorted(known, batch.event_time_ms_B, side="right") - 1
            here_B = np.array([g == grid for g in self.grid_ms_T])[batch.task_B] & (at_B >= 0)
            which_B[here_B] = own[at_B[here_B]]
        return which_B

    def _thin_out(self) -> None:
        """Keep the newest `OVERLAYS` of each grid."""
        for grid in set(self.grid_ms_T):
            for overlay in [o for o in self._overlays if grid in o.grids][:-OVERLAYS]:
                overlay.grids.discard(grid)
        while not self._overlays[0].grids:
            self._overlays.popleft()
        kept: deque[_Overlay] = deque()
        for overlay in self._overlays:
            if overlay.grids:
                kept.append(overlay)
            else:
                kept[-1].rows.take_in(overlay.rows)
                kept[-1].items.take_in(overlay.items)
        self._overlays = kept

    def _begin_overlay(self, learner: Scorer, known_ms: int) -> None:
        """Begin an overlay."""
        width = learner.lookup(np.empty(0, np.int64)).shape[1]
        rows, items = _OldValues(width, np.float32), _OldValues(self._counts_RC.shape[1], np.float64)
        self._overlays.append(_Overlay(known_ms, learner.dense(), rows, items, set()))

    def _rows_at(self, learner: Scorer, which: int, keys_K: Int64s) -> Float32s:
        values_KV = learner.lookup(keys_K)
        for overlay in reversed([*self._overlays][which:]):
            overlay.rows.put_over(keys_K, values_KV)
        return values_KV

    def _remember(self, learner: Scorer, batch: Batch) -> None:
        if not self._overlays:
            return
        newest = self._overlays[-1]
        newest.rows.remember(learner.slots_of(batch).reshape(-1), learner.lookup)
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
        prior_T = np.full(len(self.tasks), _PRIOR)
        if self.is_value_T.any():
            sums_C = self._counts_RC.sum(axis=0)
            mean_T = sums_C[0::2] / np.maximum(sums_C[1::2], 1)
            prior_T = np.where(self.is_value_T, mean_T, prior_T)
        prior_B = prior_T[batch.task_B] * _STRENGTH
        rate_B: Float32s = ((clicks_B + prior_B) / (shown_B + _STRENGTH)).astype(np.float32)
        return rate_B

    def _note(self, rows_B: Int64s) -> None:
        """Note rows that are counted; where they are more than there are items, that any may be."""
        self._counted_rows += len(rows_B)
        if self._counted is not None:
            self._counted.append(rows_B[rows_B >= 0])
            if self._counted_rows > max(len(self._items), COUNTED_MIN):
                self._counted = None

    def _count_items(self, batch: Batch, correction_B: Bools) -> None:
        if self.item_slot < 0:
            return
        rows_B = self._items.insert(np.ascontiguousarray(batch.slots_BF[:, self.item_slot]))
        if len(self._counts_RC) < len(self._items):
            self._counts_RC = _grown(self._counts_RC, len(self._items))
        self._note(rows_B)
        known_B = (rows_B >= 0) & np.isfinite(batch.label_B)
        task_B = 2 * batch.task_B.astype(np.int64)
        np.add.at(self._counts_RC, (rows_B[known_B], task_B[known_B]), batch.label_B[known_B])
        shown_B = known_B & ~correction_B
        np.add.at(self._counts_RC, (rows_B[shown_B], task_B[shown_B] + 1), 1.0)


def _grown(counts_RC: Float64s, rows: int) -> Float64s:
    """Return the counts with room for so many rows, and for half as many again."""
    grown_RC = np.zeros((rows + rows // 2, counts_RC.shape[1]))
    grown_RC[: len(counts_RC)] = counts_RC
    return grown_RC


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
