"""Goal: the figures are those of the textbook, do not peek, and are those of whole copies of the model.

Method: small batches with known answers; a subclass that copies the whole table at each grid step, as an oracle.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.held import ordered_tasks
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.tables.table import initial_values
from headrace.trainer.validation import evaluate
from headrace.trainer.validation.evaluate import Evaluation, item_slot, known_times
from headrace.trainer.validation.figures import Scored, Tally, area_under_curve
from headrace.trainer.validation.slices import Slices, slices_of

torch.set_num_threads(1)
SPEC = FeatureSpec(features=(Categorical(field="user"), Categorical(field="item")))
CLICK = Task(name="click", feedback="click", window_ms=2_000)


def scored(score, positive, *, correction=None, groups=None) -> Scored:
    """Return samples; the item rate says a half."""
    n = len(score)
    return Scored(
        np.asarray(score, np.float32), np.full(n, 0.5, np.float32), np.asarray(positive, bool),
        np.zeros(n, bool) if correction is None else np.asarray(correction, bool),
        np.zeros((n, 0), np.int64) if groups is None else groups,
    )  # fmt: skip


def rows_of(batch: Batch, *, tab=None, correction=None) -> pa.Table:
    """Return the columns that the evaluation reads of samples."""
    n = len(batch)
    return pa.table(
        {
            "tab": pa.array([0] * n if tab is None else tab, pa.int64()),
            "correction": pa.array([None] * n if correction is None else correction, pa.bool_()),
        }
    )


def evaluation_of(kind=Evaluation, tasks=(CLICK,), slices=(), values_max=16, spec=SPEC) -> Evaluation:
    """Return an empty one."""
    return kind(spec, tasks, key_field="user", slices=Slices(slices, values_max=values_max))


class Copying(Evaluation):
    """Keeps whole copies of table and item counts: what overlays must be equal to."""

    def _begin_overlay(self, learner, known_ms):
        super()._begin_overlay(learner, known_ms)
        weights = learner.weights()
        self._overlays[-1].copy = dict(zip(weights.keys_K.tolist(), weights.values_KV.copy(), strict=True))
        keys = self._items.keys_R[: len(self._items)].tolist()
        self._overlays[-1].counts = dict(zip(keys, self._counts_RC.copy(), strict=False))

    def _remember(self, learner, batch):
        pass

    def _rows_at(self, learner, which, keys_K):
        recipe = learner.recipe
        out = initial_values(keys_K, dim=recipe.row_dim, seed=recipe.seed, scale=recipe.row_scale)
        copy = self._overlays[which].copy
        for at, key in enumerate(keys_K.tolist()):
            if key in copy:
                out[at] = copy[key]
        return out

    def _items_at(self, which, keys_K):
        if which == len(self._overlays):
            return self._item_counts(keys_K)
        counts = self._overlays[which].counts
        return np.array([counts.get(key, np.zeros(self._counts_RC.shape[1])) for key in keys_K.tolist()])


def test_figures_equal_counting():
    rng = np.random.default_rng(0)
    score = rng.random(300).astype(np.float32)
    positive = rng.random(300) < score
    tally = Tally()
    tally.add(scored(score, positive))
    figures = tally.figures()
    pairs = score[positive][:, None] - score[~positive][None, :]
    assert abs(area_under_curve(tally.model_2N) - (pairs > 0).mean()) < 2e-3
    loss = -np.log(np.where(positive, score, 1 - score)).mean()
    rate = positive.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert abs(figures.log_loss - loss) < 1e-4
    assert abs(figures.normalized_entropy - loss / entropy) < 1e-4
    assert abs(figures.calibration - score.mean() / rate) < 1e-4
    assert figures.auc_constant == 0.5


def test_a_correction_takes_its_negative_back():
    once, twice = Tally(), Tally()
    once.add(scored([0.2, 0.7], [False, True]))
    twice.add(scored([0.2, 0.7], [False, False]))
    twice.add(scored([0.7], [True], correction=[True]))
    one, two = once.figures(), twice.figures()
    assert (one.samples, one.auc, one.label_rate) == (two.samples, two.auc, two.label_rate)
    assert abs(one.log_loss - two.log_loss) < 1e-12
    assert abs(one.calibration - two.calibration) < 1e-12


def test_slices_add_up_and_are_bounded():
    rng = np.random.default_rng(1)
    slices = Slices(("tab",), values_max=3)
    tally, n = Tally(), 4_000
    tab, score = rng.integers(0, 9, n), rng.random(n).astype(np.float32)
    positive = rng.random(n) < np.where(tab == 2, 1 - score, score)
    table = pa.table({"tab": pa.array([None if t == 8 else int(t) for t in tab], pa.int64())})
    for at in range(0, n, 100):
        here = slice(at, at + 100)
        groups = slices.numbers(table.slice(at, 100))
        tally.add(scored(score[here], positive[here], groups=groups))
    assert len(slices.names) == 4 and "tab=(other)" in slices.names
    found = tally.slice_figures()
    assert sum(f.samples for f in found.values()) == n
    for number, name in enumerate(slices.names):
        value = name.removeprefix("tab=")
        named = [n.removeprefix("tab=") for n in slices.names]
        told = np.array([str(t) if t != 8 else "(none)" for t in tab])
        here = told == value if value != "(other)" else ~np.isin(told, named)
        assert found[number].samples == here.sum()
        pairs = score[here & positive][:, None] - score[here & ~positive][None, :]
        assert abs(found[number].auc - (pairs > 0).mean()) < 5e-3
        assert abs(found[number].calibration - score[here].mean() / positive[here].mean()) < 1e-4
    again = Slices(("tab",), values_max=3)
    again.load(slices.state())
    assert (again.numbers(table) == slices.numbers(table)).all()


def test_a_slice_names_a_field_of_one_value():
    project = Project(
        impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "tags": "list[string]"}),
        feedback=(FeedbackType(name="click", tag="c"),),
        tasks=(CLICK,),
        features=FeatureSpec(features=(Categorical(field="user"),)),
    )
    with pytest.raises(ConfigRejected, match=r"\['tags', 'tabb'\].*\['user'\]"):
        slices_of(project, ("tags", "tabb"), values_max=3)


def test_item_slot_prefers_what_is_counted():
    counted = FeatureSpec(
        counters=(Counter(name="u", key="user"), Counter(name="a", key="author")),
        features=(Categorical(field="user"), Categorical(field="item"), Categorical(field="author")),
    )
    assert item_slot(counted, "user") == 2
    assert item_slot(SPEC, "user") == 1
    assert item_slot(FeatureSpec(features=(Categorical(field="user"),)), "user") == -1


def stream(seed: int, *, tasks=(CLICK,), count=2_000):
    """Yield batches and when each sample was known, in the order in which a join would emit them."""
    rng = np.random.default_rng(seed)
    time_ms = np.sort(rng.integers(0, count * 10, count))
    slots = np.stack([rng.integers(0, 60, count), rng.integers(100, 130, count)], axis=1)
    label = (rng.random(count) < 0.2 + 0.5 * (slots[:, 1] % 2)).astype(np.float32)
    task = rng.integers(0, len(tasks), count).astype(np.int8)
    window = np.array([t.window_ms for t in tasks])[task]
    known = np.where(label > 0, time_ms + rng.integers(1, 500, count), time_ms + window)
    order = np.argsort(known, kind="stable")
    at = 0
    while at < count:
        rows = order[at : at + int(rng.integers(1, 60))]
        at += len(rows)
        n = len(rows)
        yield (
            Batch(
                slots[rows], np.zeros((n, 0), np.float32), label[rows], np.ones(n, np.float32), time_ms[rows],
                task[rows],
            ),
            known[rows],
        )  # fmt: skip


def run(evaluation, learner, batches, *, stored: int = 0):
    """Evaluate and learn; return all scores. The first `stored` batches are taken as from the lake."""
    scores = []
    for number, (batch, known) in enumerate(batches):
        rows = rows_of(batch, tab=(batch.slots_BF[:, 0] % 5).tolist())
        if number < stored:
            item = evaluation.before_stored(learner, batch)
            score = learner.learn(batch).prediction_B
        else:
            score, item = evaluation.before(learner, batch)
            learner.learn(batch)
        evaluation.after(learner, batch, rows, score, item, known)
        scores += [score, item]
    return np.concatenate(scores)


RECIPES = {
    "deepfm": Recipe(dim=4, hidden=(8,)),
    "fm": Recipe(model="fm", dim=3),
    "logistic": Recipe(model="logistic", optimizer="ftrl", lr_table=0.1),
    "two tasks": Recipe(dim=4, hidden=(8,), tasks=("click", "like"), calibrate=True),
    "admission": Recipe(dim=4, hidden=(8,), admit_after=3),
    "ordered": Recipe(dim=4, hidden=(8,), tasks=("click", "like"), ordered_from_ms=1_600),
}


@pytest.mark.parametrize("stored", [0, 20])
@pytest.mark.parametrize("name", RECIPES)
def test_overlays_equal_whole_copies(name, stored):
    recipe = RECIPES[name]
    tasks = tuple(Task(name=t, feedback="click", window_ms=2_000 - 500 * i) for i, t in enumerate(recipe.heads))
    for seed in range(2):
        ours, oracle = (evaluation_of(k, tasks, slices=("tab",), values_max=3) for k in (Evaluation, Copying))
        learners = [make_learner(recipe, SPEC, ordered=ordered_tasks(recipe, tasks)) for _ in range(2)]
        one = run(ours, learners[0], stream(seed, tasks=tasks), stored=stored)
        two = run(oracle, learners[1], stream(seed, tasks=tasks), stored=stored)
        assert np.array_equal(one, two, equal_nan=True)
        assert np.isfinite(one).mean() > 0.7
        for task in recipe.heads:
            assert repr(ours.total(task)) == repr(oracle.total(task))
            assert ours.total(task)[0].samples > 300
            assert len(ours.total(task)[1]) == 4


def test_overlays_keep_what_was_touched_not_the_table():
    """A table of 50,000 ids is there; a stream over 90 of them makes overlays of 90."""
    learner, evaluation = make_learner(RECIPES["deepfm"], SPEC), evaluation_of()
    many = np.arange(1_000, 51_000).reshape(-1, 2)
    n = len(many)
    big = Batch(
        many, np.zeros((n, 0), np.float32), np.zeros(n, np.float32), np.ones(n, np.float32), np.zeros(n, np.int64)
    )
    learner.learn(big)
    run(evaluation, learner, stream(5))
    assert learner.rows > 50_000
    assert max(len(overlay.rows.index) for overlay in evaluation._overlays) <= 90


def test_streaks_of_labels_give_nothing_away():
    """Labels are coin tosses, positives arrive at once and negatives late: the AUC must stay at a half."""
    rng, count, window = np.random.default_rng(1), 6_000, 2_000
    time_ms = np.arange(count) * 10
    label = (rng.random(count) < 0.5).astype(np.float32)
    slots = np.stack([time_ms // 500 % 50, rng.integers(100, 120, count)], axis=1)
    known = np.where(label > 0, time_ms + 50, time_ms + window)
    order = np.argsort(known, kind="stable")
    drift = (time_ms / 1_000).astype(np.float32)[:, None]
    spec = FeatureSpec(features=(*SPEC.features, Numeric(field="drift")))
    learner = make_learner(Recipe(dim=4, hidden=(8,), lr_dense=0.05), spec)
    evaluation = evaluation_of(spec=spec)
    at_learning = Tally()
    for at in range(0, count, 20):
        rows = order[at : at + 20]
        b = Batch(slots[rows], drift[rows], label[rows], np.ones(20, np.float32), time_ms[rows])
        score, item = evaluation.before(learner, b)
        report = learner.learn(b)
        at_learning.add(scored(report.prediction_B, b.label_B > 0.5))
        evaluation.after(learner, b, rows_of(b), score, item, known[rows])
    figures, _ = evaluation.total("click")
    assert figures.samples > 4_000
    assert 0.45 < figures.auc < 0.55
    assert at_learning.figures().auc > 0.6  # what an evaluation that peeks would have claimed


def test_eager_figures_are_of_true_labels():
    """A negative at once and a correction later: each impression counts once, with the label that it got."""
    eager = Task(name="click", feedback="click", window_ms=2_000, policy="eager")
    rng, count = np.random.default_rng(2), 8_000
    time_ms, user, item = np.arange(count) * 10, rng.integers(0, 30, count), rng.integers(100, 120, count)
    label = rng.random(count) < 0.1 + 0.6 * (item % 2)
    click_ms = time_ms + rng.integers(1, 1_500, count)
    at = np.concatenate([time_ms, click_ms[label]])
    which = np.concatenate([np.arange(count), np.flatnonzero(label)])
    positive = np.concatenate([np.zeros(count), np.ones(label.sum())]).astype(np.float32)
    order = np.argsort(at, kind="stable")
    learner, evaluation = make_learner(Recipe(dim=4, hidden=(8,)), SPEC), evaluation_of(tasks=(eager,))
    for begin in range(0, len(order), 25):
        o = order[begin : begin + 25]
        w, n = which[o], len(o)
        b = Batch(
            np.stack([user[w], item[w]], axis=1), np.zeros((n, 0), np.float32), positive[o], np.ones(n, np.float32),
            time_ms[w],
        )  # fmt: skip
        rows = rows_of(b, correction=(positive[o] > 0).tolist()).append_column("task", pa.array(["click"] * n))
        rows = rows.append_column("event_time_ms", pa.array(time_ms[w]))
        fed = [int(t) if p else None for t, p in zip(at[o], positive[o], strict=True)]
        rows = rows.append_column("feedback_time_ms", pa.array(fed, pa.int64()))
        score, rate = evaluation.before(learner, b)
        learner.learn(b)
        evaluation.after(learner, b, rows, score, rate, known_times(rows, (eager,)))
    figures, _ = evaluation.total("click")
    windows = evaluation.windows[0]
    inside = (time_ms >= 1_000) & (time_ms < (windows._closed_below + 1) * windows.span_ms)
    assert abs(figures.samples - inside.sum()) < 200
    assert abs(figures.label_rate - label[inside].mean()) < 0.01
    assert figures.auc > 0.75


def test_a_jump_of_the_label_rate_is_told_with_its_windows():
    learner, evaluation = make_learner(RECIPES["logistic"], SPEC), evaluation_of()
    rng, found = np.random.default_rng(4), []
    for second in range(600):
        n, rate = 40, 0.4 if second < 400 else 0.15
        slots = np.stack([rng.integers(0, 60, n), rng.integers(100, 130, n)], axis=1)
        label = (rng.random(n) < rate).astype(np.float32)
        b = Batch(slots, np.zeros((n, 0), np.float32), label, np.ones(n, np.float32), np.full(n, second * 1_000))
        item = evaluation.before_stored(learner, b)
        score = learner.learn(b).prediction_B
        closed = evaluation.after(learner, b, rows_of(b), score, item, b.event_time_ms_B)
        found += [(c.end_ms, c.change) for c in closed if c.change is not None and c.change.is_sudden]
    assert len(found) == 1
    end_ms, change = found[0]
    assert 400_000 <= end_ms <= 450_000
    assert abs(change.usual - 0.4) < 0.02 and change.rate < 0.3 and change.score < -6


def test_state_goes_on():
    batches = list(stream(7))
    learner, one = make_learner(RECIPES["deepfm"], SPEC), evaluation_of(slices=("tab",))
    run(one, learner, batches[:60])
    two = evaluation_of(slices=("tab",))
    two.load(one.state())
    assert repr(two.total("click")) == repr(one.total("click")) and two.known_ms == one.known_ms
    for name, array in one.state().items():
        assert np.array_equal(array, two.state()[name]), name
    three = evaluation_of(slices=("tab",))
    three.load({"loss": np.zeros(3)})  # what an older version kept
    assert three.total("click")[0].samples == 0


@pytest.mark.parametrize("counted_min", [0, 40, 10**6])
def test_what_is_frozen_for_a_checkpoint_is_the_state_and_stays_it(monkeypatch, counted_min: int):
    """Only what was counted since the last time is copied; what was returned holds while counting goes on."""
    monkeypatch.setattr(evaluate, "COUNTED_MIN", counted_min)
    evaluation, rng = evaluation_of(), np.random.default_rng(3)
    assert evaluation.item_slot >= 0
    for turn in range(30):
        for _ in range(int(rng.integers(0, 4))):
            slots_BF = rng.integers(1, 20 + 10 * turn, (8, 2)).astype(np.int64)
            label_B = (rng.random(8) < 0.5).astype(np.float32)
            batch = Batch(slots_BF, np.zeros((8, 0), np.float32), label_B, np.ones(8, np.float32), np.full(8, turn))
            evaluation._count_items(batch, np.zeros(8, bool))
        now, frozen = evaluation.state(), evaluation.frozen()
        assert now.keys() == frozen.keys()
        if turn:
            evaluation._count_items(batch, np.zeros(8, bool))
        for name, array in now.items():
            np.testing.assert_array_equal(frozen[name], array, err_msg=name)
        if turn == 20:
            again = evaluation_of()
            again.load(now)
            evaluation = again
