"""Goal: a task that learns a value runs from its declaration to the served score, whatever the objective and policy.

Method: items with known rates and mean values; the whole loop in memory. What /v1/rank says of each item must be near
its true mean value, on the value's own scale, and the trainer's figures must be told.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loop_world import Loop, Shown, asked
from trainer_world import TOPICS

from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec, Numeric
from headrace.replay.as_trained import as_trained
from headrace.trainer.recipes import multitask

torch.set_num_threads(1)
RATE_I = np.array([0.1, 0.2, 0.3, 0.4])
MEAN_I = np.array([40.0, 30.0, 60.0, 90.0])
"""Of a sale; so an impression's value is 4, 6, 18 and 36."""
POLICIES = {
    "window": {},
    "eager": {"policy": "eager"},
    "corrected": {"correct_ms": 3_000},
}


def project_of(objective: str, policy: dict, *, recipe=None) -> Project:
    tasks = ("sale", "revenue")
    chosen = recipe or multitask(tasks, objectives={"revenue": objective}, dim=4, hidden=(8,), lr_table=0.05)
    return Project(
        impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}),
        feedback=(FeedbackType(name="sale", tag="s"),),
        tasks=(
            Task(name="sale", feedback="sale", window_ms=2_000),
            Task(name="revenue", feedback="sale", window_ms=2_000, **policy),
        ),
        features=FeatureSpec(features=(Categorical(field="item"), Numeric(field="price"))),
        recipe=chosen,
    ).checked()


def shown(count: int, *, late: bool, seed: int = 3) -> list[Shown]:
    """Return impressions; with `late` a third of the sales come after the window."""
    rng = np.random.default_rng(seed)
    out = []
    for n in range(count):
        item = int(rng.integers(4))
        sale = ()
        if rng.random() < RATE_I[item]:
            after_ms = (
                int(rng.integers(2_100, 4_500)) if late and rng.random() < 0.33 else int(rng.integers(-300, 1_900))
            )
            sale = (("sale", after_ms, float(rng.gamma(4.0, MEAN_I[item] / 4))),)
        fields = {"user": n % 50, "item": item, "price": float(rng.lognormal(9, 1))}
        out.append(Shown(1_000_000 + 5 * n, fields, sale))
    return out


@pytest.mark.parametrize(
    ("objective", "policy"),
    [
        ("tweedie", "window"),
        ("tweedie", "eager"),
        ("weighted", "corrected"),
        ("squared", "corrected"),
        ("huber", "window"),
    ],
)
def test_a_value_is_learnt_and_served_on_its_own_scale(objective, policy, tmp_path):
    events = shown(6_000, late=policy == "corrected")
    loop = Loop(project_of(objective, POLICIES[policy]))
    loop.run(events)
    sold = {f"i{n}": one.feedback[0][2] for n, one in enumerate(events) if one.feedback}
    positive = [row for row in loop.samples if row["task"] == "revenue" and row["label"] > 0]
    assert len(positive) > 1_000 and all(row["value"] == sold[row["event_id"]] for row in positive)
    assert all(row["value"] is None for row in loop.samples if row["label"] == 0)
    assert any(row["correction"] for row in positive) == (policy != "window")

    said = asked(loop.serve(tmp_path), [{"user": 1, "item": i, "price": 8_000.0} for i in range(4)])["revenue"]
    true = RATE_I * MEAN_I
    assert (np.argsort(said) == np.argsort(true)).all()
    if objective != "huber":
        assert abs(said.mean() / true.mean() - 1) < 0.2, said
    standing = loop.trainer.evaluation.standing("revenue")
    figures = standing.figures
    assert not standing.is_provisional and figures.concordance > 0.6
    assert figures.rmse_constant > 0 and figures.mae_constant > 0
    if objective != "huber":
        assert figures.rmse < figures.rmse_constant
    told = {name: loop.metrics.gauges[f"slice_{name}", "revenue"] for name in ("mae", "rmse", "concordance")}
    assert told["rmse"] > told["mae"] > 0 and told["concordance"] > 0.6
    replayed = as_trained(loop.project, TOPICS, loop.world.log.reader(), None)
    assert replayed.equal is True


def test_a_sale_without_a_value_is_refused_and_counted(tmp_path):
    events = shown(300, late=False)
    bare = [Shown(e.time_ms, e.fields, tuple((k, a, None) for k, a, _ in e.feedback)) for e in events]
    loop = Loop(project_of("tweedie", {}))
    loop.run(bare)
    sales = sum(bool(e.feedback) for e in events)
    assert loop.metrics.total("samples_refused_total") == sales > 30
