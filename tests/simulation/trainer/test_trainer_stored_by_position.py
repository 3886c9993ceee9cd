"""Goal: a lake that is learnt in the order of the log survives a restart in its midst, hands over to the topic, and is
replayed to the same digest, from lake and topic.

Method: samples whose event times run against their positions, as a negative's do, so that each order shows; what is
learnt is held against a learner by hand.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, Lake, World, cut, send

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.project import Project
from headrace.replay.as_trained import as_trained
from headrace.trainer.model.learner import make_learner
from headrace.trainer.run import Trainer
from headrace.trainer.source.batch import to_batch

RECORDS = 4
LATE_MS = 1_000


def by_position(**changes: object) -> Project:
    recipe = msgspec.structs.replace(PROJECT.recipe, stored_order="position", **changes)
    return msgspec.structs.replace(PROJECT, recipe=recipe)


def resolved(seed: int, partition: int) -> list[tuple[pa.RecordBatch, tuple[int, int]]]:
    """Return a partition's records. A negative was shown `LATE_MS` before the positives that it lies among."""
    out = []
    for rows, after in cut(seed, partition, COUNT):
        time_ms = rows["event_time_ms"].to_numpy() - np.where(rows["label"].to_numpy() == 0, LATE_MS, 0)
        at = rows.schema.get_field_index("event_time_ms")
        out.append((rows.set_column(at, rows.schema.field(at), pa.array(time_ms)), after))
    return out


def stored_and_sent(seed: int) -> tuple[Lake, World]:
    """Return the lake of each partition's first records, and a world whose topic has all of them."""
    world, batches, upto, offsets = World(), [], {}, {}
    for partition in range(PARTITIONS):
        records = resolved(seed, partition)
        for rows, after in records:
            send(world.log, rows, after=after)
        taken = [rows for rows, _ in records[:RECORDS]]
        batches += taken
        upto[partition] = Position(taken[-1]["offset"][-1].as_py(), taken[-1]["rank"][-1].as_py())
        offsets[partition] = RECORDS
    world.lake = Lake(pa.Table.from_batches(batches), Positions(1, upto), offsets)
    return world.lake, world


def in_order(rows: pa.Table) -> list[str]:
    """Return the ids in the order of learning, sorted by hand: each partition as it lies in the log, and between
    partitions by the newest event time so far."""
    reached: dict[int, int] = {}
    keyed = []
    lying = sorted(rows.to_pylist(), key=lambda row: (row["partition"], row["offset"], row["rank"]))
    for place, row in enumerate(lying):
        newest = reached[row["partition"]] = max(reached.get(row["partition"], 0), row["event_time_ms"])
        keyed.append((newest, place, row["event_id"]))
    return [name for *_, name in sorted(keyed)]


def test_it_is_learnt_as_the_log_had_it():
    lake, world = stored_and_sent(3)
    project = by_position()
    trainer = Trainer(world.deps(project=project))
    trainer.recover()
    while trainer.source.is_stored:
        trainer.turn()
        world.clock.advance(0.03)
    names = in_order(lake.rows)
    place = {name: i for i, name in enumerate(lake.rows["event_id"].to_pylist())}
    ordered, by_hand = lake.rows.take([place[name] for name in names]), make_learner(project.recipe, project.features)
    assert names != lake.rows.sort_by("event_time_ms")["event_id"].to_pylist()
    for at in range(0, len(names), project.recipe.batch_rows):
        by_hand.learn(to_batch(ordered.slice(at, project.recipe.batch_rows), project))
    assert trainer.learner.digest() == by_hand.digest()


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("recipe", [{}, {"standardize": True, "recent_base": True, "wait_for_negative": True}])
@pytest.mark.parametrize("stops", [(1,), (2, 4)])
def test_restarts_in_its_midst_and_a_replay_change_no_bit(
    tmp_path, is_killed: bool, recipe: dict[str, object], stops: tuple[int, ...]
):
    """Through the Delta table that the sink writes: stored, stopped or killed, stored, live, replayed."""
    project = by_position(**recipe)
    fake, world = stored_and_sent(4)
    whole = Trainer(world.deps(project=project))
    whole.recover()
    world.drain(whole)
    lake = DeltaLake(str(tmp_path / "lake"))
    lake.append(fake.rows.to_batches(), fake.next_offsets, fake.positions.by_partition)
    _, world = stored_and_sent(4)
    world.lake = lake
    for stop in stops:
        trainer = Trainer(world.deps(project=project))
        trainer.recover()
        while trainer.learner.step < stop:
            trainer.turn()
        assert trainer.source.is_stored
        if not is_killed:
            trainer.close()
    trainer = Trainer(world.deps(project=project))
    trainer.recover()
    assert trainer.learner.step >= stops[-1] and trainer.source.is_stored  # What was recorded ahead is redone.
    world.drain(trainer)
    trainer.close()
    assert not trainer.source.is_stored
    assert trainer.learner.digest() == whole.learner.digest()
    replayed = as_trained(project, TOPICS, world.log.reader(), lake)
    assert replayed.equal is True and replayed.digest == trainer.learner.digest()
    assert replayed.rows == PARTITIONS * COUNT and replayed.from_lake == fake.rows.num_rows
    assert replayed.from_topic == replayed.rows - replayed.from_lake > 0
