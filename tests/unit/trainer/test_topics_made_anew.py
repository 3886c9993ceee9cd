"""Goal: a trainer tells a topic that was made anew from the one that its run is of, however far the new one has grown.

Method: the trainer's small world, whose log makes a topic anew and fills it as far as before.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, lake_of, send

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.steps import decode_step, encode_step
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.checkpoint import newest_checkpoint
from headrace.trainer.run import Trainer

SEED = 4


def fill(world: World, seed: int = SEED) -> None:
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)


def trainer_of(world: World, **changes: Any) -> Trainer:
    """Return a new process's trainer, which asks the log for the topics' ids as the command does."""
    admin = world.log.admin()
    ids = {"samples_id": admin.topic_id(TOPICS.samples), "steps_id": admin.topic_id(TOPICS.steps)}
    return Trainer(world.deps(**{**ids, **changes}))


def trained(**changes: Any) -> World:
    world = World()
    fill(world)
    trainer = trainer_of(world, **changes)
    trainer.recover()
    world.drain(trainer)
    trainer.close()
    return world


def make_anew(world: World, topic: str) -> None:
    world.log.delete(topic)
    world.log.admin().ensure_topics(TOPICS.specs(PARTITIONS))


def test_a_samples_topic_that_is_no_more_is_refused() -> None:
    world = trained()
    trainer_of(world).recover()
    make_anew(world, TOPICS.samples)
    fill(world, seed=5)
    with pytest.raises(InvariantBroken, match=r"of topic 'samples.*deleted and made anew.*log.generation"):
        trainer_of(world).recover()


def test_a_run_that_has_steps_and_no_checkpoint_yet_is_refused_too() -> None:
    world = trained()
    world.blobs.objects.clear()
    trainer_of(world).recover()
    world.blobs.objects.clear()
    make_anew(world, TOPICS.samples)
    fill(world)
    with pytest.raises(InvariantBroken, match="made anew"):
        trainer_of(world).recover()


@pytest.mark.parametrize("steps", [0, 500])
def test_a_steps_topic_that_is_no_more_is_refused_however_long_it_is(steps: int) -> None:
    world = trained()
    first = world.log.partitions(TOPICS.steps)[0][0].value
    foreign = msgspec.structs.replace(decode_step(first or b""), model="other")
    make_anew(world, TOPICS.steps)
    for _ in range(steps):
        world.log.append(TOPICS.steps, 0, encode_step(foreign), None, {})
    with pytest.raises(InvariantBroken, match=r"of topic 'steps.*deleted and made anew.*log.generation"):
        trainer_of(world).recover()


def test_a_run_without_ids_is_gone_on_from_and_gets_them() -> None:
    """Checkpoints and steps that were written before ids were noted have none."""
    world = trained(samples_id="", steps_id="")
    trainer = trainer_of(world)
    trainer.recover()
    assert trainer.learner.step > 0
    trainer.learner.step += 1  # Something new, so that there is a checkpoint to write.
    trainer._checkpoint()
    newest = newest_checkpoint(world.blobs, "small", recipe=trainer.recipe)
    admin = world.log.admin()
    assert newest is not None
    assert newest.meta.samples_id == admin.topic_id(TOPICS.samples) != ""
    assert newest.meta.steps_id == admin.topic_id(TOPICS.steps) != ""
    make_anew(world, TOPICS.samples)
    trainer_of(world, samples_id="", steps_id="").recover()


def test_the_lag_counts_every_partition_from_what_the_topic_still_holds() -> None:
    world = World()
    fill(world)
    metrics = MemoryMetrics()
    world.log.trim(TOPICS.samples, 1, 3)
    trainer = trainer_of(world, metrics=metrics)
    trainer.recover()
    trainer._tell()
    records = [len(cut(SEED, partition, COUNT)) for partition in range(PARTITIONS)]
    assert metrics.gauges["lag_records", ""] == sum(records) - 3


def test_a_replay_refuses_rows_of_a_topic_that_is_no_more_unless_the_lake_has_them() -> None:
    world = trained()

    def replay(lake: DeltaLake | None) -> bool | None:
        samples_id = world.log.admin().topic_id(TOPICS.samples)
        return as_trained(PROJECT, TOPICS, world.log.reader(), lake, samples_id=samples_id).equal

    assert replay(None) is True
    make_anew(world, TOPICS.samples)
    fill(world, seed=5)
    with pytest.raises(InvariantBroken, match=r"step 1 of run .* of topic 'samples' with id .* made anew.*--step"):
        replay(None)
    with pytest.raises(InvariantBroken, match=r"step [2-9]\d* of run .* made anew"):
        replay(lake_of(SEED, 3))
    assert replay(lake_of(SEED, 10_000)) is True, "all that was learnt lies in the lake"
