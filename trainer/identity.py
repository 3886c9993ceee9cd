"""A run of a project, in training and in replay: the digest of what makes its bits, its id,
its tasks, its evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Container

import msgspec

from headrace.contract.config import TrainConfig
from headrace.contract.project import Project, Task
from headrace.trainer.model.held import ordered_tasks
from headrace.trainer.validation.evaluate import Evaluation
from headrace.trainer.validation.slices import slices_of


def recipe_digest(project: Project) -> str:
    """Return 16 hex digits over what makes a run's bits: the recipe and the feature spec, by name, and which tasks are
    learnt in the order of impressions, where any is.

    A project with another digest begins another run.
    """
    parts = {"recipe": msgspec.json.encode(project.recipe), "spec": msgspec.json.encode(project.features)}
    if ordered := ordered_tasks(project.recipe, project.tasks):
        parts["ordered"] = msgspec.json.encode(ordered)
    sha = hashlib.sha256()
    for name, data in sorted(parts.items()):
        sha.update(f"{name} {len(data)}\n".encode() + data)
    return sha.hexdigest()[:16]


def new_run_id(project: Project, at_ms: int, taken: Container[str]) -> str:
    """Return the id of a run that begins now and is none of `taken`. It has the time for people to read; nothing is
    ordered by it.

    A variant's has its name too: no two models have one run.
    """
    end = f"-{project.variant}" if project.variant else ""
    while f"r{at_ms:013x}{end}" in taken:
        at_ms += 1
    return f"r{at_ms:013x}{end}"


def tasks_of(project: Project) -> list[Task]:
    """Return the tasks that the recipe learns, in the order of its heads."""
    tasks = {task.name: task for task in project.tasks}
    return [tasks[name] for name in project.recipe.heads]


def new_evaluation(project: Project, config: TrainConfig) -> Evaluation:
    """Return an empty evaluation of the recipe's tasks."""
    return Evaluation(
        project.features,
        tasks_of(project),
        key_field=project.impression.key,
        slices=slices_of(project, config.slices, values_max=config.slice_values_max),
        values=project.recipe.values,
    )
