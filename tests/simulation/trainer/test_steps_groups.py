"""Goal: a group of steps is in the log whole, once and in order, whatever became of the transaction.

Method: a writer whose appends end in every way: the broker has all of the group, a part of it (as where two
transactions wrote it and the writer died between them), or nothing, and the outcome is known or not. Steps of another
model lie between.
"""

from __future__ import annotations

import itertools

import msgspec
import pytest
from trainer_world import PROJECT, TOPICS, World

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step, decode_step, encode_step
from headrace.trainer.commit.steps import StepsLog

GROUP = tuple(Step(model=PROJECT.name, run="r", step=n, ranges=(), positions={}) for n in range(1, 5))
OTHER = Step(model="other", run="o", step=1, ranges=(), positions={})


class Partly(FencedMemory):
    """Writes so many of each append's records, in turn, and then is away; None writes all, and is not."""

    kept: list[int | None]
    other_between = False

    def append(self, *values: bytes) -> None:
        kept = self.kept.pop(0) if self.kept else None
        for value in values[:kept]:
            super().append(value)
            if self.other_between:
                super().append(encode_step(OTHER))
        if kept is not None:
            raise Unavailable("the broker went away")


def log_of(world: World, *kept: int | None) -> tuple[StepsLog, Partly, list[float]]:
    """Return a log whose first appends keep so many records, its writer, and how long it paused."""
    writer, pauses = Partly(world.log, TOPICS.steps, "steps", world.epochs), list[float]()
    writer.kept = list(kept)
    log = StepsLog(writer, PROJECT.name, MemoryMetrics(), pause=pauses.append)
    assert log.recover(0) == []
    return log, writer, pauses


def recorded(world: World) -> list[tuple[int, Step]]:
    found = [(r.offset, decode_step(r.value or b"")) for r in world.log.partitions(TOPICS.steps)[0]]
    return [(offset, step) for offset, step in found if step.model == PROJECT.name]


@pytest.mark.parametrize("other_between", [False, True])
@pytest.mark.parametrize("kept", [(), *((n,) for n in range(5)), *itertools.product(range(5), repeat=2)])
def test_what_is_missing_of_a_group_is_appended_and_nothing_else(kept, other_between):
    world = World()
    log, writer, pauses = log_of(world, *kept)
    writer.other_between = other_between
    assert log.commit(*GROUP) == recorded(world)
    assert tuple(step for _, step in recorded(world)) == GROUP
    assert len(pauses) == len(kept) - len(writer.kept)
    again = msgspec.structs.replace(GROUP[0], step=5)
    assert log.commit(again) == recorded(world)[4:]


def test_a_group_that_another_trainer_began_differently_is_refused():
    """It took over, recorded two steps of ours and one of its own, and gave the writer back."""
    world = World()
    log, writer, _ = log_of(world, 2)
    theirs = msgspec.structs.replace(GROUP[2], seed=9)
    plain = writer.open

    def open_later() -> None:
        world.log.append(TOPICS.steps, 0, encode_step(theirs), None, {})
        plain()

    writer.open = open_later  # type: ignore[method-assign]
    with pytest.raises(InvariantBroken, match=r"holds step 3 of run r where step 3 of run r was expected"):
        log.commit(*GROUP)
    assert [step for _, step in recorded(world)] == [*GROUP[:2], theirs]


def test_a_step_behind_the_group_is_another_trainers():
    world = World()
    log, writer, _ = log_of(world, 4)
    plain = writer.open

    def open_later() -> None:
        world.log.append(TOPICS.steps, 0, encode_step(GROUP[3]), None, {})
        plain()

    writer.open = open_later  # type: ignore[method-assign]
    with pytest.raises(InvariantBroken, match="where nothing more was expected"):
        log.commit(*GROUP)
