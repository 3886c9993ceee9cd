"""Goal: every model is servable, one may follow another, and several tasks are answered beside each other. Method: the
trainer's learners publish into serving's small world; answers are held against the learner's own predictions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from learner_world import recipe_of
from serving_world import SPEC, Client, Trainer, World, slots_of

from headrace.contract.recipe import Model, Recipe
from headrace.serving.api.app import make_app
from headrace.stream.features.featurize import featurize
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import TableLearner, make_learner

TASKS = ("click", "like", "dwell")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.shared.path.unlink()


def learnt(recipe: Recipe, seed: int = 1) -> TableLearner:
    learner, rng = make_learner(recipe, SPEC), np.random.default_rng(seed)
    for _ in range(3):
        users, items = rng.integers(0, 20, 64).tolist(), rng.integers(0, 20, 64).tolist()
        learner.learn(
            Batch(
                slots_of(users, items),
                rng.normal(size=(64, SPEC.numerics)).astype(np.float32),
                rng.integers(0, 2, 64).astype(np.float32),
                np.ones(64, np.float32),
                np.arange(64),
                rng.integers(0, len(recipe.heads), 64).astype(np.int8),
            )
        )
    return learner


def publish(world: World, recipe: Recipe, learner: TableLearner, run: str) -> None:
    """Announce a snapshot of the learner, of a run of its own."""
    weights = learner.weights()
    trainer = Trainer(world, run=run, step=1)
    world.models[trainer.version] = dict(zip(weights.keys_K.tolist(), weights.values_KV, strict=True)), weights.dense
    trainer.snapshot(recipe_json=msgspec.json.encode(recipe).decode(), dim=recipe.row_dim)
    world.follow()


def ask(world: World) -> dict:
    body = {"request_id": "r", "context": {"user": 3, "price": 2.0}, "candidates": [{"item": 1}, {"item": 2}]}
    return Client(make_app(world.app)).post("/v1/rank", json=body).json()


def expected(world: World, learner: TableLearner, task: int) -> np.ndarray:
    """Return what the learner itself says of the request's rows."""
    columns = {"user": pa.array([3, 3]), "item": pa.array([1, 2]), "price": pa.array([2.0, 2.0])}
    columns |= dict.fromkeys(SPEC.counter_columns(), pa.array([0.0, 0.0], pa.float32()))
    columns["event_time_ms"] = pa.array([world.clock.now_ms()] * 2, pa.int64())
    slots, numeric = featurize(columns, SPEC)
    none = np.zeros(2, np.float32)
    return learner.predict(Batch(slots, numeric, none, none, np.zeros(2, np.int64), np.full(2, task, np.int8)))


def test_one_model_follows_another(world):
    for n, model in enumerate(get_args(Model)):
        recipe = recipe_of(model)
        learner = learnt(recipe)
        publish(world, recipe, learner, f"run{n}")
        answer = ask(world)
        assert answer["version"] == f"run{n}-1" and "tasks" not in answer
        np.testing.assert_allclose(answer["scores"], expected(world, learner, 0), rtol=1e-5)


@pytest.mark.parametrize("model", ["deepfm", "logistic", "module"])
def test_the_other_tasks_are_answered_beside_the_main_one(world, model):
    recipe = recipe_of(model, tasks=TASKS, task="like")
    learner = learnt(recipe)
    publish(world, recipe, learner, "many")
    answer = ask(world)
    assert set(answer["tasks"]) == {"click", "dwell"}
    np.testing.assert_allclose(answer["scores"], expected(world, learner, 1), rtol=1e-5)
    np.testing.assert_allclose(answer["tasks"]["dwell"], expected(world, learner, 2), rtol=1e-5)


def test_wider_rows_than_the_region_and_unknown_modules_are_refused(world):
    recipe = recipe_of("fm", dim=9)
    publish(world, recipe, learnt(recipe), "wide")
    assert "restart `serve`" in world.shared.refused()
    mine = recipe_of("module")
    publish(world, msgspec.structs.replace(mine, module="nobody"), learnt(mine), "nobody")
    assert "no model function 'nobody'" in world.shared.refused()
