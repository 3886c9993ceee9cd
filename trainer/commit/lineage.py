"""Which steps a run consists of: its own, behind those of the runs that it goes on from. Pure.

A run that somebody asked for begins with a record that names another run and a step (`Branch`). It contains that run's
steps up to there and none of its later ones; that run may itself have begun so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import Branch, PassedOver, Step

NO_END = 2**62


class Leg(NamedTuple):
    """The steps of one run up to `upto` that a later run contains."""

    run: str
    upto: int


def branches_of(steps: Iterable[Step]) -> dict[str, Step]:
    """Return the first record of each run that somebody asked for, by run."""
    return {step.run: step for step in steps if step.branch is not None}


def path_of(branches: Mapping[str, Branch | None], run: str) -> tuple[Leg, ...]:
    """Return the runs that `run` consists of, itself last, as far back as `branches`, by run, tell.

    Raises `InvariantBroken` where a run would go on from itself.
    """
    path = [Leg(run, NO_END)]
    while (branch := branches.get(path[0].run)) is not None and branch.run:
        if any(leg.run == branch.run for leg in path):
            raise InvariantBroken(f"the steps say that run {branch.run} goes on from itself, by run {path[0].run}.")
        path.insert(0, Leg(branch.run, branch.step))
    return tuple(path)


def lineage(steps: Iterable[Step], run: str) -> list[Step]:
    """Return what a run learnt, in order, its first record and those of the runs before it among them. A step that was
    written again is there once."""
    return lineages(steps, run).get(run, [])


def lineages(steps: Iterable[Step], *runs: str) -> dict[str, list[Step]]:
    """Return the lineage of each of these runs, of all by default: that of the newest step last."""
    first: dict[str, Step] = {}
    own: dict[str, dict[int, Step]] = {}
    for step in steps:
        of_run = own[step.run] = own.pop(step.run, {})
        if step.branch is None:
            of_run[step.step] = step
        else:
            first[step.run] = step
    branches = {run: step.branch for run, step in first.items()}
    found: dict[str, list[Step]] = {}
    for run in own if not runs else [each for each in own if each in runs]:
        steps_of = found[run] = list[Step]()
        for leg in path_of(branches, run):
            ours = own.get(leg.run, {})
            steps_of += [first[leg.run]] if leg.run in first else []
            steps_of += [ours[number] for number in sorted(ours) if number <= leg.upto]
    return found


def behind(steps: Iterable[Step], path: Iterable[Leg], run: str, step: int) -> list[Step]:
    """Return those of a lineage that come after a step of one of its runs."""
    place = {leg.run: number for number, leg in enumerate(path)}
    return [
        each
        for each in steps
        if place[each.run] > place[run] or (each.run == run and each.branch is None and each.step > step)
    ]


def passed_over(steps: Iterable[Step]) -> list[PassedOver]:
    """Return what the runs of a lineage left out by name."""
    return [each for step in steps if step.branch is not None for each in step.branch.passed_over]
