"""Goal: a model that has learnt for half a year still learns, and what is learnt depends on event time alone.

Method: ids whose click rates stay as they are for 26 weeks, then turn round; the same stream with and without
`squares_half_life_ms`, and at other step sizes' pace of arrival. Adagrad's rate would otherwise decay to nothing.
"""

from __future__ import annotations

import numpy as np
import torch

from headrace.contract.project import Recipe
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner

torch.set_num_threads(1)
SPEC = FeatureSpec(features=(Categorical(field="item"),))
DAY_MS = 86_400_000
WEEKS, A_DAY, IDS = 26, 400, 10


def day(number: int, *, turned: bool) -> Batch:
    """Return a day's samples."""
    rng = np.random.default_rng(number)
    slot = rng.integers(0, IDS, A_DAY)
    rate = np.where((slot % 2 == 0) ^ turned, 0.8, 0.2)
    time_ms = number * DAY_MS + np.sort(rng.integers(0, DAY_MS, A_DAY))
    label = (rng.random(A_DAY) < rate).astype(np.float32)
    return Batch(slot[:, None], np.zeros((A_DAY, 0), np.float32), label, np.ones(A_DAY, np.float32), time_ms)


def learnt(half_life_ms: int, optimizer: str = "adagrad_row"):
    """Learn 26 weeks; return the learner."""
    recipe = Recipe(model="logistic", optimizer=optimizer, lr_table=0.3, squares_half_life_ms=half_life_ms)
    learner = make_learner(recipe, SPEC)
    for number in range(7 * WEEKS):
        whole = day(number, turned=False)
        for at in range(0, A_DAY, 50):
            learner.learn(whole.where(np.arange(A_DAY) // 50 == at // 50))
    return learner


def days_to_turn(learner) -> int:
    """Return how many days after the change the scores are on the right side for every id."""
    for after in range(1, 60):
        whole = day(7 * WEEKS + after, turned=True)
        for at in range(0, A_DAY, 50):
            learner.learn(whole.where(np.arange(A_DAY) // 50 == at // 50))
        every = np.arange(IDS)
        asked = Batch(
            every[:, None], np.zeros((IDS, 0), np.float32), np.zeros(IDS, np.float32), np.ones(IDS, np.float32),
            np.full(IDS, (7 * WEEKS + after + 1) * DAY_MS),
        )  # fmt: skip
        said = learner.predict(asked)
        if ((said > 0.5) == (every % 2 == 1)).all():
            return after
    return 60


def test_a_half_life_keeps_the_rate_alive():
    for optimizer in ("adagrad_row", "adagrad"):
        without, with_it = days_to_turn(learnt(0, optimizer)), days_to_turn(learnt(14 * DAY_MS, optimizer))
        assert with_it * 2 <= without, (optimizer, without, with_it)


def test_a_half_life_costs_nothing_where_nothing_changes():
    """Both know the rates after half a year as well."""
    whole = day(7 * WEEKS, turned=False)
    losses = []
    for half_life_ms in (0, 14 * DAY_MS):
        p = learnt(half_life_ms).predict(whole)
        losses.append(-np.log(np.where(whole.label_B > 0.5, p, 1 - p)).mean())
    assert abs(losses[0] - losses[1]) < 0.01 and losses[1] < 0.56


def test_only_event_time_decides():
    one, two = learnt(14 * DAY_MS), learnt(14 * DAY_MS)
    assert one.digest() == two.digest()
    late = make_learner(one.recipe, SPEC)
    for number in range(7 * WEEKS):
        whole = day(number, turned=False)
        shifted = Batch(
            whole.slots_BF, whole.numeric_BD, whole.label_B, whole.weight_B, whole.event_time_ms_B + 1_000 * DAY_MS
        )
        for at in range(0, A_DAY, 50):
            late.learn(shifted.where(np.arange(A_DAY) // 50 == at // 50))
    assert np.array_equal(late.weights(np.arange(IDS)).values_KV, one.weights(np.arange(IDS)).values_KV)
