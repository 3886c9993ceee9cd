"""Goal: rows that the trainer forgot leave serving, and a model that does not fit is said so. Method: a real learner
whose rows expire; a publisher on a memory log with a small region."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

import numpy as np
import pytest
from learner_world import SPEC, batch_of, recipe_of
from serving_world import KEYS, RECIPE, Client, Trainer, World, weights_of

from headrace.contract.formats.snapshot import Manifest, Weights
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD
from headrace.serving.api.app import make_app
from headrace.serving.model.row_table import split_initial
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.tables.table import initial_values


def rows_of(region: SharedModel, keys_K: np.ndarray, recipe: Recipe) -> np.ndarray:
    return region.read(lambda view: view.lookup(keys_K, seed=recipe.seed, scale=recipe.row_scale))[0]


def test_serving_has_exactly_the_trainers_rows_while_they_expire(tmp_path: Path):
    recipe = recipe_of("fm", expire_after_ms=1_000)
    learner = make_learner(recipe, SPEC)
    region = SharedModel(tmp_path / "m", dim=recipe.row_dim, rows_max=400, create=True)
    shapes = {name: list(array.shape) for name, array in learner.dense().items()}
    most, seen_K = 0, np.empty(0, np.int64)
    for step in range(120):
        # Every 5 steps come keys of their own, and time goes on by 0.5 s a step: a row lives for some steps.
        batch = batch_of(step, keys=8, from_ms=500 * step)
        batch.slots_BF[batch.slots_BF != PAD] += 1_000 * (1 + step // 5)
        touched_K = learner.learn(batch).touched_K
        if step % 10 == 9:  # The sweep goes through 1/4,096 of the keys a step: go all the way.
            touched_K = np.concatenate([touched_K, *(learner.table.expire(500 * step) for _ in range(4_096))])
        touched_K = np.unique(touched_K)
        seen_K = np.union1d(seen_K, touched_K)
        meta = Meta(Manifest(kind="delta", model="m", run="r", step=step, version=f"r-{step}"), "", "{}", "{}", shapes)
        kept = split_initial(learner.weights(touched_K), recipe)
        gone_K = kept.gone_K
        if step == 0:
            region.load_snapshot(kept, meta)
        else:
            region.check_fits(kept, meta, gone_K, fresh=False)
            region.apply_delta(kept, meta, gone_K)
        most = max(most, region.rows)
        rows = rows_of(region, seen_K, recipe)
        trained_K = np.isin(seen_K, learner.table.keys())
        np.testing.assert_array_equal(rows[trained_K], learner.lookup(seen_K)[trained_K])
        assert region.rows == learner.rows
    assert len(seen_K) > 2 * most and learner.rows < most


def others(count: int) -> np.ndarray:
    """Return that many keys that the small model does not have."""
    return np.arange(1, 1 + count, dtype=np.int64) * 104_729


def test_rows_at_their_first_values_take_no_place(tmp_path: Path):
    world, rng = World(tmp_path), Random(1)
    trainer = Trainer(world)
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    for turn in range(40):  # 40 x 100 keys that come and expire: 4,000 in a region of 1,000 rows.
        keys = others(100) + turn
        for values in (None, initial_values(keys, dim=RECIPE.dim, seed=RECIPE.seed, scale=RECIPE.row_scale)):
            trainer.learn(rng)
            weights = weights_of("a", trainer.step, keys)
            trainer.delta(weights if values is None else Weights(keys, values, weights.dense), format=1)
        world.follow(2)
        assert world.version == trainer.version
    assert world.shared.rows <= len(KEYS) and world.metrics.gauges["table_rows", ""] == world.shared.rows


def test_a_model_that_does_not_fit_is_not_ready_until_one_fits(tmp_path: Path):
    world, rng = World(tmp_path), Random(1)
    client, trainer = Client(make_app(world.app)), Trainer(world)
    world.features.is_caught_up = True
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    served = world.version
    assert client.get("/readyz").status_code == 200
    trainer.step += 1
    trainer.delta(weights_of("a", trainer.step, others(1_001)))
    world.follow()
    red = client.get("/readyz")
    assert red.status_code == 503 and world.version == served
    assert "serve.rows_max is 1000: raise it and restart `serve`" in red.text and "expire_after_ms" in red.text
    assert world.metrics.counters["versions_refused_total", "does_not_fit"] == 1
    assert client.post("/v1/rank", json={"request_id": "r", "candidates": [{"item": 1}]}).status_code == 200
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    assert world.version == trainer.version and client.get("/readyz").status_code == 200


def test_memory_without_room_for_a_model_is_told_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page that is first written on a full filesystem would end the process with SIGBUS, and each that follows."""
    world, rng = World(tmp_path), Random(1)
    client, trainer = Client(make_app(world.app)), Trainer(world)
    world.features.is_caught_up = True
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    served, reserve = world.version, os.posix_fallocate

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    trainer.step += 1
    trainer.delta(weights_of("a", trainer.step, others(500)))
    world.follow()
    red = client.get("/readyz")
    assert red.status_code == 503 and "No space left on device" in red.text and world.version == served
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    assert world.version == trainer.version and client.get("/readyz").status_code == 200


def test_what_was_said_to_fit_lies_in_memory_that_is_taken(tmp_path: Path):
    region = SharedModel(tmp_path / "m", dim=RECIPE.row_dim, rows_max=100_000, create=True)
    before = (tmp_path / "m").stat().st_blocks
    weights = weights_of("a", 1, others(50_000))
    meta = Meta(Manifest(kind="snapshot", model="m", run="a", step=1, version="a-1"), "a-1", "{}", "{}", {})
    region.check_fits(weights, meta, fresh=True)
    taken = (tmp_path / "m").stat().st_blocks
    region.load_snapshot(weights, meta)
    assert before < taken == (tmp_path / "m").stat().st_blocks
