"""Goal: wherever a trainer refuses for samples that are missing, it names `headrace train repair`; that says what is
missing, and the run that it begins goes on and leaves out that alone, by name.

Method: a topic loses samples in each way that there is: retention while the trainer was away, a damaged record, records
that never came, an end that a recorded step had learnt, a version of the lake. The trainer refuses, the verb's parts
look and begin a run, another trainer ends the work.
"""

from __future__ import annotations

import pytest
from rollback_world import CONFIG, COUNT, MODEL, RECIPE, SHORT, feed, stands, start, steps_of, turns
from trainer_world import PARTITIONS, TOPICS, World, cut, lake_of, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Position
from headrace.contract.formats.steps import Step
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.lineage import behind, lineage
from headrace.trainer.commit.rollback import begin_run, first_record
from headrace.trainer.repair import Diagnosis, diagnose
from headrace.trainer.run import Trainer

NAMES_IT = "`headrace train repair"


def look(world: World) -> Diagnosis:
    found = stands(world)
    places = found.on_path()
    steps = lineage(steps_of(world), found.run)
    if places:
        steps = behind(steps, found.path, places[0].stored.run, places[0].stored.step)
    return diagnose(places[0] if places else None, steps, world.log.reader(), TOPICS.samples, world.lake)


def repair(world: World, found: Diagnosis, way: str) -> Step:
    place = stands(world).on_path()[0] if way == "checkpoint" else None
    first = first_record(
        place, model=MODEL, run="r9", recipe=RECIPE, seed=0, samples_id="", instead_of=stands(world).run,
        left_out=found.missing if place is not None else (), created_ms=world.clock.now_ms(),
    )  # fmt: skip
    begin_run(
        first, writer=FencedMemory(world.log, TOPICS.steps, f"steps-{MODEL}", world.epochs), reader=world.log.reader(),
        producer=world.log.producer(), topics=TOPICS, pause=lambda _: None,
    )  # fmt: skip
    return first


def refused(world: World) -> str:
    with pytest.raises(InvariantBroken) as refusal:
        world.drain(start(world))
    assert NAMES_IT in str(refusal.value)
    return str(refusal.value)


def begun(upto: int) -> tuple[World, dict[int, list]]:
    """Return a world whose trainer has learnt some records of each partition and is gone, and the records to come."""
    world = World()
    records = {p: cut(1, p, COUNT) for p in range(PARTITIONS)}
    for p in range(PARTITIONS):
        for rows, after in records[p][:upto]:
            send(world.log, rows, after=after)
    trainer = start(world)
    world.drain(trainer)
    trainer.close()
    return world, {p: records[p][upto:] for p in range(PARTITIONS)}


def finished(world: World) -> Trainer:
    trainer = start(world)
    world.drain(trainer)
    trainer.close()
    assert trainer.run_id == "r9"
    assert as_trained(SHORT, TOPICS, world.log.reader(), world.lake, train=CONFIG).equal is True
    again = start(world)
    assert again.learner.digest() == trainer.learner.digest() and again.learnt == 0
    return trainer


def test_nothing_is_missing():
    world, records = begun(2)
    feed_rest(world, records)
    found = look(world)
    assert found.wrong == [] and found.missing == []


def feed_rest(world: World, records: dict[int, list], *, without: tuple[int, int] | None = None) -> None:
    for p, rest in records.items():
        for number, (rows, after) in enumerate(rest):
            if (p, number) != without:
                send(world.log, rows, after=after)


def test_records_that_never_came_are_left_out_by_name():
    world, records = begun(2)
    feed_rest(world, records, without=(1, 1))
    rows, after = records[1][1]
    last = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
    trainer = start(world)
    world.drain(trainer)
    trainer.close()
    found = look(world)
    (missing,) = found.missing
    assert (missing.partition, missing.after, missing.upto, missing.why) == (1, after, last, "lost")
    assert found.way == "checkpoint" and len(found.wrong) == 1
    first = repair(world, found, "checkpoint")
    assert first.branch is not None and first.branch.passed_over == (missing,)
    done = finished(world)
    assert done.learner.step > first.step
    assert done.positions.at(1) == Position((COUNT - 1) // 3, (COUNT - 1) % 3)


def test_a_damaged_record_is_left_out_by_name():
    world, records = begun(2)
    rows, after = records[0][0]
    last = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
    headers = {"after": f"{after[0]}:{after[1]}", "last": f"{last[0]}:{last[1]}"}
    world.log.append(TOPICS.samples, 0, b"damaged", None, headers)
    feed_rest(world, records, without=(0, 0))
    assert "is damaged" in refused(world)
    found = look(world)
    assert [(m.partition, m.after, m.upto) for m in found.missing] == [(0, after, last)]
    repair(world, found, found.way)
    finished(world)


def test_several_holes_far_behind_the_checkpoint_are_left_out_alone():
    """What lies before and between them is learnt, also by a trainer that was started anew before it came there."""
    world, records = begun(1)
    gone = {(0, 2), (1, 1), (1, 3)}
    for p, rest in records.items():
        for number, (rows, after) in enumerate(rest):
            if (p, number) not in gone:
                send(world.log, rows, after=after)
    found = look(world)
    assert len(found.missing) == len(gone)
    repair(world, found, "checkpoint")
    trainer = start(world)
    turns(world, trainer, 1)
    trainer._checkpoint()
    trainer = finished(world)
    lost = sum(records[p][number][0].num_rows for p, number in gone)
    ours = lineage(steps_of(world), "r9")
    assert sum(r.rows for step in ours for r in step.ranges) == COUNT * PARTITIONS - lost
    taken = [(r.partition, r.after, r.upto) for step in ours for r in step.ranges]
    for hole in found.missing:
        assert not any(p == hole.partition and after < hole.upto and upto > hole.after for p, after, upto in taken)


@pytest.mark.parametrize("way", ["checkpoint", "lake"])
def test_what_retention_took_while_the_trainer_was_away(way):
    """Where the lake does not have them either they are left out; a lake that has them is learnt from."""
    world, records = begun(2)
    feed_rest(world, records)
    whole = {p: cut(1, p, COUNT) for p in range(PARTITIONS)}
    for p in range(PARTITIONS):
        world.log.trim(TOPICS.samples, p, 4)
    world.lake = lake_of(1, 5 if way == "lake" else 2, COUNT)
    assert "what retention deleted" in refused(world)
    found = look(world)
    assert found.way == way
    assert {m.partition: m.upto for m in found.missing} == {p: whole[p][4][1] for p in range(PARTITIONS)}
    first = repair(world, found, way)
    assert (first.step == 0) == (way == "lake")
    trainer = finished(world)
    lost = sum(rows.num_rows for p in whole for rows, _ in whole[p][2:4])
    assert trainer.learnt == COUNT * PARTITIONS if way == "lake" else trainer.learnt + lost < COUNT * PARTITIONS


def test_an_end_that_a_recorded_step_had_learnt():
    """The broker came back without it and `stream` does not send it: the run begins at the checkpoint without it."""
    world, records = begun(2)
    feed_rest(world, records)
    trainer = start(world)
    turns(world, trainer, 2)
    place = stands(world).on_path()[0]
    for p in range(PARTITIONS):
        del world.log.partitions(TOPICS.samples)[p][2:]
    for name in [n for n in world.blobs.objects if f"{trainer.run_id}-" in n and place.stored.name not in n]:
        if name.startswith(f"checkpoints/{MODEL}/{trainer.run_id}"):
            del world.blobs.objects[name]
    assert "has them up to" in refused(world)
    found = look(world)
    assert found.missing == [] and any("restart `stream` first" in each for each in found.wrong)
    repair(world, found, found.way)
    finished(world)


def test_a_version_of_the_lake_that_is_gone(monkeypatch):
    world = World(lake=lake_of(1, 4, COUNT))
    feed(world, 1)
    trainer = start(world)
    turns(world, trainer, 2)
    trainer.close()
    assert world.lake is not None
    gone, state = world.lake.version, type(world.lake).state
    world.lake = lake_of(1, 5, COUNT)
    world.lake.version = gone + 1
    monkeypatch.setattr(
        type(world.lake), "state", lambda self, version=None: None if version == gone else state(self, version)
    )
    assert "is gone" in refused(world)
    found = look(world)
    assert found.way == "lake" and "is gone" in found.wrong[0]
    repair(world, found, "lake")
    assert finished(world).learnt == COUNT * PARTITIONS
