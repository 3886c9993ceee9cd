"""Ways to train, as functions: take the nearest one, change what differs, and give it to `Project(recipe=...)`.

    PROJECT = Project(..., recipe=deepfm(task="click", dim=16))
    PROJECT = Project(..., recipe=multitask(("click", "like", "dwell")))
    PROJECT = Project(..., recipe=late_positives(fm(task="order")))

| recipe | take it when | what a row keeps, beside key and last use (12 bytes) |
| --- | --- | --- |
| `logistic_ftrl` | many sparse ids, weights that may be exactly 0, the fastest | w, z, n: 12 bytes a task |
| `logistic` | the same, denser ids, no zeros | w and one sum: 8 bytes a task |
| `fm` | pairs of ids matter and the stream is short: few dense weights to warm up | 4 (1 + dim) and two sums |
| `deepfm` | the default: pairs at once, more as the stream goes on | 4 (1 + dim) and two sums |
| `dcn` | crosses of higher order between features that you know to matter | 4 (1 + dim) and two sums |
| `multitask` | rare labels (like, order) beside a frequent one (click) | as deepfm; tables are shared |
| `module_of` | a torch.nn.Module of your own | as deepfm |

`logistic_ftrl`, `logistic` and `fm` learn sample after sample, which for several tasks, `slot_dims`, `slot_optimizers`
or `dense_average` must be given up (`updates="batch"`). Their rates are the best of a few tried on KuaiRand
(`bench/trainer.py`); the others are where to begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.contract.project import Task
from headrace.contract.recipe import Recipe

LIVE: dict[str, Any] = {
    "standardize": True,
    "wait_for_negative": True,
    "ordered_from_ms": 1,
    "provisional": True,
    "stored_order": "position",
    "delayed": "taken_back",
}
"""What keeps a live model calibrated, whatever its numbers, windows and base rates are: docs/models.md#calibration."""
STEADY: dict[str, Any] = {"rate_rows": 512, "dense_average": 0.995}
"""What keeps dense weights steady that learn from the few rows of a live step."""


def logistic_ftrl(task: str = "click", **changes: Any) -> Recipe:
    """Return logistic regression whose rows learn by FTRL-proximal, each weight with a rate of its own.

    With `l1_table` above 0 a weight that the data don't ask for is exactly 0. Source: McMahan et al., KDD 2013.
    """
    return _with(
        Recipe(
            task=task,
            model="logistic",
            updates="sample",
            optimizer="ftrl",
            lr_table=0.15,
            ftrl_beta=0.5,
            lr_dense=0.0003,
            **LIVE,
        ),
        changes,
    )


def logistic(task: str = "click", **changes: Any) -> Recipe:
    """Return logistic regression whose rows learn by Adagrad, sample after sample."""
    return _with(
        Recipe(
            task=task,
            model="logistic",
            updates="sample",
            optimizer="adagrad",
            lr_table=0.105,
            l2_table=0.003,
            lr_dense=0.0001,
            **LIVE,
        ),
        changes,
    )


def fm(task: str = "click", **changes: Any) -> Recipe:
    """Return a factorization machine: linear weights and every pair of embeddings, sample after sample.

    Source: Rendle, ICDM 2010.
    """
    return _with(Recipe(task=task, model="fm", updates="sample", lr_table=0.02, lr_dense=0.0003, **LIVE), changes)


def deepfm(task: str = "click", **changes: Any) -> Recipe:
    """Return DeepFM: the factorization machine and layers over the same embeddings. Source: Guo et al., IJCAI 2017."""
    return _with(Recipe(task=task, model="deepfm", lr_table=0.02, lr_dense=0.001, **LIVE), _steady(changes))


def dcn(task: str = "click", **changes: Any) -> Recipe:
    """Return DCN-v2, cross layers beside deep ones; `cross_rank` makes wide inputs cheap.

    Source: Wang et al., "DCN V2: Improved deep & cross network", WWW 2021.
    """
    recipe = Recipe(task=task, model="dcn", lr_table=0.02, lr_dense=0.001, cross_rank=16, **LIVE)
    return _with(recipe, _steady(changes))


def module_of(name: str, *, version: int = 1, task: str = "click", **changes: Any) -> Recipe:
    """Return a recipe of the project's own `@model_function(name, version=version)`."""
    recipe = Recipe(task=task, model="module", module=name, module_version=version, lr_table=0.02, **LIVE)
    return _with(recipe, _steady(changes))


def multitask(tasks: tuple[str, ...] = ("click", "like", "dwell"), **changes: Any) -> Recipe:
    """Return DeepFM with a head a task over shared tables and hidden layers; the first task is the main one."""
    return deepfm(**{"task": tasks[0], "tasks": tasks} | changes)


def late_positives(recipe: Recipe, *, weighted: bool = True) -> Recipe:
    """Return the recipe for tasks of policy `eager`: negatives at once, corrected when feedback comes.

    `weighted` (fake-negative weighted) learns the true rate itself; without it (fake-negative calibration) samples are
    learnt as they come, and what the model says is corrected. Source: Ktena et al., RecSys 2019.
    """
    return _with(recipe, {"delayed": "fake_negative_weighted" if weighted else "fake_negative_calibrated"})


def rare_positives(recipe: Recipe, *, negative_share: float) -> Recipe:
    """Return the recipe with only a share of the negatives learnt, the log-odds corrected for it."""
    return _with(recipe, {"negative_share": negative_share})


def bounded(recipe: Recipe, *, admit_after: int = 3, expire_after_ms: int = 14 * 86_400_000) -> Recipe:
    """Return the recipe with a bounded table: a row from the third sighting on, none after two idle weeks."""
    return _with(recipe, {"admit_after": admit_after, "admit_by": "sketch", "expire_after_ms": expire_after_ms})


def uncalibrated(recipe: Recipe, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return the fields of `LIVE` and `STEADY` that a recipe of these tasks does without, and what they would be.

    What a recipe does in another way, such as `delayed`, is not among them.
    """
    own = [task for task in tasks if task.name in recipe.heads]
    windows = any(task.policy == "window" for task in own)
    needless = {
        "ordered_from_ms": not windows,
        "provisional": not windows,
        "delayed": not any(task.policy == "eager" or task.correct_ms for task in own),
        "dense_average": recipe.calibrate,
    }
    by_batch = recipe.updates == "batch"
    wanted = {
        name: value for name, value in (LIVE | (STEADY if by_batch else {})).items() if not needless.get(name, False)
    }
    if recipe.model in ("logistic", "fm"):
        wanted = {name: value for name, value in wanted.items() if name not in STEADY}
    plain = Recipe()
    return {name: value for name, value in wanted.items() if getattr(recipe, name) == getattr(plain, name)}


def _steady(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes on top of `STEADY`; what calibrates scores takes no average, see `Recipe.checked`."""
    steady = STEADY | ({"dense_average": 0.0} if changes.get("calibrate") else {})
    return steady | changes


def _with(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return msgspec.structs.replace(recipe, **changes)
