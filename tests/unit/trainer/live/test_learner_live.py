"""Goal: what the learner does beside its steps to keep a live model calibrated is done, in the right order, and is in
its state. Method: a few batches, and the same by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learner_world import SPEC, batch_of, recipe_of

from headrace.contract.project import Task
from headrace.trainer.model.batch import Batch, joined
from headrace.trainer.model.calibration import left_out
from headrace.trainer.model.held import ordered_tasks
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.moments import Moments

RECENT = {"standardize": True, "recent_base": True, "delayed": "taken_back"}


def test_what_the_model_gave_is_followed_with_the_base_rates_of_before():
    learner = make_learner(recipe_of("logistic", **RECENT), SPEC)
    for at in range(3):
        learner.learn(batch_of(at))
    batch = batch_of(3)
    batch.correction_B[:5] = batch.label_B[:5] > 0
    by_hand = Moments(learner.recipe, SPEC.numerics)
    by_hand.load(learner._moments.state())
    said_B, base_T = learner.predict(batch).astype(float), by_hand.base_rates()
    z_B = np.log(said_B / (1 - said_B)) - by_hand.dense()["targets"][0, 0]
    rest = batch.label_B, batch.weight_B, batch.task_B
    by_hand.take(batch.numeric_BD, *rest, more_B=batch.correction_B, in_order=False)
    by_hand.follow(base_T, z_B.astype(np.float32), *rest, more_B=batch.correction_B)
    learner.learn(batch)
    for name, array in by_hand.state().items():
        np.testing.assert_allclose(learner._moments.state()[name], array, rtol=1e-4)


@pytest.mark.parametrize("model", ["logistic", "fm"])
def test_a_restart_while_a_task_waits_goes_on_waiting(model):
    """Sample after sample, positives before the first negative are not learnt, and those behind it are."""
    recipe = recipe_of(model, wait_for_negative=True, updates="sample")
    first, again = make_learner(recipe, SPEC), make_learner(recipe, SPEC)
    positives = batch_of(1)
    positives.label_B[:] = 1
    first.learn(positives)
    assert first.state()["waits"].all()
    again.load(first.state())
    mixed = batch_of(2)
    mixed.label_B[:], mixed.label_B[9] = 1, 0
    alone, whole = make_learner(recipe, SPEC), replace(mixed, weight_B=mixed.weight_B.copy())
    whole.weight_B[:9] = 0
    alone.learn(replace(positives, weight_B=np.zeros_like(positives.weight_B)))
    alone._waits_T[:] = False
    for learner, batch in ((first, mixed), (again, mixed), (alone, whole)):
        learner.learn(batch)
    assert first.digest() == again.digest() == alone.digest()


def test_a_correction_of_a_negative_that_was_left_out_takes_nothing_back():
    recipe = recipe_of("logistic", delayed="taken_back", negative_share=0.5)
    taken, plain = make_learner(recipe, SPEC), make_learner(recipe, SPEC)
    batch = batch_of(1, rows=200)
    batch.label_B[:] = 1
    out_B = left_out(recipe, np.zeros(200, np.float32), batch.id_B)
    assert 50 < out_B.sum() < 150
    of_left_out = batch.where(out_B)
    taken.learn(replace(of_left_out, correction_B=np.ones(len(of_left_out), bool)))
    plain.learn(of_left_out)
    assert taken.digest() == plain.digest()
    others = batch.where(~out_B)
    taken.learn(replace(others, correction_B=np.ones(len(others), bool)))
    plain.learn(others)
    assert taken.digest() != plain.digest()


def one(label: float, time_ms: int, *, row: int = 0, correction: bool = False) -> Batch:
    """Return one sample of its own ids, or of those of another."""
    slots = np.array([[10 * row, 10 * row + 1, 10 * row + 2, 10 * row + 3]], np.int64)
    numbers = np.zeros((1, 2), np.float32)
    rest = np.array([label], np.float32), np.ones(1, np.float32), np.array([time_ms])
    return Batch(slots, numbers, *rest, correction_B=np.array([correction]))


@pytest.mark.parametrize("updates", ["batch", "sample"])
def test_a_click_of_a_long_window_waits_for_the_negatives_of_its_time_and_any_other_is_learnt_at_once(updates):
    recipe = recipe_of("fm", updates=updates, ordered_from_ms=60_000)
    for window_ms, waits in ((59_999, False), (60_000, True)):
        tasks = [Task(name="click", feedback="click", window_ms=window_ms)]
        learner = make_learner(recipe, SPEC, ordered=ordered_tasks(recipe, tasks))
        learner.learn(one(0, 500, row=9))
        asked = one(0, 2_000)
        before = learner.predict(asked)[0]
        report = learner.learn(one(1, 1_000))
        assert report.learnt == 1 and report.prediction_B[0] == pytest.approx(before, abs=1e-6)
        assert (learner.predict(asked)[0] > before) == (not waits) and learner.held == waits
        assert (len(report.touched_K) == 0) == waits
        # A negative of an earlier impression changes nothing of that, one of a later one does.
        learner.learn(one(0, 999, row=8))
        assert learner.held == waits
        report = learner.learn(one(0, 1_000, row=7))
        assert learner.held == 0 and learner.predict(asked)[0] > before and report.learnt == 1
        assert set(one(1, 1_000).slots_BF[0].tolist()) <= set(report.touched_K.tolist()) or not waits


def test_a_correction_never_waits():
    learner = make_learner(recipe_of("fm", delayed="taken_back", ordered_from_ms=1), SPEC, ordered=("click",))
    before = learner.predict(one(0, 0))[0]
    learner.learn(one(1, 9_000, correction=True))
    assert learner.held == 0 and learner.predict(one(0, 0))[0] > before


def test_a_negative_that_is_not_learnt_frees_positives_all_the_same():
    """Which negatives are left out is decided by a hash of the sample, and must not decide how long others wait."""
    learner = make_learner(recipe_of("fm", negative_share=1e-9, ordered_from_ms=1), SPEC, ordered=("click",))
    learner.learn(one(1, 1_000))
    assert learner.held == 1
    report = learner.learn(one(0, 2_000, row=7))
    assert (report.learnt, report.sampled_out, learner.held) == (0, 1, 0) and len(report.touched_K) == SPEC.slots


def test_what_waited_counts_once_whatever_becomes_of_it():
    """Taken samples are learnt or wait, so that learnt, refused and left out are those that came."""
    learner = make_learner(recipe_of("deepfm", ordered_from_ms=1), SPEC, ordered=("click",))
    reports = [learner.learn(one(1, 1_000)), learner.learn(one(np.nan, 1_000)), learner.learn(one(0, 2_000, row=7))]
    assert [(r.learnt, r.refused) for r in reports] == [(1, 0), (0, 1), (1, 0)] and learner.held == 0
    # A step whose gradients overflow is refused whole: what was freed with it is lost, and is no refused sample of it.
    assert learner.learn(one(1, 9_000)).learnt == 1
    broken = one(0, 9_000, row=7)
    broken.weight_B[:] = 3e38
    report = learner.learn(joined([broken, one(1, 9_500, row=6)]))
    assert (report.learnt, report.refused, learner.held) == (1, 1, 1)
