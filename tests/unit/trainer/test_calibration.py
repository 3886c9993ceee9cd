"""Goal: what bends a loss on purpose bends it by the stated formula, and what the model says is the true rate. Method:
formulas by hand, and streams whose rate is known, learnt by a model of a bias and one id."""

from __future__ import annotations

import numpy as np
import pytest
from learner_world import SPEC, batch_of, recipe_of

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import gradients, left_out
from headrace.trainer.model.learner import make_learner
from headrace.trainer.recipes import late_positives, logistic, rare_positives

ONE = FeatureSpec(features=(Categorical(field="a"),))
RATE = 0.3
# One id in every sample: the default rate is made for ids that are seen a few times.
FAST = logistic(lr_table=1.0)


def stream(labels: np.ndarray, at: int) -> Batch:
    n = len(labels)
    ids = np.random.default_rng(at).integers(-(2**63), 2**63 - 1, n)
    return Batch(
        np.ones((n, 1), np.int64), np.zeros((n, 0), np.float32), labels.astype(np.float32), np.ones(n, np.float32),
        np.full(n, at), np.zeros(n, np.int8), ids,
    )  # fmt: skip


def said_after(recipe: Recipe, *, eager: bool, steps: int = 400) -> tuple[float, int, int]:
    """Learn clicks of a known rate; return what the model says in the end, mean of the last steps, and the counts."""
    learner, rng = make_learner(recipe, ONE), np.random.default_rng(3)
    said, learnt, sampled_out = [], 0, 0
    for at in range(steps):
        clicks = rng.random(500) < RATE
        # Eager: a negative for every impression, and a positive beside it where a click came.
        labels = rng.permutation(np.concatenate([np.zeros(500), np.ones(clicks.sum())])) if eager else clicks
        report = learner.learn(stream(labels, at))
        learnt, sampled_out = learnt + report.learnt, sampled_out + report.sampled_out
        assert np.isfinite(report.prediction_B).all()
        said.append(report.prediction_B.mean())
    return float(np.mean(said[-50:])), learnt, sampled_out


def test_a_share_of_the_negatives_is_left_out_and_the_rate_stays_true():
    said, learnt, sampled_out = said_after(rare_positives(FAST, negative_share=0.2), eager=False)
    negatives = 400 * 500 * (1 - RATE)
    assert abs(sampled_out / negatives - 0.8) < 0.01 and learnt + sampled_out == 400 * 500
    assert abs(said - RATE) < 0.02


def test_which_negatives_are_left_out_depends_on_id_and_seed_alone():
    batch = stream(np.zeros(1_000), 5)
    recipe = recipe_of("fm", negative_share=0.3)
    out = left_out(recipe, batch.label_B, batch.id_B)
    keep = np.arange(1_000) % 3 == 0
    assert (left_out(recipe, batch.label_B[keep], batch.id_B[keep]) == out[keep]).all()
    assert (left_out(recipe_of("fm", negative_share=0.3, seed=8), batch.label_B, batch.id_B) != out).any()
    assert not left_out(recipe, np.ones(1_000, np.float32), batch.id_B).any()


@pytest.mark.parametrize("weighted", [True, False])
def test_late_positives_are_learnt_at_the_true_rate(weighted):
    assert abs(said_after(FAST, eager=True)[0] - RATE / (1 + RATE)) < 0.02
    assert abs(said_after(late_positives(FAST, weighted=weighted), eager=True)[0] - RATE) < 0.02


def test_late_positives_and_left_out_negatives_go_together():
    recipe = rare_positives(late_positives(FAST), negative_share=0.5)
    assert abs(said_after(recipe, eager=True)[0] - RATE) < 0.02


def test_the_weights_are_those_of_the_paper():
    z, label, weight = np.array([-1.0, -1.0], np.float32), np.array([0, 1], np.float32), np.array([2, 3], np.float32)
    p = 1 / (1 + np.exp(1.0))
    wanted = [2 * (1 - p) * (1 + p) * p, 3 * (1 + p) * (p - 1)]
    found = gradients(recipe_of("fm", delayed="fake_negative_weighted"), z, label, weight)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradients(recipe_of("fm"), z, label, weight), [2 * p, 3 * (p - 1)], rtol=1e-6)


def test_calibration_tames_a_model_that_is_too_sure():
    """Labels are noise and ids many, so a model with a high rate overfits; two numbers take its certainty back."""
    losses = {}
    for calibrate in (False, True):
        learner, rng, loss = make_learner(recipe_of("logistic", calibrate=calibrate, lr_table=0.5), SPEC), None, []
        rng = np.random.default_rng(4)
        for at in range(150):
            batch = batch_of(at, rows=100, keys=300)
            batch.label_B[:] = rng.random(100) < 0.3
            p = learner.learn(batch).prediction_B
            loss.append(-np.log(np.where(batch.label_B > 0, p, 1 - p)).mean())
        losses[calibrate] = np.mean(loss[-50:])
    assert learner.dense()["platt"][0, 0] < 0.8
    assert losses[True] < losses[False]


def project(recipe: Recipe, **task: object) -> Project:
    return Project(
        impression=ImpressionType(tag="i", key="a", fields={"a": "int64"}),
        feedback=(FeedbackType(name="click", tag="c"), FeedbackType(name="like", tag="l")),
        tasks=(
            Task(name="click", feedback="click", window_ms=1_000, **task),
            Task(name="like", feedback="like", window_ms=9),
        ),
        features=ONE,
        recipe=recipe,
    )


@pytest.mark.parametrize(
    ("recipe", "task", "what"),
    [
        (Recipe(tasks=("like",)), {}, "recipe.tasks"),
        (Recipe(tasks=("click", "click")), {}, "each task once"),
        (Recipe(tasks=("click", "order")), {}, "not a declared task"),
        (Recipe(model="module"), {}, "model_function"),
        (Recipe(module="x"), {}, "any other model"),
        (Recipe(model="module", module="nobody"), {}, "no model function"),
        (Recipe(delayed="fake_negative_weighted"), {}, "eager tasks"),
        (Recipe(delayed="fake_negative_weighted"), {"policy": "eager", "correction_weight": 2.0}, "weigh 1"),
        (Recipe(delayed="fake_negative_calibrated", calibrate=True), {"policy": "eager"}, "change the scores"),
        (Recipe(l1_table=0.1), {}, "l1_table"),
        (Recipe(slot_dims={"b": 2}), {}, "slots have"),
        (Recipe(slot_dims={"a": 9}), {}, "above recipe.dim"),
        (Recipe(slot_dims={"a": 4}), {}, "leave no slot"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(recipe, task, what):
    with pytest.raises(ConfigRejected, match=what):
        project(recipe, **task).checked()


def test_good_recipes_are_taken():
    assert project(Recipe(tasks=("click", "like"))).checked().recipe.heads == ("click", "like")
    assert project(late_positives(FAST), policy="eager").checked()
