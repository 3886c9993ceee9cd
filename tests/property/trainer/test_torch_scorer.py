"""Goal: the scorer that is exported says what serving says, whatever recipe, weights, ids and numbers are. Method:
recipes, tables and features at random, against serving's shared memory; as torch runs it (what its exporters make of it
is held by tests/unit/export), and for some seeds as they wrote it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_world import SPEC
from model_world import asked, exported, served

from headrace.contract.formats.snapshot import Weights
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD, FeatureSpec
from headrace.trainer.export.export import TOLERANCE
from headrace.trainer.export.torch_scorer import TorchScorer
from headrace.trainer.model.scoring import shapes_of

TASKS = ("click", "like", "dwell")


def random_recipe(rng: Random) -> Recipe:
    """Return a recipe that may be declared."""
    model = rng.choice(["logistic", "fm", "deepfm", "dcn", "module"])
    tasks = TASKS[: rng.randint(1, 3)]
    values: dict[str, Any] = {
        "model": model,
        "module": "towers" if model == "module" else "",
        "tasks": tasks,
        "dim": rng.choice([0, 1, 2, 5]),
        "hidden": rng.choice([(), (3,), (4, 2)]),
        "cross_layers": rng.randint(1, 3),
        "cross_rank": rng.choice([0, 2]),
        "seed": rng.choice([0, 7, 2**40]),
        "init_scale": rng.choice([0.0, 0.01, 0.5]),
        "standardize": rng.random() < 0.5,
    }
    if rng.random() < 0.4:
        kinds = ["weighted", "squared", "huber", "tweedie"]
        values["objectives"] = {name: rng.choice(kinds) for name in tasks if rng.random() < 0.6}
    if not values.get("objectives"):
        values |= rng.choice([{}, {"calibrate": True}, {"delayed": "fake_negative_calibrated"}])
    if model != "logistic" and values["dim"] > 1 and rng.random() < 0.5:
        values["slot_dims"] = {"a": rng.randint(0, 1)}
    return Recipe(**values).checked(SPEC)


def random_weights(recipe: Recipe, spec: FeatureSpec, rng: np.random.Generator) -> Weights:
    """Return weights of a model that nobody has learnt; some of them as float16 keeps them."""
    dense = {name: (rng.normal(size=shape) * 0.5).astype(np.float32) for name, shape in shapes_of(recipe, spec).items()}
    if "targets" in dense:
        dense["targets"] = np.abs(dense["targets"])
    keys = np.setdiff1d(rng.integers(-(2**63), 2**63 - 1, int(rng.integers(0, 60))), [0, PAD])
    keys = np.append(keys, [-(2**63), 2**63 - 1, 1, -2])[rng.permutation(len(keys) + 4)[: len(keys)]]
    rows = (rng.normal(size=(len(keys), 1 + recipe.row_dim)) * 0.3).astype(np.float32)
    return Weights(keys, rows.astype(np.float16).astype(np.float32) if rng.random() < 0.5 else rows, dense)


def random_features(weights: Weights, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, known, unknown and none, those next to a known one among them; and numbers."""
    slots = rng.integers(-(2**63), 2**63 - 1, (rows, SPEC.slots))
    if len(weights.keys_K):
        known = rng.random(slots.shape) < 0.6
        slots[known] = rng.choice(weights.keys_K, int(known.sum()))
        beside = rng.random(slots.shape) < 0.1
        slots[beside] ^= 1
    slots[rng.random(slots.shape) < 0.15] = PAD
    slots[slots == 0] = 3
    return slots, (rng.normal(size=(rows, SPEC.numerics)) * 3).astype(np.float32)


def near(said: np.ndarray, wanted: np.ndarray) -> bool:
    return bool((np.abs(said - wanted) <= TOLERANCE * np.maximum(np.abs(wanted), 1)).all())


def drawn(seed: int) -> tuple[Recipe, Weights, np.ndarray, np.ndarray]:
    recipe, rng = random_recipe(Random(seed)), np.random.default_rng(seed)
    weights = random_weights(recipe, SPEC, rng)
    return recipe, weights, *random_features(weights, rng, 40)


@pytest.mark.parametrize("part", range(5))
def test_torch_says_what_serving_says(part: int, tmp_path: Path) -> None:
    for seed in range(part * 12, part * 12 + 12):
        recipe, weights, slots, numeric = drawn(seed)
        order = np.argsort(weights.keys_K)
        held = Weights(weights.keys_K[order], weights.values_KV[order], weights.dense)
        with torch.no_grad():
            said = TorchScorer(recipe, SPEC, held, has_rows=True)(torch.from_numpy(slots), torch.from_numpy(numeric))
        wanted = served(recipe, weights, slots, numeric, tmp_path, SPEC)
        for task in recipe.heads:
            assert near(said[task].numpy(), wanted[task]), (seed, task, msgspec.to_builtins(recipe))


@pytest.mark.parametrize("seed", [100, *(pytest.param(s, marks=pytest.mark.long) for s in range(101, 140))])
def test_what_was_exported_says_it_too(seed: int, tmp_path: Path) -> None:
    recipe, weights, slots, numeric = drawn(seed)
    how = {} if seed % 2 else {"inline_bytes": 0}
    exported(recipe, weights, tmp_path / "out", SPEC, **how)
    wanted = served(recipe, weights, slots, numeric, tmp_path, SPEC)
    for said in asked(tmp_path / "out", slots, numeric).values():
        for task in recipe.heads:
            assert near(said[task], wanted[task]), (seed, task, msgspec.to_builtins(recipe))
