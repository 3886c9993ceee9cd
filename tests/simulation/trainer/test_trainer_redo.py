"""Goal: recorded steps are redone whatever the topic holds besides, or the trainer stops and says what is missing.

Method: a trainer learns a little and dies without a checkpoint; while it is away one partition gets a backlog that is
longer than the buffer. The buffer is made small, so that few samples fill it.
"""

from __future__ import annotations

import pytest
from trainer_world import PARTITIONS, TOPICS, World, cut, send

from headrace.contract.errors import InvariantBroken
from headrace.trainer.run import Trainer
from headrace.trainer.source import source as source_module

BUFFER_ROWS, BACKLOG, FEW = 256, 1_500, 200


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BUFFER_ROWS", BUFFER_ROWS)


def died(seed: int, full: int) -> tuple[World, Trainer]:
    """Return a world whose trainer died after some steps; partition `full` then got its backlog."""
    world = World()
    records = {p: cut(seed, p, BACKLOG if p == full else FEW) for p in range(PARTITIONS)}
    for each in records.values():
        for rows, after in each[:2]:
            send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    for rows, after in records[full][2:]:
        send(world.log, rows, after=after)
    world.blobs.objects.clear()
    return world, trainer


@pytest.mark.parametrize("full", range(PARTITIONS))
def test_a_buffer_full_of_another_partition_stops_no_recovery(full):
    world, first = died(1, full)
    again, polls = Trainer(world.deps()), [0]
    poll = again.deps.reader.poll

    def counted(records_max: int, timeout_s: float):
        polls[0] += 1
        assert polls[0] < 100, "the recovery spins"
        return poll(min(records_max, 4), timeout_s)

    again.deps.reader.poll = counted
    again.recover()
    assert again.learner.step == first.learner.step
    assert again.learner.digest() == first.learner.digest()
    polls[0] = -1_000
    world.drain(again)
    others = [rows for p in range(PARTITIONS) if p != full for rows, _ in cut(1, p, FEW)[:2]]
    assert again.learnt == BACKLOG + sum(rows.num_rows for rows in others)


@pytest.mark.parametrize("full", [0, 1])
def test_a_topic_that_ends_before_a_recorded_step_is_told(full):
    """Records that a step took are not in the topic, as when it was made anew."""
    world, _ = died(2, full)
    lost = (full + 1) % PARTITIONS
    del world.log.partitions(TOPICS.samples)[lost][1:]
    again = Trainer(world.deps())
    with pytest.raises(InvariantBroken, match=rf"samples/{lost} up to .* read to its end at offset 1"):
        again.recover()
