"""Going back over a small world: a trainer whose work is left, the verb's parts, and what a run must have learnt."""

from __future__ import annotations

from typing import Any

import msgspec
import pyarrow as pa
from trainer_world import PARTITIONS, PROJECT, TOPICS, World, cut, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.contract.config import TrainConfig
from headrace.contract.formats.decision import KIND, decode_decision
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import Position, order_of, orders
from headrace.contract.formats.steps import PassedOver, Step, decode_step
from headrace.trainer.commit.lineage import lineage, passed_over
from headrace.trainer.commit.rollback import Place, Standing, begin_run, first_record, standing
from headrace.trainer.identity import recipe_digest
from headrace.trainer.model.learner import learner_for
from headrace.trainer.run import Trainer
from headrace.trainer.source.batch import to_batch

MODEL, COUNT = PROJECT.name, 120
SHORT = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, batch_rows=16)).checked()
CONFIG = TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=300, checkpoint_ms=90)
RECIPE = recipe_digest(SHORT)


def fed(seed: int) -> World:
    world = World()
    feed(world, seed)
    return world


def feed(world: World, seed: int) -> None:
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)


def start(world: World, **changes: object) -> Trainer:
    trainer = Trainer(world.deps(project=SHORT, config=CONFIG, **changes))
    trainer.recover()
    return trainer


def turns(world: World, trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.turn()
        world.clock.advance(0.03)


def steps_of(world: World) -> list[Step]:
    return [decode_step(r.value or b"") for r in world.log.partitions(TOPICS.steps)[0]]


def stands(world: World) -> Standing:
    return standing(world.blobs, MODEL, RECIPE, steps_of(world))


def go_back(
    world: World, place: Place, run: str, *, left_out: tuple[PassedOver, ...] = (), wrap: Any = lambda _, inner: inner
) -> Step:
    """Do what the verb does."""
    first = first_record(
        place, model=MODEL, run=run, recipe=RECIPE, seed=0, samples_id="", instead_of=stands(world).run,
        left_out=left_out, reason="a test", created_ms=world.clock.now_ms(),
    )  # fmt: skip
    begin_run(
        first,
        writer=wrap("writer", FencedMemory(world.log, TOPICS.steps, f"steps-{MODEL}", world.epochs)),
        reader=world.log.reader(),
        producer=wrap("producer", world.log.producer()),
        topics=TOPICS,
        pause=lambda _: None,
    )
    return first


def decisions(world: World) -> list[Any]:
    records = [r for r in world.log.partitions(TOPICS.model)[0] if r.headers.get("kind") == KIND]
    return [decode_decision(r.value or b"") for r in records]


def check_once(world: World, run: str) -> None:
    """Hold what a run took against the topic: each sample once, those left out by name never."""
    found = lineage(steps_of(world), run)
    left_out = {each.partition: each for each in passed_over(found)}
    for partition in range(PARTITIONS):
        at, rows = Position(-1, -1), 0
        for step in found:
            for each in step.branch.passed_over if step.branch is not None else ():
                if each.partition == partition:
                    assert Position(*each.after) == at
                    at = Position(*each.upto)
            for taken in (r for r in step.ranges if r.partition == partition):
                assert Position(*taken.after) == at
                at, rows = Position(*taken.upto), rows + taken.rows
        assert at == Position((COUNT - 1) // 3, (COUNT - 1) % 3)
        assert (rows == COUNT) == (partition not in left_out)


def undisturbed(world: World, run: str) -> str:
    """Return the digest of a learner that has learnt what the run consists of, and nothing else."""
    learner = learner_for(SHORT, CONFIG)
    tables = []
    for partition in range(PARTITIONS):
        batches = [decode_batch(r.value or b"") for r in world.log.partitions(TOPICS.samples)[partition]]
        tables.append(pa.Table.from_batches(batches))
    for step in lineage(steps_of(world), run):
        parts = []
        for each in step.ranges:
            table = tables[each.partition]
            order_N = orders(table["offset"].to_numpy(), table["rank"].to_numpy())
            ours_N = (order_N > order_of(each.after)) & (order_N <= order_of(each.upto))
            parts.append(table.filter(pa.array(ours_N)))
        if parts:
            learner.learn(to_batch(pa.concat_tables(parts), SHORT))
    return str(learner.digest())


def gone_on(world: World, at: int = 12) -> tuple[Trainer, Place]:
    """Return a trainer in the middle of its work, and a place in the middle of what it has learnt."""
    trainer = start(world)
    turns(world, trainer, at)
    places = stands(world).on_path()
    assert len(places) >= 3
    return trainer, places[1]


def finish(world: World) -> Trainer:
    trainer = start(world)
    world.drain(trainer)
    trainer.close()
    return trainer
