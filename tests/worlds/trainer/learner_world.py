"""What the learners' tests share: recipes of all kinds, batches from a seed, plain twins of the models for autograd."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import torch

from headrace.contract.functions import ModelShape, model_function
from headrace.contract.recipe import Model, Optimizer, Recipe
from headrace.contract.spec import PAD, Categorical, FeatureSpec, MultiValued, Numeric
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import TableLearner

SPEC = FeatureSpec(
    features=(
        Categorical(field="a"),
        Categorical(field="b"),
        MultiValued(field="c", values_max=2),
        Numeric(field="x"),
        Numeric(field="y"),
    )
)


@model_function("towers", version=1)
def towers(shape: ModelShape) -> torch.nn.Module:
    """Two small layers over the embeddings and numbers, and the linear weights beside them."""

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(shape.slots * shape.dim + shape.numerics, 8)
            self.last = torch.nn.Linear(8, shape.tasks)

        def forward(self, embedding_BFE, linear_BF, numeric_BD):
            x = torch.cat([embedding_BFE.flatten(1), numeric_BD], dim=1)
            return self.last(torch.tanh(self.first(x))) + linear_BF.sum(1, keepdim=True)

    return Towers()


def recipe_of(model: str, **changes) -> Recipe:
    """Return a small recipe of a model whose first steps are large enough to see."""
    values = {
        "model": model,
        "dim": 4,
        "hidden": (8, 4),
        "init_scale": 0.3,
        "lr_table": 0.1,
        "lr_dense": 0.01,
        "module": "towers" if model == "module" else "",
    }
    return Recipe(**(values | changes))


LIVE = {"standardize": True, "wait_for_negative": True, "delayed": "taken_back"}
FELT = {"ordered_from_ms": 1, "provisional": True}
VALUES = {"tasks": ("click", "like", "dwell"), "objectives": {"like": "tweedie", "dwell": "squared"}}
RECIPES = {
    **{
        f"{model}-{kind}": recipe_of(model, optimizer=kind) for model in get_args(Model) for kind in get_args(Optimizer)
    },
    **{f"{model}-tasks": recipe_of(model, tasks=("click", "like", "dwell")) for model in get_args(Model)},
    "dcn-rank": recipe_of("dcn", cross_rank=3, cross_layers=3),
    "deepfm-calibrated": recipe_of("deepfm", calibrate=True),
    "deepfm-average": recipe_of("deepfm", dense_average=0.9),
    "module-average": recipe_of("module", dense_average=0.9),
    "deepfm-sampled": recipe_of("deepfm", negative_share=0.5),
    "fm-weighted": recipe_of("fm", delayed="fake_negative_weighted"),
    "logistic-late": recipe_of("logistic", delayed="fake_negative_calibrated"),
    "logistic-sparse": recipe_of("logistic", optimizer="ftrl", l1_table=0.5, l2_table=0.1),
    "deepfm-admitted": recipe_of("deepfm", admit_after=3, expire_after_ms=2_000),
    "deepfm-half-life": recipe_of("deepfm", squares_half_life_ms=60_000),
    "dcn-slots": recipe_of("dcn", slot_dims={"a": 2, "c": 0}, slot_optimizers={"b": "ftrl", "c": "adam"}),
    "module-slots": recipe_of("module", slot_dims={"b": 1}, slot_optimizers={"a": "adagrad"}),
    **{
        f"{model}-in-order-{kind}": recipe_of(model, updates="sample", optimizer=kind)
        for model in ("logistic", "fm")
        for kind in get_args(Optimizer)
    },
    "fm-in-order-calibrated": recipe_of("fm", updates="sample", calibrate=True, negative_share=0.5),
    "fm-in-order-admitted": recipe_of("fm", updates="sample", admit_after=2, expire_after_ms=2_000),
    "deepfm-live": recipe_of("deepfm", **LIVE, rate_rows=64, dense_average=0.9),
    "deepfm-ordered": recipe_of("deepfm", **LIVE, tasks=("click", "like"), ordered_from_ms=1, dense_average=0.9),
    "module-ordered": recipe_of("module", **VALUES, ordered_from_ms=1, negative_share=0.5),
    "fm-in-order-ordered": recipe_of("fm", updates="sample", ordered_from_ms=1, admit_after=2),
    "deepfm-provisional": recipe_of("deepfm", **FELT, **LIVE, tasks=("click", "like"), dense_average=0.9),
    "deepfm-average-provisional": recipe_of("deepfm", **FELT, dense_average=0.9, expire_after_ms=2_000),
    "dcn-slots-provisional": recipe_of("dcn", **FELT, slot_dims={"a": 2, "c": 0}, slot_optimizers={"b": "ftrl"}),
    "module-provisional": recipe_of("module", **FELT, **VALUES, negative_share=0.5),
    "logistic-provisional": recipe_of("logistic", **FELT, tasks=("click", "like"), optimizer="ftrl"),
    "fm-in-order-provisional": recipe_of("fm", **FELT, updates="sample", admit_after=2),
    "deepfm-recent": recipe_of("deepfm", **LIVE, recent_base=True, tasks=("click", "like"), dense_average=0.9),
    "logistic-recent": recipe_of("logistic", **LIVE, recent_base=True, negative_share=0.5),
    "logistic-live": recipe_of("logistic", **LIVE, negative_share=0.5),
    "module-live": recipe_of("module", **LIVE, calibrate=True),
    "fm-in-order-live": recipe_of("fm", updates="sample", **LIVE),
    "logistic-in-order-live": recipe_of("logistic", updates="sample", **LIVE, optimizer="adagrad", squares_init=0.1),
    "deepfm-values": recipe_of("deepfm", **VALUES, **LIVE),
    "fm-values": recipe_of("fm", tasks=("click", "dwell"), objectives={"dwell": "huber"}, rate_rows=64),
    "logistic-values": recipe_of("logistic", **VALUES, negative_share=0.5),
    "dcn-values": recipe_of("dcn", objectives={"click": "weighted"}, dense_average=0.9),
    "module-values": recipe_of("module", **VALUES, optimizer="adagrad", squares_init=0.5),
    "fm-sketch": recipe_of("fm", admit_after=2, admit_by="sketch", expire_after_ms=2_000),
}
"""Every model with every optimizer, with several tasks, and each choice of a recipe at least once."""


def batch_of(seed: int, rows: int = 24, keys: int = 10, tasks: int = 1, from_ms: int = 0) -> Batch:
    """Return samples from a seed: ids that repeat, some pads, numbers, labels, weights, times within a second."""
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, keys, (rows, SPEC.slots)) * SPEC.slots + np.arange(SPEC.slots) - 70
    slots[rng.random(rows) < 0.3, -1] = PAD
    return Batch(
        slots,
        rng.normal(size=(rows, SPEC.numerics)).astype(np.float32),
        rng.integers(0, 2, rows).astype(np.float32),
        rng.random(rows).astype(np.float32) + 0.5,
        from_ms + rng.integers(0, 1_000, rows),
        rng.integers(0, tasks, rows).astype(np.int8),
        rng.integers(-(2**63), 2**63 - 1, rows),
    )


def twin_logits(recipe: Recipe, weights, values_BFV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return log-odds [B, T] by the plain formulas of `scoring`, for autograd."""
    numeric = torch.from_numpy(batch.numeric_BD)
    out = numeric @ weights["numeric"] + weights["bias"]
    if recipe.model == "logistic":
        return out + values_BFV.sum(1)
    embedding, mix = values_BFV[:, :, 1:], weights.get("mix", torch.ones(2, 1))
    out = out + mix[0] * values_BFV[:, :, 0].sum(1, keepdim=True)
    if recipe.model in ("fm", "deepfm"):
        pairs = itertools.combinations(range(embedding.shape[1]), 2)
        products = sum((embedding[:, i] * embedding[:, j]).sum(1) for i, j in pairs)
        out = out + mix[1] * products[:, None]
    x = torch.cat([embedding.flatten(1), numeric], dim=1)
    if recipe.model == "dcn":
        last = x
        for i in range(recipe.cross_layers):
            rank = recipe.cross_rank
            matrix = weights[f"cross_u{i}"] @ weights[f"cross_v{i}"] if rank else weights[f"cross_w{i}"]
            last = x * (last @ matrix + weights[f"cross_b{i}"]) + last
        out = out + last @ weights["cross"]
    if recipe.model in ("deepfm", "dcn"):
        for i in range(len(recipe.hidden)):
            x = torch.relu(x @ weights[f"w{i}"] + weights[f"b{i}"])
        out = out + x @ weights[f"w{len(recipe.hidden)}"] + weights[f"b{len(recipe.hidden)}"]
    return out


CHANGING_SPEC = FeatureSpec(features=(Categorical(field="a"), Categorical(field="b"), Numeric(field="x")))
CHANGING = {
    "rows expire": Recipe(model="fm", dim=2, hidden=(), expire_after_ms=2_000),
    "rows are admitted": Recipe(model="logistic", dim=0, hidden=(), admit_after=2, expire_after_ms=3_000),
    "two kinds": Recipe(model="fm", dim=2, hidden=(), slot_optimizers={"b": "adam"}, expire_after_ms=4_000),
    "in order": Recipe(model="fm", dim=2, hidden=(), updates="sample", expire_after_ms=2_000),
}
"""Recipes under which rows come, change and go in each way that there is."""


def changing_batch(rng: np.random.Generator, at_ms: int) -> Batch:
    rows = int(rng.integers(1, 12))
    return Batch(
        rng.integers(1, 40, (rows, 2)).astype(np.int64),
        rng.random((rows, 1), np.float32),
        rng.integers(0, 2, rows).astype(np.float32),
        np.ones(rows, np.float32),
        np.full(rows, 3_600_000 + at_ms, np.int64),
    )


def learn(learner: TableLearner, rng: np.random.Generator, clock: list[int], steps: int) -> None:
    """Learn a few batches; `clock` is moved on, in ms."""
    for _ in range(steps):
        clock[0] += int(rng.integers(0, 900))
        learner.learn(changing_batch(rng, clock[0]))
