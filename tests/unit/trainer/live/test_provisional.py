"""Goal: a positive that waits for the negatives of its time changes the scores at once, never what is learnt, and
nothing on average. Method: learners by hand, beside one that is the same without it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from learner_world import FELT, LIVE, SPEC, batch_of, recipe_of

from headrace.contract.recipe import Recipe
from headrace.trainer.model.batch import Batch, joined
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.model.scoring import TARGETS, score

MODELS = ["logistic", "fm", "deepfm", "dcn", "module"]


def one(label: float, time_ms: int, row: int = 0) -> Batch:
    """Return one sample whose ids are those of `row`."""
    slots = np.array([[10 * row, 10 * row + 1, 10 * row + 2, 10 * row + 3]], np.int64)
    rest = np.array([label], np.float32), np.ones(1, np.float32), np.array([time_ms])
    return Batch(slots, np.zeros((1, 2), np.float32), *rest)


def made(recipe: Recipe) -> TableLearner:
    return make_learner(recipe, SPEC, ordered=recipe.heads)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("updates", ["batch", "sample"])
def test_a_click_that_waits_changes_the_next_score_of_its_ids_and_is_learnt_once(model, updates):
    if updates == "sample" and model not in ("logistic", "fm"):
        return
    felt = made(recipe_of(model, **FELT, updates=updates))
    plain = made(recipe_of(model, ordered_from_ms=1, updates=updates))
    for learner in (felt, plain):
        learner.learn(one(0, 500, row=9))
    asked, other = one(0, 0), one(0, 0, row=5)
    scores = [felt.predict(asked)[0]]
    for at in (1_000, 1_100):
        report = felt.learn(one(1, at))
        plain.learn(one(1, at))
        assert set(report.touched_K.tolist()) == set(asked.slots_BF[0].tolist())
        scores.append(felt.predict(asked)[0])
    assert scores == sorted(set(scores)) and felt.held == 2
    assert felt.predict(other)[0] == plain.predict(other)[0]
    # What is learnt never saw it.
    assert felt.digest() == plain.digest()
    report = felt.learn(one(0, 2_000, row=7))
    plain.learn(one(0, 2_000, row=7))
    assert felt.held == 0 and set(asked.slots_BF[0].tolist()) <= set(report.touched_K.tolist())
    assert felt.predict(asked)[0] == plain.predict(asked)[0] and felt.digest() == plain.digest()


@pytest.mark.parametrize("model", MODELS)
def test_what_is_published_scores_as_the_learner_does_and_one_that_was_loaded_too(model):
    """By deltas of the keys that each step names, and by a whole snapshot, in which ids without a row are."""
    recipe = recipe_of(model, **FELT, **LIVE, tasks=("click", "like"), lr_table=0.3)
    learner, served, waited = made(recipe), {}, 0
    for at in range(8):
        batch = replace(batch_of(at, tasks=2, keys=40), event_time_ms_B=np.arange(24) + 30 * at)
        touched_K = learner.learn(batch).touched_K
        waited = max(waited, learner.held)
        delta, whole = learner.weights(touched_K), learner.weights()
        served |= dict(zip(delta.keys_K.tolist(), delta.values_KV, strict=True))
        snapshot = dict(zip(whole.keys_K.tolist(), whole.values_KV, strict=True))
        asked = batch_of(99, tasks=2, keys=40)
        again = made(recipe)
        again.load(learner.state())
        for kept in (served, snapshot):
            first = made(recipe)

            def lookup(keys_K, kept=kept, first=first):
                values_KV = first.lookup(keys_K)
                for i, key in enumerate(keys_K.tolist()):
                    values_KV[i] = kept.get(key, values_KV[i])
                return values_KV

            said_BT = score(recipe, SPEC, asked.slots_BF, asked.numeric_BD, lookup=lookup, dense=whole.dense)
            said_B = said_BT[np.arange(len(asked)), asked.task_B]
            np.testing.assert_array_equal(said_B, learner.predict(asked))
        np.testing.assert_array_equal(again.predict(asked), learner.predict(asked))
    assert waited >= 4


@pytest.mark.parametrize(("model", "optimizer"), [("fm", "adagrad_row"), ("logistic", "ftrl"), ("deepfm", "adam")])
def test_the_mean_of_what_is_said_stays_while_positives_wait(model, optimizer):
    """Ids that are all new and all felt: with nothing taken off the log-odds would be a quarter or more too high."""
    recipe = recipe_of(model, **FELT, **LIVE, optimizer=optimizer, init_scale=0.0)
    felt, plain = made(recipe), made(msgspec.structs.replace(recipe, provisional=False))
    positives = batch_of(1, rows=400, from_ms=5_000)
    positives.label_B[:] = 1
    for learner in (felt, plain):
        learner.learn(one(0, 0, row=9))
        learner.learn(positives)
    assert felt.held == 400
    asked = batch_of(2, rows=400)
    values_KV = felt.lookup(np.unique(asked.slots_BF))
    assert values_KV[:, 0].mean() > 0.05
    odds = [np.log(p / (1 - p)) for p in (learner.predict(asked).astype(float) for learner in (felt, plain))]
    assert abs(np.mean(odds[0]) - np.mean(odds[1])) < 0.01 and np.std(odds[0] - odds[1]) > 0.01
    assert felt.dense()[TARGETS][0, 0] < plain.dense()[TARGETS][0, 0] - 0.2


def test_an_id_that_was_learnt_often_is_hardly_raised_and_none_beyond_the_rate():
    felt = made(recipe_of("fm", **FELT, lr_table=0.1))
    for at in range(300):
        felt.learn(one(0, at, row=3))
        felt.learn(one(1, at, row=3))
    key = np.array([30])
    before = {row: felt.lookup(np.array([10 * row]))[0, 0] for row in (0, 3)}
    felt.learn(joined([one(1, 9_000 + at, row=row) for row in (0, 3) for at in range(200)]))
    assert 0.09 < felt.lookup(np.array([0]))[0, 0] - before[0] <= 0.1
    assert 0 < felt.lookup(key)[0, 0] - before[3] < 0.03


def test_an_id_that_has_no_row_yet_is_not_felt_where_rows_are_admitted_later():
    felt = made(recipe_of("fm", **FELT, admit_after=2))
    felt.learn(one(1, 1_000))
    assert not felt.lookup(one(1, 0).slots_BF[0])[:, 0].any() and felt.held == 1


def test_values_of_either_sign_raise_nothing():
    felt = made(recipe_of("fm", **FELT, objectives={"click": "squared"}))
    felt.learn(one(-3.0, 1_000))
    assert not felt.lookup(one(1, 0).slots_BF[0])[:, 0].any() and felt.held == 1
