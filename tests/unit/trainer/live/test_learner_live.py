"""Goal: what the learner does beside its steps to keep a live model calibrated is done, in the right order, and is in
its state. Method: a few batches, and the same by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from learner_world import SPEC, batch_of, recipe_of

from headrace.trainer.model.calibration import left_out
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
