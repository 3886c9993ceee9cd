"""Goal: models that share the steps topic do not disturb each other.

Method: two trainers of two models take turns over one log, with a writer that shows one record at a time, as Kafka's
does; every opening of a writer and every pause is counted.
"""

from __future__ import annotations

import msgspec
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import Step, decode_step
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.steps import StepsLog
from headrace.trainer.run import Trainer

OTHER = msgspec.structs.replace(PROJECT, name="other")


class Counted(FencedMemory):
    """Shows the first record that comes where a reader waits, and counts how often it was opened."""

    opened = 0

    def open(self) -> None:
        self.opened += 1
        super().open()

    def read(self, offset: int, wait_s: float = 0.0) -> list[tuple[int, bytes]]:
        found = super().read(offset)
        return found[:1] if wait_s else found


def writer(world: World, model: str) -> Counted:
    return Counted(world.log, TOPICS.steps, f"steps-{model}", world.epochs)


def never(seconds: float) -> None:
    raise AssertionError(f"a commit waited {seconds} s")


def step(model: str, number: int) -> Step:
    return Step(model=model, run="r", step=number, ranges=(), positions={})


@pytest.mark.parametrize("others", [1, 7])
def test_commits_of_several_models_take_no_writer_again(others):
    world = World()
    writers = {f"m{n}": writer(world, f"m{n}") for n in range(1 + others)}
    logs = {model: StepsLog(each, model, MemoryMetrics(), pause=never) for model, each in writers.items()}
    for log in logs.values():
        log.recover(0)
    for number in range(1, 21):
        for model, log in logs.items():
            log.commit(step(model, number))
    assert {each.opened for each in writers.values()} == {1}
    for model, each in writers.items():
        again = StepsLog(each, model, MemoryMetrics(), pause=never).recover(0)
        assert [s.step for _, s in again] == list(range(1, 21))


def test_two_models_learn_beside_each_other():
    world = World()
    writers = {project.name: writer(world, project.name) for project in (PROJECT, OTHER)}
    trainers = [Trainer(world.deps(project=p, steps_writer=writers[p.name])) for p in (PROJECT, OTHER)]
    for trainer in trainers:
        trainer.recover()
    for partition in range(PARTITIONS):
        for rows, after in cut(5, partition, COUNT):
            send(world.log, rows, after=after)
            for trainer in trainers:
                trainer.turn()
    for trainer in trainers:
        world.drain(trainer)
        trainer.close()
        assert trainer.learnt == PARTITIONS * COUNT
        assert as_trained(trainer.project, TOPICS, world.log.reader(), None).equal is True
    assert {each.opened for each in writers.values()} == {1}


def test_a_record_that_is_no_step_is_counted_and_passed_over():
    world, metrics = World(), MemoryMetrics()
    log = StepsLog(writer(world, "m"), "m", metrics, pause=never)
    log.recover(0)
    log.commit(step("m", 1))
    world.log.append(TOPICS.steps, 0, b"\xff no step", None, {})
    log.commit(step("m", 2))
    assert metrics.total("records_unreadable_total") == 1
    assert [s.step for _, s in StepsLog(writer(world, "m"), "m", metrics, pause=never).recover(0)] == [1, 2]


def test_a_damaged_step_of_the_own_run_stops_recovery():
    world = World()
    for rows, after in cut(5, 0, COUNT):
        send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    world.blobs.objects.clear()
    records = world.log.partitions(TOPICS.steps)[0]
    assert decode_step(records[1].value or b"").step == 2
    records[1] = msgspec.structs.replace(records[1], value=b"damaged")
    with pytest.raises(InvariantBroken, match="follows step 1"):
        Trainer(world.deps()).recover()
