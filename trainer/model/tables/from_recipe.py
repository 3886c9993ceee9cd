"""The tables that a recipe names: the width and the optimizer of each slot's rows."""

from __future__ import annotations

from headrace.contract.recipe import Optimizer as Kind
from headrace.contract.recipe import Recipe, slot_labels
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.scoring import dims_of
from headrace.trainer.model.tables.admission import Admission
from headrace.trainer.model.tables.group import SlotTable, Tables
from headrace.trainer.model.tables.optimizers import Optimizer


def make_tables(recipe: Recipe, features: FeatureSpec) -> Tables:
    """Return the recipe's tables, empty."""
    kinds = [recipe.slot_optimizers.get(label, recipe.optimizer) for label in slot_labels(features)]
    slots = [
        SlotTable(int(dim), _optimizer(recipe, kind))
        for dim, kind in zip(dims_of(recipe, features), kinds, strict=True)
    ]
    return Tables(
        slots or [SlotTable(recipe.row_dim, _optimizer(recipe, recipe.optimizer))],
        seed=recipe.seed,
        scale=recipe.row_scale,
        admission=Admission(after=recipe.admit_after, by=recipe.admit_by),
        expire_after_ms=recipe.expire_after_ms,
    )


def _optimizer(recipe: Recipe, kind: Kind) -> Optimizer:
    return Optimizer(
        kind=kind,
        lr=recipe.lr_table,
        l2=recipe.l2_table,
        l1=recipe.l1_table if kind == "ftrl" else 0.0,
        beta=recipe.ftrl_beta,
        beta1=recipe.adam_beta1,
        beta2=recipe.adam_beta2,
        half_life_ms=recipe.squares_half_life_ms if kind.startswith("adagrad") else 0,
        squares=recipe.squares_init if kind.startswith("adagrad") else 0.0,
    )
