"""Goal: gradients of values are those of their losses, corrections take zeros back, figures of values are right.

Method: derivatives by differences; plain counting over all pairs.
"""

from __future__ import annotations

import numpy as np
import pytest
from learner_world import SPEC, batch_of, recipe_of

from headrace.contract.errors import ConfigRejected
from headrace.contract.project import Task
from headrace.contract.recipe import Recipe
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.moments import MEMORY, Moments
from headrace.trainer.model.objectives import value_gradients
from headrace.trainer.validation.figures import Scored
from headrace.trainer.validation.value_figures import ValueTally
from headrace.trainer.validation.windows import TaskWindows

MEAN, SCALE = 3.0, 5.0


def loss(objective: str, z: float, value: float) -> float:
    exponential = objective in ("weighted", "tweedie")
    y = value / MEAN if exponential else (value - MEAN) / SCALE
    if objective == "weighted":
        return y * np.log1p(np.exp(-z)) + np.log1p(np.exp(z))
    if objective == "tweedie":
        return y * np.exp(-0.5 * z) / 0.5 + np.exp(0.5 * z) / 0.5
    error = abs(z - y)
    return error**2 / 2 if objective == "squared" or error < 1 else error - 0.5


def gradient(objective: str, z: float, value: float, *, correction: bool = False) -> float:
    one = np.ones(1, np.float32)
    known = np.array([[MEAN], [SCALE]])
    recipe = Recipe(objectives={"click": objective})
    return float(
        value_gradients(
            recipe,
            one * np.float32(z),
            one * np.float32(value),
            one,
            np.zeros(1, np.int8),
            np.array([correction]),
            known,
        )[0]
    )


@pytest.mark.parametrize("objective", ["weighted", "tweedie", "squared", "huber"])
def test_gradients_are_derivatives_and_a_correction_takes_its_zero_back(objective):
    for z in (-1.3, 0.2, 1.7):
        for value in (0.0, 0.5, 7.0, 40.0):
            wanted = (loss(objective, z + 1e-5, value) - loss(objective, z - 1e-5, value)) / 2e-5
            assert abs(gradient(objective, z, value) - wanted) < 1e-3 * (1 + abs(wanted))
            both = gradient(objective, z, 0.0) + gradient(objective, z, value, correction=True)
            assert abs(both - gradient(objective, z, value)) < 1e-4


def test_late_positives_that_are_taken_back_are_learnt_at_the_true_rate():
    """Eager negatives and corrections: q, where learning them as they come says q / (1 + q)."""
    said = {}
    for delayed in ("none", "taken_back"):
        learner, rng = (
            make_learner(recipe_of("logistic", delayed=delayed, lr_table=0.02), SPEC),
            np.random.default_rng(1),
        )
        for at in range(200):
            # Negatives of some impressions, and corrections of others: a correction looks like any impression.
            batch = batch_of(at, rows=140)
            batch.label_B[:], batch.weight_B[:] = 0, 1
            some = rng.permutation(140) < 40
            batch.label_B[some], batch.correction_B[some] = 1, True
            learner.learn(batch)
        said[delayed] = learner.predict(batch_of(999, rows=500)).mean()
    assert abs(said["taken_back"] - 0.4) < 0.03 and abs(said["none"] - 0.4 / 1.4) < 0.03


def test_positives_wait_for_the_first_negative():
    learner = make_learner(recipe_of("deepfm", wait_for_negative=True), SPEC)
    batch = batch_of(1)
    batch.label_B[:] = 1
    before = learner.predict(batch)
    learner.learn(batch)
    np.testing.assert_array_equal(learner.predict(batch), before)
    batch.label_B[0] = 0
    learner.learn(batch)
    assert (learner.predict(batch) > before).sum() > 20


def test_one_wrong_number_does_not_flatten_the_others():
    moments = Moments(Recipe(standardize=True), 1)
    rng = np.random.default_rng(0)

    def take(x):
        n = len(x)
        args = x.astype(np.float32)[:, None], np.zeros(n, np.float32), np.ones(n, np.float32), np.zeros(n, np.int8)
        return moments.take(*args, more_B=np.zeros(n, bool), in_order=False)

    take(rng.normal(1_000, 50, 5_000))
    take(np.array([3e38]))
    mean, inverse = moments.dense()["numbers"][:, 0]
    assert abs(mean - 1_000) < 3 and abs(inverse * 50 - 1) < 0.1
    take(rng.normal(2_000, 50, int(3 * MEMORY)))
    assert abs(moments.dense()["numbers"][0, 0] - 2_000) < 100


def test_figures_of_values_equal_counting():
    rng = np.random.default_rng(2)
    value = np.where(rng.random(400) < 0.3, 2.0 ** rng.integers(0, 8, 400), 0.0)
    said = value * 0.3 + rng.gamma(2, 5, 400)
    nothing = np.zeros(400, bool)
    scored = Scored(
        said.astype(np.float32), np.full(400, 3, np.float32), value > 0, nothing, np.zeros((400, 0), np.int64),
        value.astype(np.float32),
    )  # fmt: skip
    tally = ValueTally()
    tally.add(scored)
    found = tally.figures()
    assert abs(found.mae - np.abs(said - value).mean()) < 1e-4
    assert abs(found.rmse - np.sqrt(((said - value) ** 2).mean())) < 1e-4
    assert abs(found.mae_constant - np.abs(value - value.mean()).mean()) < 0.5
    assert abs(found.rmse_constant - value.std()) < 1e-4
    above = value[:, None] > value[None, :]
    right = (said[:, None] > said[None, :])[above].mean()
    assert abs(found.concordance - right) < 5e-3 and found.concordance_item_rate == 0.5
    assert repr(ValueTally.load(tally.state()).figures()) == repr(found)


def test_a_value_that_comes_late_takes_its_zero_back():
    def of(value, correction):
        return Scored(
            np.array([2.5], np.float32), np.zeros(1, np.float32), np.array([value > 0]), np.array([correction]),
            np.zeros((1, 0), np.int64), np.array([value], np.float32),
        )  # fmt: skip

    once, twice = ValueTally(), ValueTally()
    once.add(of(7.0, False))
    twice.add(of(0.0, False))
    twice.add(of(7.0, True))
    assert repr(once.figures()) == repr(twice.figures())


def test_a_fast_task_does_not_wait_for_a_slow_one():
    """Windows of 2 s and of 300 s with corrections to 30 minutes: the first provisional figures, the settled ones."""
    fast = TaskWindows(Task(name="click", feedback="click", window_ms=2_000), ValueTally)
    slow = TaskWindows(Task(name="buy", feedback="buy", window_ms=300_000, correct_ms=1_500_000), ValueTally)
    first: dict[str, int] = {}
    for second in range(4_000):
        for name, windows in (("fast", fast), ("slow", slow)):
            one = Scored(
                np.ones(1, np.float32), np.ones(1, np.float32), np.ones(1, bool), np.zeros(1, bool),
                np.zeros((1, 0), np.int64), np.ones(1, np.float32),
            )  # fmt: skip
            windows.add(one, np.array([second * 1_000]))
            windows.close(second * 1_000)
            if windows.provisional(second * 1_000).figures().samples:
                first.setdefault(f"{name} provisional", second)
            if windows.is_settled:
                first.setdefault(f"{name} settled", second)
        if second == 10:
            assert slow.next_in_ms(10_000, provisional=False) == 590_000
            assert slow.next_in_ms(10_000, provisional=True) == 3_290_000
    assert first == {"fast provisional": 4, "fast settled": 12, "slow provisional": 600, "slow settled": 3_300}
    assert slow.recent() == (1_500, 1.0)
    again = TaskWindows(Task(name="buy", feedback="buy", window_ms=300_000, correct_ms=1_500_000), ValueTally)
    again.load(slow.state())
    assert repr(again.total.figures()) == repr(slow.total.figures())
    assert again.state().keys() == slow.state().keys()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"objectives": {"buy": "tweedie"}}, "does not learn"),
        ({"objectives": {"click": "tweedie"}, "calibrate": True}, "of log-odds"),
        ({"objectives": {"click": "tweedie"}, "model": "fm", "updates": "sample"}, "objectives"),
    ],
)
def test_what_contradicts_an_objective_is_refused(changes, what):
    with pytest.raises(ConfigRejected, match=what):
        Recipe(**changes).checked(SPEC)
