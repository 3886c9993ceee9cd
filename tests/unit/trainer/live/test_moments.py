"""Goal: running moments are those of what was learnt: each sample by its weight, a correction beside its negative, old
ones forgotten as stated, and all of it in the state.

Method: the same figures by plain sums.
"""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from headrace.contract.recipe import Recipe
from headrace.trainer.model.moments import CLIP, MEMORY, Moments, as_learnt

PLAIN = Recipe(standardize=True)
RECENT = Recipe(standardize=True, recent_base=True)
TWO = Recipe(tasks=("click", "pay"), objectives={"pay": "squared"}, standardize=True, recent_base=True)


def take(moments, label, *, weight=None, task=None, more=None, numbers=None, in_order=False):
    n = len(label)
    return moments.take(
        np.zeros((n, 1), np.float32) if numbers is None else numbers,
        np.array(label, np.float32),
        np.ones(n, np.float32) if weight is None else np.array(weight, np.float32),
        np.zeros(n, np.int8) if task is None else np.array(task, np.int8),
        more_B=np.zeros(n, bool) if more is None else np.array(more, bool),
        in_order=in_order,
    )


def log_odds(rate: float) -> float:
    return float(np.log(rate / (1 - rate)))


def labels(n: int = 300) -> np.ndarray:
    return (np.random.default_rng(5).random(n) < 0.3).astype(float)


def test_a_base_rate_is_the_mean_with_half_a_positive_before():
    moments, label = Moments(PLAIN, 1), labels()
    for part in np.array_split(label, 7):
        take(moments, part)
    assert moments.base_rates()[0] == pytest.approx((0.5 + label.sum()) / (1 + len(label)), rel=1e-12)
    assert moments.dense()["targets"][0, 0] == pytest.approx(log_odds(moments.base_rates()[0]), rel=1e-6)


def test_a_recent_base_rate_weighs_the_nth_as_its_third_power():
    moments, label = Moments(RECENT, 1), labels()
    for part in np.array_split(label, 7):
        take(moments, part)
    every = np.array([0.5, *label])
    weight = np.array([comb(n + 2, 3) for n in range(1, len(every) + 1)], float)
    assert moments.base_rates()[0] == pytest.approx((weight * every).sum() / weight.sum(), rel=1e-9)


@pytest.mark.parametrize("recipe", [PLAIN, RECENT])
def test_a_correction_adds_its_label_and_no_sample(recipe):
    """Ten negatives, three of them corrected at once: the step that the last of them took, three times."""
    moments, plain = Moments(recipe, 1), Moments(recipe, 1)
    take(plain, [0.0] * 10)
    take(moments, [0.0] * 10 + [1.0] * 3, more=[False] * 10 + [True] * 3)
    step = 4 / (11 + 3) if recipe.recent_base else 1 / 11
    assert moments.base_rates()[0] == pytest.approx(plain.base_rates()[0] + 3 * step, rel=1e-9)


def test_weights_count_and_negatives_stand_for_those_that_are_left_out():
    moments = Moments(Recipe(standardize=True, negative_share=0.25), 1)
    take(moments, [1.0, 0.0, 0.0], weight=[2.0, 1.0, 0.0])
    assert moments.base_rates()[0] == pytest.approx((0.5 + 2.0) / (1 + 2 + 4), rel=1e-12)


@pytest.mark.parametrize("recipe", [PLAIN, RECENT])
def test_what_is_older_than_the_memory_is_forgotten(recipe):
    moments = Moments(recipe, 1)
    for _ in range(2):
        take(moments, np.zeros(int(2 * MEMORY)))
        take(moments, np.ones(int(MEMORY)))
    assert moments.base_rates()[0] == pytest.approx(1 - np.exp(-1), abs=0.1)
    assert moments.base_rates()[0] < 1 - 0.3 * np.exp(-1)


def test_what_weights_add_on_average_is_taken_off():
    moments, z_B = Moments(RECENT, 1), np.random.default_rng(2).normal(0.4, 0.5, 50).astype(np.float32)
    label = np.array([1.0] * 5 + [0.0] * 45)
    ones, task, more = np.ones(50, np.float32), np.zeros(50, np.int8), np.zeros(50, bool)
    for _ in range(200):
        base_T = moments.base_rates()
        take(moments, label)
        moments.follow(base_T, z_B, label.astype(np.float32), ones, task, more_B=more)
    said = 1 / (1 + np.exp(-(moments.dense()["targets"][0, 0] + z_B)))
    without = 1 / (1 + np.exp(-(log_odds(0.1) + z_B)))
    assert abs(said.mean() / 0.1 - 1) < 0.02 and without.mean() / 0.1 > 1.4


def test_the_excess_is_a_mean_of_samples_by_weight_and_not_of_corrections():
    recipe = Recipe(standardize=True, recent_base=True, negative_share=0.5)
    moments, base_T = Moments(recipe, 1), np.array([0.2])
    label, weight = np.array([0.0, 1.0, 0.0, 1.0], np.float32), np.array([1, 3, 0, 5], np.float32)
    more = np.array([False, False, False, True])
    take(moments, label, weight=weight, more=more)
    z_B = np.array([-1.0, 0.5, 9.0, 9.0], np.float32)
    moments.follow(base_T, z_B, label, weight, np.zeros(4, np.int8), more_B=more)
    said = 1 / (1 + np.exp(-(log_odds(0.2) + z_B[:2].astype(float))))
    mean = (2 * said[0] + 3 * said[1]) / 5 / 0.2
    step = min(5 * 4 / (1 + 5 + 3), 1.0)
    assert moments.excess_T[0] == pytest.approx(1 + step * (mean - 1), rel=1e-6)


def test_a_value_that_comes_late_leaves_the_moments_of_that_value_alone():
    once, late = Moments(TWO, 1), Moments(TWO, 1)
    values = [3.0, 0.0, 8.0, 0.0]
    take(once, values, task=[1] * 4)
    take(late, [0.0] * 4 + [3.0, 8.0], task=[1] * 6, more=[False] * 4 + [True] * 2)
    np.testing.assert_allclose(once.targets_3T[:, 1], late.targets_3T[:, 1], rtol=1e-12)
    mean, deviation = once.dense()["targets"][:, 1]
    assert (mean, deviation) == pytest.approx((np.mean(values), np.std(values)), rel=1e-6)
    assert once.base_rates()[0] == 0.5, "another task's samples are none of its own"


def test_numbers_are_learnt_by_the_mean_and_deviation_of_those_before():
    rng = np.random.default_rng(3)
    moments, whole = Moments(PLAIN, 1), rng.normal(7, 3, (400, 1)).astype(np.float32)
    for part in np.array_split(whole, 5):
        before = moments.dense()["numbers"]
        known = take(moments, np.zeros(len(part)), numbers=part)
        np.testing.assert_array_equal(known.numeric_BD, as_learnt(part, before))
    mean, inverse = moments.dense()["numbers"][:, 0]
    assert mean == pytest.approx(whole.mean(), rel=1e-5) and 1 / inverse == pytest.approx(whole.std(), rel=1e-5)
    assert as_learnt(np.full((1, 1), 1e9, np.float32), moments.dense()["numbers"])[0, 0] == CLIP


def test_the_state_is_all_of_it():
    first, again = Moments(TWO, 1), Moments(TWO, 1)

    def step(moments: Moments, at: int) -> None:
        rng = np.random.default_rng(at)
        label, task = rng.integers(0, 2, 30).astype(float), rng.integers(0, 2, 30)
        base_T, numbers = moments.base_rates(), rng.normal(size=(30, 1)).astype(np.float32)
        take(moments, label, task=task, numbers=numbers)
        rest = label.astype(np.float32), np.ones(30, np.float32), task
        moments.follow(base_T, rng.normal(size=30).astype(np.float32), *rest, more_B=np.zeros(30, bool))

    for at in range(3):
        step(first, at)
    kept = first.state()
    step(first, 3)
    again.load(kept)
    step(again, 3)
    assert first.state().keys() == again.state().keys() == {"numbers", "targets", "excess"}
    for name, array in first.state().items():
        np.testing.assert_array_equal(array, again.state()[name])
