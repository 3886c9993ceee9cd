"""Goal: a run's digest stays what steps and checkpoints of former versions hold, and moves with recipe and spec alone.
Method: the trainer's small world; the digest is computed once more by hand."""

from __future__ import annotations

import hashlib

import msgspec
from trainer_world import PROJECT

from headrace.contract.config import TrainConfig
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.identity import recipe_digest, tasks_of
from headrace.trainer.model.held import ordered_tasks
from headrace.trainer.model.learner import learner_for


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


def test_a_task_that_begins_to_be_learnt_in_order_begins_a_run_and_no_other_window_does():
    """Which tasks wait is decided by their windows, which are no part of the recipe, and makes the model's bits."""

    def with_window(window_ms: int, ordered_from_ms: int, policy: str = "window") -> Project:
        task = msgspec.structs.replace(PROJECT.tasks[0], window_ms=window_ms, policy=policy)
        recipe = msgspec.structs.replace(PROJECT.recipe, ordered_from_ms=ordered_from_ms)
        return msgspec.structs.replace(PROJECT, tasks=(task,), recipe=recipe)

    assert recipe_digest(with_window(1_000, 0)) == recipe_digest(with_window(9_000, 0)) == recipe_digest(PROJECT)
    short, long = with_window(59_999, 60_000), with_window(60_000, 60_000)
    assert ordered_tasks(short.recipe, short.tasks) == () and ordered_tasks(long.recipe, long.tasks) == ("click",)
    assert recipe_digest(short) != recipe_digest(long) == recipe_digest(with_window(90_000, 60_000))
    eager = with_window(90_000, 60_000, "eager")
    assert ordered_tasks(eager.recipe, eager.tasks) == () and recipe_digest(eager) == recipe_digest(short)
    assert learner_for(long, TrainConfig()).state().keys() - learner_for(short, TrainConfig()).state().keys()


def test_a_recipe_without_what_was_added_later_has_the_digest_of_before():
    """A field at its default is not written, `provisional` and `ordered_from_ms` among them."""
    assert msgspec.json.encode(Recipe(task="click")) == b"{}"
    assert msgspec.json.encode(Recipe(ordered_from_ms=1)) == b'{"ordered_from_ms":1}'


def test_tasks_come_in_the_order_of_the_heads():
    task = PROJECT.tasks[0]
    tasks = tuple(msgspec.structs.replace(task, name=name) for name in ("click", "like", "order"))
    recipe = msgspec.structs.replace(PROJECT.recipe, task="order", tasks=("order", "click"))
    project = msgspec.structs.replace(PROJECT, tasks=tasks, recipe=recipe)
    assert [each.name for each in tasks_of(project)] == ["order", "click"]
