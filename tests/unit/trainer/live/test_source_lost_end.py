"""Goal: a trainer whose topic lost its end, and got it back by the join, ends with the same model.

Method: the trainer's small world; the broker loses samples that were learnt, or that were read, and the join sends them
again in other records.
"""

from __future__ import annotations

import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, learnt, samples, send

from headrace.contract.formats.positions import Position
from headrace.replay.as_trained import as_trained
from headrace.trainer.run import Trainer

SEED = 3


def lose_and_send_again(world: World, kept: int, rows: int) -> None:
    """Lose each partition's records from the `kept`th on; send the samples behind them again, `rows` a record."""
    for partition in range(PARTITIONS):
        world.log.cut(TOPICS.samples, partition, kept)
        whole = cut(SEED, partition, COUNT)
        batch = samples(SEED, partition, COUNT)
        done = sum(each.num_rows for each, _ in whole[:kept])
        at = [Position(o, r) for o, r in zip(batch["offset"].to_pylist(), batch["rank"].to_pylist(), strict=True)]
        for first in range(done, COUNT, rows):
            after = tuple(at[first - 1]) if first else (-1, -1)
            send(world.log, batch.slice(first, min(rows, COUNT - first)), after=after)  # type: ignore[arg-type]


def world_of(records: int | None) -> World:
    world = World()
    for partition in range(PARTITIONS):
        for rows, after in cut(SEED, partition, COUNT)[:records]:
            send(world.log, rows, after=after)
    return world


@pytest.mark.parametrize("rows", [1, 7, 500], ids=["more records", "others", "fewer records"])
def test_samples_that_were_lost_and_sent_again_are_learnt_once(rows: int) -> None:
    _, wanted = learnt(SEED)
    world = world_of(5)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    assert 0 < trainer.learnt < wanted.learnt
    trainer.close()
    lose_and_send_again(world, 2, rows)
    again = Trainer(world.deps())
    again.recover()
    world.drain(again)
    assert again.source.positions() == wanted.source.positions()
    assert trainer.learnt + again.learnt == wanted.learnt
    assert as_trained(PROJECT, TOPICS, world.log.reader(), None).equal is True
    assert again.deps.metrics.total("gap_total") == 0  # type: ignore[attr-defined]
