"""Goal: a run's digest stays what steps and checkpoints of former versions hold, and moves with recipe and spec alone.
Method: the trainer's small world; the digest is computed once more by hand."""

from __future__ import annotations

import hashlib

import msgspec
from trainer_world import PROJECT

from headrace.contract.spec import FeatureSpec
from headrace.trainer.identity import recipe_digest, tasks_of


def test_the_digest_is_that_of_recipe_and_spec_by_name():
    recipe, spec = msgspec.json.encode(PROJECT.recipe), msgspec.json.encode(PROJECT.features)
    data = b"recipe %d\n%b" % (len(recipe), recipe) + b"spec %d\n%b" % (len(spec), spec)
    assert recipe_digest(PROJECT) == hashlib.sha256(data).hexdigest()[:16]


def test_another_recipe_or_spec_is_another_run():
    replace = msgspec.structs.replace
    others = [
        replace(PROJECT, recipe=replace(PROJECT.recipe, dim=8)),
        replace(PROJECT, features=FeatureSpec(features=PROJECT.features.features[:2])),
    ]
    assert len({recipe_digest(project) for project in [PROJECT, *others]}) == 3
    assert recipe_digest(replace(PROJECT, name="other")) == recipe_digest(PROJECT)


def test_tasks_come_in_the_order_of_the_heads():
    task = PROJECT.tasks[0]
    tasks = tuple(msgspec.structs.replace(task, name=name) for name in ("click", "like", "order"))
    recipe = msgspec.structs.replace(PROJECT.recipe, task="order", tasks=("order", "click"))
    project = msgspec.structs.replace(PROJECT, tasks=tasks, recipe=recipe)
    assert [each.name for each in tasks_of(project)] == ["order", "click"]
