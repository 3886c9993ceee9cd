"""Goal: a recipe of several tasks takes the samples of each, from the topic and from the lake, and none of another.
Method: the trainer's small world with a second and a third task; what is learnt is held against a learner by hand."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
from trainer_world import PROJECT, TOPICS, Lake, World, samples, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.project import FeedbackType, Project, Task
from headrace.replay.as_trained import as_trained, read_steps
from headrace.replay.ledger.draw import Expected, Found, draw
from headrace.replay.ledger.keys import JOINED, KEYS
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import make_learner
from headrace.trainer.run import Trainer
from headrace.trainer.source.batch import to_batch
from headrace.trainer.source.stored import stored_order

MANY = msgspec.structs.replace(
    PROJECT,
    feedback=tuple(FeedbackType(name=n, tag=f"t.{n}") for n in ("click", "like", "order")),
    tasks=tuple(Task(name=n, feedback=n, window_ms=1_000) for n in ("click", "like", "order")),
    recipe=msgspec.structs.replace(PROJECT.recipe, tasks=("like", "click"), negative_share=0.5),
).checked()


def mixed(partition: int, count: int, *, offset: int = 0) -> pa.RecordBatch:
    """Return samples whose tasks go round: click, like, order."""
    rows = samples(5, partition, count, offset=offset)
    tasks = pa.array([("click", "like", "order")[i % 3] for i in range(count)])
    return rows.set_column(rows.schema.get_field_index("task"), rows.schema.field("task"), tasks)


def of_tasks(rows: pa.Table, project: Project) -> Batch:
    return to_batch(rows.filter(pa.compute.is_in(rows["task"], value_set=pa.array(project.recipe.heads))), project)


def test_rows_know_their_head_and_their_id():
    batch = to_batch(pa.Table.from_batches([mixed(0, 30)]), MANY)
    assert batch.task_B.tolist() == [1, 0, -1] * 10
    assert len(set(batch.id_B.tolist())) == 30
    again = to_batch(pa.Table.from_batches([mixed(0, 30).slice(7, 9)]), MANY)
    assert again.id_B.tolist() == batch.id_B[7:16].tolist()
    assert not to_batch(pa.Table.from_batches([samples(5, 0, 30)]), PROJECT).id_B.any()


def test_a_live_run_learns_its_tasks_and_replay_reaches_its_digest():
    world = World()
    after, by_hand = (-1, -1), make_learner(MANY.recipe, MANY.features)
    trainer = Trainer(world.deps(project=MANY))
    trainer.recover()
    for i in range(4):
        rows = mixed(0, 30, offset=30 * i)
        after = send(world.log, rows, after=after)
        world.drain(trainer)
        by_hand.learn(of_tasks(pa.Table.from_batches([rows]), MANY))
    assert trainer.learner.digest() == by_hand.digest() and trainer.learner.step == 4
    trainer.close()
    found = as_trained(MANY, TOPICS, world.log.reader(), None)
    assert found.equal and found.rows == 80


def test_the_ledger_counts_what_the_trainer_left_out():
    """Positives too, of which none is; and a task that the recipe doesn't have."""
    world, after, metrics = World(), (-1, -1), MemoryMetrics()
    rows = [mixed(0, 30, offset=30 * i) for i in range(4)]
    trainer = Trainer(world.deps(project=MANY, metrics=metrics))
    trainer.recover()
    for batch in rows:
        after = send(world.log, batch, after=after)
        world.drain(trainer)
    trainer.close()
    joined = pa.Table.from_batches([batch.select(JOINED.names) for batch in rows]).cast(JOINED)
    steps = read_steps(world.log.reader(), TOPICS, MANY.name, trainer.run_id, trainer.learner.step)
    nothing = KEYS.empty_table()
    found = Found(joined.select(KEYS.names), nothing, Positions(1), steps, lambda *_: nothing, [], frozenset(), [])
    ledger = draw(Expected(joined, {}, 0, {}, 0, 0), found, recipe=MANY.recipe)
    left_out = int(metrics.counters["samples_left_out_total", ""])
    negatives = pa.compute.sum(pa.compute.equal(of_heads(joined)["label"], 0)).as_py()
    assert 0 < left_out < negatives
    assert (ledger.learnt, ledger.sampled_out, ledger.other_tasks) == (80 - left_out, left_out, 40)
    assert (ledger.lost, ledger.twice) == (0, 0)
    assert ledger.samples == 120 and ledger.models[trainer.run_id].closes()


def of_heads(rows: pa.Table) -> pa.Table:
    return rows.filter(pa.compute.is_in(rows["task"], value_set=pa.array(MANY.recipe.heads)))


def test_the_lake_gives_the_same_tasks_first():
    stored = pa.Table.from_batches([mixed(p, 30) for p in range(2)])
    lake = Lake(stored, Positions(1, {0: Position(9, 2), 1: Position(9, 2)}), {})
    world = World(lake=lake)
    trainer = Trainer(world.deps(project=MANY))
    trainer.recover()
    world.drain(trainer)
    by_hand = make_learner(MANY.recipe, MANY.features)
    ordered = stored_order(stored, MANY.recipe.heads)
    for at in range(0, 40, 32):
        by_hand.learn(to_batch(ordered.slice(at, 32), MANY))
    assert trainer.learner.digest() == by_hand.digest() and ordered.num_rows == 40
    assert np.isin(ordered["task"].to_numpy(zero_copy_only=False), ["like", "click"]).all()
