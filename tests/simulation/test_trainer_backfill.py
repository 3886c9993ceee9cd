"""Goal: a changed model is backfilled from the lake beside the one that is served, wherever the trainer is killed.

Method: one run learns and is published; a project of another recipe then begins with the lake. Until it has learnt
that, nothing of it may be announced, and after its last stored sample it is, with what it learnt.
"""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, lake_of, learnt

from headrace.contract.formats.snapshot import decode_manifest, decode_update, decode_weights
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.run import Trainer

OTHER = msgspec.structs.replace(
    PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, lr_dense=PROJECT.recipe.lr_dense / 2)
)


def published(world: World) -> list[str]:
    """Return the runs of all manifests and deltas, in order."""
    manifests = read_manifests(world.log.reader(), TOPICS, PROJECT.name)
    deltas = [decode_update(r.value)[1].run for r in world.log.partitions(TOPICS.deltas)[0]]
    return [m.run for m in manifests] + deltas


@pytest.mark.parametrize("seed", range(4))
def test_nothing_of_an_unfinished_backfill_is_published(seed):
    rng = Random(seed)
    world, first = learnt(8)
    before = published(world)
    assert set(before) == {first.run_id}
    world.lake = lake_of(8, 4)
    trainer, deaths = None, 0
    while trainer is None or trainer.source.is_stored:
        if trainer is None:
            world.clock.advance(0.5)
            trainer = Trainer(world.deps(project=OTHER))
            trainer.recover()
            assert trainer.source.is_stored
        assert published(world) == before
        trainer.turn()
        world.clock.advance(rng.choice((0.01, 1.5)))
        if trainer.source.is_stored and rng.random() < 0.3:
            if rng.random() < 0.5:
                trainer.close()
            trainer, deaths = None, deaths + 1
    trainer.turn()
    manifest = read_manifests(world.log.reader(), TOPICS, PROJECT.name)[-1]
    assert deaths and manifest.run == trainer.run_id != first.run_id and manifest.step
    assert len(decode_weights(world.blobs.objects[manifest.blob])[0].keys_K)
    world.drain(trainer)
    trainer.close()
    replayed = as_trained(OTHER, TOPICS, world.log.reader(), world.lake)
    assert replayed.equal is True and replayed.rows == PARTITIONS * COUNT


def test_the_first_model_is_published_while_it_learns_the_lake():
    """Nobody is served anything better."""
    world = World(lake=lake_of(9, 4))
    trainer = Trainer(world.deps())
    trainer.recover()
    assert trainer.source.is_stored
    assert decode_manifest(world.log.partitions(TOPICS.model)[0][-1].value).run == trainer.run_id


def test_a_run_that_learnt_nothing_begins_with_the_lake_when_it_is_started_anew():
    """As after `headrace lake import` beside a stack that has seen no event."""
    world = World()
    early = Trainer(world.deps())
    early.recover()
    early.close()
    world.lake = lake_of(3, 2)
    late = Trainer(world.deps())
    late.recover()
    assert late.run_id == early.run_id and late.source.is_stored and late.source.stored_left > 0
    world.drain(late)
    assert late.learner.step > 0 and late.source.stored_left == 0
