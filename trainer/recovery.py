"""Finds where a trainer goes on: which run, from which checkpoint, and which recorded steps it redoes.

1. The checkpoint of this recipe that has got furthest says from where on the steps are read.
2. The newest step of this recipe says which run goes on. Where that run was asked for, its first record says which run
   it goes on from, and behind which step.
3. Of the checkpoints along these runs, the furthest that can be read is taken; the steps behind it are redone. What a
   run learnt after it was left is never redone.
4. Where that checkpoint lies further back than the steps were read, they are read again from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from headrace.contract.formats.steps import Branch, Step
from headrace.contract.interfaces.log import check_topic
from headrace.trainer.commit.checkpoint import Checkpoint, furthest_meta, newest_checkpoint
from headrace.trainer.commit.lineage import behind, branches_of, lineage, path_of
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.dependencies import Dependencies

T = TypeVar("T")


class Retrying(Protocol):
    """Repeats what raises `Unavailable`."""

    def __call__(self, what: str, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns; `what` it is for, in words."""


@dataclass
class Recovery:
    """Where a run goes on."""

    run: str
    """"" where nothing of this recipe was ever recorded."""
    checkpoint: Checkpoint | None
    redone: list[Step]
    """In order; first records of runs that were asked for are among them."""
    branch: Branch | None
    """How the run began, where somebody asked for it."""
    first: Step | None
    """The record that says so, where it was read."""
    runs: set[str]
    """All runs of the model that were seen."""


def find_recovery(deps: Dependencies, steps: StepsLog, recipe: str, retrying: Retrying) -> Recovery:
    """Become the writer of the steps and find where to go on.

    Raises `InvariantBroken` where the run is of a topic that was made anew, and as `StepsLog.recover`.
    """
    model, blobs = deps.project.model, deps.blobs
    meta = retrying("read checkpoints", lambda: furthest_meta(blobs, model, recipe=recipe))
    if meta is not None:
        check_topic(meta.steps_id, deps.steps_id, deps.topics.steps)
        check_topic(meta.samples_id, deps.samples_id, deps.topics.samples)
    begin = meta.steps_offset if meta is not None else 0
    every, found = steps.recover(begin), None
    while True:
        ours = [step for _, step in every if step.recipe == recipe]
        if ours:
            check_topic(ours[-1].samples_id, deps.samples_id, deps.topics.samples)
        run = ours[-1].run if ours else (meta.run if meta is not None else "")
        branches = branches_of(ours)
        path = path_of({name: first.branch for name, first in branches.items()}, run)
        found = found or retrying(
            "read checkpoints", partial(newest_checkpoint, blobs, model, recipe=recipe, path=path)
        )
        needed = found.meta.steps_offset if found is not None else 0
        if needed >= begin:
            break
        begin, every = needed, steps.again(needed)
    redone = lineage(ours, run)
    if found is not None:
        redone = behind(redone, path, found.meta.run, found.meta.step)
    first = branches.get(run)
    told = found.meta.branch if found is not None and found.meta.run == run else None
    branch = first.branch if first is not None else told
    return Recovery(run, found, redone, branch, first, {step.run for _, step in every})
