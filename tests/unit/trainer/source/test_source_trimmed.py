"""Goal: a topic that has lost its head is learnt from where it begins, or refused; nothing is skipped in silence.

Method: the trainer's small world, whose topic retention trims at chosen moments. In all of it a new run learns what the
lake and the topic hold, and a run that would skip samples that it has not learnt stops at once.
"""

from __future__ import annotations

import pyarrow as pa
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, Lake, World, cut, lake_of, send

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.steps import decode_step
from headrace.replay.as_trained import as_trained
from headrace.trainer.run import Trainer

SEED = 2


def world_of(*, lake: Lake | None = None, records: int | None = None) -> World:
    """Return a world with each partition's first records in the topic."""
    world = World(lake=lake)
    for partition in range(PARTITIONS):
        for rows, after in cut(SEED, partition, COUNT)[:records]:
            send(world.log, rows, after=after)
    return world


def trim(world: World, records: int) -> int:
    """Delete the first records of each partition; return how many samples are left."""
    for partition in range(PARTITIONS):
        world.log.trim(TOPICS.samples, partition, records)
    return sum(rows.num_rows for p in range(PARTITIONS) for rows, _ in cut(SEED, p, COUNT)[records:])


def of_another_task(lake: Lake) -> Lake:
    at = lake.rows.schema.get_field_index("task")
    tasks = pa.chunked_array([["other"] * lake.rows.num_rows])
    return Lake(lake.rows.set_column(at, lake.rows.schema.field(at), tasks), lake.positions, lake.next_offsets)


def trained(world: World) -> Trainer:
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    return trainer


def gaps(trainer: Trainer) -> float:
    return trainer.deps.metrics.total("gap_total")  # type: ignore[attr-defined]


def check_again(world: World, trainer: Trainer) -> None:
    """A process that resumes, one that redoes all steps, and the replay reach the same bits."""
    for lost in ((), list(world.blobs.objects)):
        for name in lost:
            del world.blobs.objects[name]
        again = Trainer(world.deps())
        again.recover()
        assert again.learner.digest() == trainer.learner.digest()
    assert as_trained(PROJECT, TOPICS, world.log.reader(), world.lake).equal is True


def test_a_new_task_over_a_trimmed_topic_learns_what_the_topic_holds():
    """The lake holds the head, without a row of the task: nothing is missing, and nothing is told."""
    world = world_of(lake=of_another_task(lake_of(SEED, 4)))
    left = trim(world, 4)
    trainer = trained(world)
    assert trainer.learnt == left and gaps(trainer) == 0
    check_again(world, trainer)


@pytest.mark.parametrize("lake", [None, of_another_task(lake_of(SEED, 2))], ids=["no lake", "a lake that ends before"])
def test_a_new_run_says_what_neither_lake_nor_topic_holds(lake, caplog):
    world = world_of(lake=lake)
    left = trim(world, 4)
    trainer = trained(world)
    assert trainer.learnt == left and gaps(trainer) == PARTITIONS
    assert "is in no lake: learning goes on" in caplog.text
    check_again(world, trainer)


def test_a_lake_that_ends_before_the_topic_begins_is_learnt_and_the_hole_told():
    lake = lake_of(SEED, 2)
    world = world_of(lake=lake)
    left = trim(world, 4)
    trainer = trained(world)
    assert trainer.learnt == lake.rows.num_rows + left and gaps(trainer) == PARTITIONS
    check_again(world, trainer)


def test_an_empty_topic_that_was_trimmed_delays_nothing():
    """One partition holds nothing any more; the others are learnt, and what comes to it later too."""
    world = world_of(records=4)
    world.log.trim(TOPICS.samples, 0, 4)
    trainer = trained(world)
    assert trainer.learnt == sum(rows.num_rows for p in (1, 2) for rows, _ in cut(SEED, p, COUNT)[:4])
    rows, after = cut(SEED, 0, COUNT)[4]
    before = trainer.learnt
    send(world.log, rows, after=after)
    world.drain(trainer)
    assert trainer.learnt == before + rows.num_rows and gaps(trainer) == 1


def test_a_run_that_has_learnt_nothing_yet_begins_where_the_topic_begins_now():
    world = world_of()
    trim(world, 2)
    Trainer(world.deps()).recover()
    left = trim(world, 5)
    assert trained(world).learnt == left


@pytest.mark.parametrize("loses_checkpoints", [False, True])
def test_a_run_that_would_skip_samples_is_refused_with_the_remedy(loses_checkpoints):
    """It was away for longer than the topic keeps samples."""
    world = world_of(records=3)
    trained(world).close()
    for partition in range(PARTITIONS):
        for rows, after in cut(SEED, partition, COUNT)[3:]:
            send(world.log, rows, after=after)
    trim(world, 5)
    if loses_checkpoints:
        world.blobs.objects.clear()
    for _ in range(2):
        with pytest.raises(InvariantBroken, match=r"begins at offset 5 .*`headrace train repair"):
            trained(world)


def test_a_run_goes_on_where_only_what_it_has_learnt_is_gone():
    world = world_of(records=3)
    first = trained(world)
    first.close()
    for partition in range(PARTITIONS):
        for rows, after in cut(SEED, partition, COUNT)[3:]:
            send(world.log, rows, after=after)
    trim(world, 3)
    again = trained(world)
    assert first.learnt + again.learnt == PARTITIONS * COUNT and gaps(again) == 0


def test_a_hole_that_the_newest_lake_fills_is_not_skipped():
    """While the run learns version 5, retention passes it; version 6 has the samples for a new run."""

    class Growing(Lake):
        def state(self, version: int | None = None) -> Lake:
            return newest if version is None and grown else self

    grown: list[bool] = []
    old, newest = lake_of(SEED, 2), lake_of(SEED, 6)
    world = world_of(lake=Growing(old.rows, old.positions, old.next_offsets))
    trainer = Trainer(world.deps())
    trainer.recover()
    trainer.turn()
    grown.append(True)
    trim(world, 5)
    with pytest.raises(InvariantBroken, match=r"headrace train repair"):
        world.drain(trainer)
    steps = [decode_step(r.value or b"") for r in world.log.partitions(TOPICS.steps)[0]]
    assert steps and all(r.kind == "stored" for step in steps for r in step.ranges)


def test_steps_say_where_a_run_began_behind_a_hole():
    """Redone over a topic that has lost more since, the run is refused: its rows are gone."""
    world = world_of()
    trim(world, 2)
    trainer = trained(world)
    assert trainer.positions.at(0) > Positions(1).at(0)
    world.blobs.objects.clear()
    trim(world, 4)
    with pytest.raises(InvariantBroken, match="begins at offset 4"):
        Trainer(world.deps()).recover()
