"""Goal: the figures are those of the textbook, and do not peek. Method: small batches with known answers."""

from __future__ import annotations

import numpy as np

from headrace.contract.project import Recipe
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric
from headrace.trainer.evaluate import Evaluation, Tally, area_under_curve, item_slot
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import Learner

SPEC = FeatureSpec(features=(Categorical(field="user"), Categorical(field="item")))


def test_auc_equals_pair_counting():
    rng = np.random.default_rng(0)
    score = rng.random(300).astype(np.float32)
    positive = rng.random(300) < score
    tally = Tally()
    tally.add(score, score, positive)
    pairs = score[positive][:, None] - score[~positive][None, :]
    assert abs(area_under_curve(tally.model_2N) - (pairs > 0).mean()) < 2e-3
    loss = -np.log(np.where(positive, score, 1 - score)).mean()
    assert abs(tally.figures().log_loss - loss) < 1e-4
    assert tally.figures().auc_constant == 0.5


def test_item_slot_prefers_what_is_counted():
    counted = FeatureSpec(
        counters=(Counter(name="u", key="user"), Counter(name="a", key="author")),
        features=(Categorical(field="user"), Categorical(field="item"), Categorical(field="author")),
    )
    assert item_slot(counted, "user") == 2
    assert item_slot(SPEC, "user") == 1
    assert item_slot(FeatureSpec(features=(Categorical(field="user"),)), "user") == -1


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
    learner = Learner(Recipe(dim=4, hidden=(8,), lr_dense=0.05), spec)
    evaluation = Evaluation(spec, window_ms=window, key_field="user")
    at_learning = Tally()
    for at in range(0, count, 20):
        rows = order[at : at + 20]
        b = Batch(slots[rows], drift[rows], label[rows], np.ones(20, np.float32), time_ms[rows])
        score, item = evaluation.before(learner, b)
        report = learner.learn(b)
        at_learning.add(report.prediction_B, report.prediction_B, b.label_B > 0.5)
        evaluation.after(learner, b, score, item, known[rows])
    figures = evaluation.total.figures()
    assert figures.samples > 4_000
    assert 0.45 < figures.auc < 0.55
    assert at_learning.figures().auc > 0.6  # what an evaluation that peeks would have claimed


def test_state_goes_on():
    learner = Learner(Recipe(dim=4, hidden=(8,)), SPEC)
    one = Evaluation(SPEC, window_ms=100, key_field="user")
    b = Batch(
        np.arange(40).reshape(20, 2), np.zeros((20, 0), np.float32), np.tile([0, 1], 10).astype(np.float32),
        np.ones(20, np.float32), np.arange(20) * 1_000,
    )  # fmt: skip
    report = learner.learn(b)
    one.after(learner, b, report.prediction_B, one.item_rate(b), b.event_time_ms_B)
    two = Evaluation(SPEC, window_ms=100, key_field="user")
    two.load(one.state())
    assert two.total.figures() == one.total.figures() and two.known_ms == one.known_ms
    assert (two.item_rate(b) == one.item_rate(b)).all()
