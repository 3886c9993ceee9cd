"""Goal: kill the trainer anywhere, any number of times, and the model has the bits of an undisturbed run.

Method: one seed makes the samples and the crashes. A world that is never disturbed gives the steps; another, with the
same steps topic replayed by processes that die around every effect, must reach the digest that replaying its own
steps from nothing gives, and have taken every sample once.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec
import numpy as np
import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, FaultyBlobs, Killed, World, cut, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.contract.config import TrainConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dense_change import bits_of
from headrace.contract.formats.positions import Cursor
from headrace.contract.formats.snapshot import decode_manifest, decode_update, decode_weights
from headrace.contract.formats.steps import decode_step
from headrace.contract.interfaces.blobs import Pieces
from headrace.contract.project import Project
from headrace.trainer.model.learner import TableLearner, learner_for
from headrace.trainer.run import Trainer
from headrace.trainer.source.source import Source

COUNT = 400


class FaultyWriter(FencedMemory):
    """Dies before or after the record is written, or loses the receipt."""

    def __init__(self, *args, rng: Random, rate: float) -> None:
        super().__init__(*args)
        self.rng, self.rate = rng, rate

    def append(self, *values: bytes) -> None:
        what = self.rng.random() / self.rate
        if what < 1:
            raise Killed
        if what < 2:
            raise Unavailable("the broker went away before it had the record")
        super().append(*values)
        if what < 3:
            raise Killed
        if what < 4:
            raise Unavailable("the broker went away after it had the record")


class FaultyStore(FaultyBlobs):
    """Dies before or after an object is stored, or stays away."""

    def __init__(self, inner: FaultyBlobs, rng: Random) -> None:
        self.objects, self.rng = inner.objects, rng

    def put(self, name: str, data: bytes | Pieces) -> None:
        what = self.rng.random()
        if what < 0.15:
            raise Killed
        if what < 0.3:
            raise Unavailable("no DataNode")
        super().put(name, data)
        if what < 0.45:
            raise Killed


ORDERED = msgspec.structs.replace(
    PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, ordered_from_ms=1, provisional=True, standardize=True)
)
"""Positives wait for the negatives of their time, over any crash."""


def replayed(world: World, project: Project = PROJECT) -> tuple[TableLearner, Counter[str], int]:
    """Learn the recorded steps from nothing; return the learner, how often each event was learnt, and the last step."""
    source = Source(project, world.log.reader(), TOPICS.samples, generation=1, metrics=world.deps().metrics)
    source.begin(Cursor())
    learner, taken = learner_for(project, TrainConfig()), Counter()
    steps = [decode_step(r.value) for r in world.log.partitions(TOPICS.steps)[0]]
    runs = [s.run for s in steps]
    assert runs == sorted(runs)
    steps = [s for s in steps if s.run == runs[-1]]
    assert [s.step for s in steps] == list(range(1, len(steps) + 1))
    for step in steps:
        while not source.has(step.ranges):
            source.poll(0)
        rows = source.take(step.ranges)
        taken.update(rows["event_id"].to_pylist())
        learner.learn(source.batch(rows))
    return learner, taken, len(steps)


@pytest.mark.parametrize(("seed", "project"), [*((seed, PROJECT) for seed in range(8)), (8, ORDERED), (9, ORDERED)])
def test_crashes_change_nothing(seed, project):
    rng, world = Random(seed), World()
    todo = [r for p in range(PARTITIONS) for r in cut(seed, p, COUNT)]
    todo.sort(key=lambda r: r[0]["event_time_ms"][0].as_py())
    trainer, deaths, waited = None, 0, 0
    while todo or trainer is None:
        for rows, after in todo[:3]:
            send(world.log, rows, after=after)
        del todo[:3]
        try:
            if trainer is None:
                writer = FaultyWriter(
                    world.log, TOPICS.steps, f"steps-{PROJECT.name}", world.epochs, rng=rng, rate=0.04
                )
                blobs = FaultyStore(world.blobs, rng)
                trainer = Trainer(world.deps(project=project, steps_writer=writer, blobs=blobs))
                trainer.recover()
            for _ in range(rng.randint(1, 12)):
                trainer.turn()
                world.clock.advance(0.05)
                waited = max(waited, trainer.learner.held)
            if rng.random() < 0.1:
                raise Killed
        except Killed:
            trainer, deaths = None, deaths + 1
    last = Trainer(world.deps(project=project))
    last.recover()
    world.drain(last)
    learner, taken, steps = replayed(world, project)
    assert deaths > 0
    assert set(taken.values()) == {1} and len(taken) == PARTITIONS * COUNT
    assert last.learner.step == steps
    assert last.learner.digest() == learner.digest()
    assert (waited > 0) == (project is ORDERED)


def test_what_is_published_is_the_model():
    """Apply the newest snapshot and the deltas behind it: each row and weight equals the learner's."""
    world = World()
    for partition in range(PARTITIONS):
        for rows, after in cut(1, partition, COUNT):
            send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    assert decode_manifest(world.log.partitions(TOPICS.model)[0][-1].value).step == 0  # at once
    for _ in range(120):
        trainer.turn()
        world.clock.advance(0.02)
    world.clock.advance(1.0)
    trainer.turn()
    manifest = decode_manifest(world.log.partitions(TOPICS.model)[0][-1].value)
    weights, inside = decode_weights(world.blobs.objects[manifest.blob])
    assert inside.digest == manifest.digest
    rows = dict(zip(weights.keys_K.tolist(), weights.values_KV, strict=True))
    version, dense = manifest.version, weights.dense
    for record in world.log.partitions(TOPICS.deltas)[0][manifest.deltas_offset :]:
        delta, about = decode_weights(record.value, bits_of(dense))
        assert about.base == version
        version, dense = about.version, delta.dense
        rows = {key: row for key, row in rows.items() if key not in delta.gone_K}
        rows |= dict(zip(delta.keys_K.tolist(), delta.values_KV, strict=True))
    truth = trainer.learner.weights()
    assert version == f"{trainer.run_id}-{trainer.learner.step}"
    assert set(rows) == set(truth.keys_K.tolist())
    assert all((rows[k] == v).all() for k, v in zip(truth.keys_K.tolist(), truth.values_KV, strict=True))
    assert all((dense[n] == truth.dense[n]).all() for n in truth.dense)


def test_every_base_is_the_version_before():
    """A server that follows deltas never has to reload while the trainer lives, across snapshots too."""
    world = World()
    for rows, after in cut(2, 0, COUNT):
        send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    world.clock.advance(5.0)
    trainer.turn()
    about = [decode_update(r.value)[1] for r in world.log.partitions(TOPICS.deltas)[0]]
    assert [a.base for a in about[1:]] == [a.version for a in about[:-1]]
    assert len(world.log.partitions(TOPICS.model)[0]) >= 2


def test_the_fenced_writer_stops_a_zombie():
    """A second trainer takes over; the first one's next step is refused and changes nothing."""
    world = World()
    records = cut(3, 0, COUNT)
    for rows, after in records[:4]:
        send(world.log, rows, after=after)
    zombie = Trainer(world.deps())
    zombie.recover()
    zombie.turn()
    heir = Trainer(world.deps())
    heir.recover()
    with pytest.raises(InvariantBroken, match="another process became the writer"):
        world.drain(zombie)
    world.drain(heir)
    learner, taken, _ = replayed(world)
    assert heir.learner.digest() == learner.digest()
    assert sum(taken.values()) == sum(r.num_rows for r, _ in records[:4])


def test_repeats_are_dropped_and_gaps_wait():
    """A record is sent twice and another before its predecessor: each sample is learnt once, in position order."""
    world = World()
    (a, a_after), (b, b_after), (c, c_after) = cut(4, 1, COUNT)[:3]
    for rows, after in ((a, a_after), (c, c_after), (a, a_after)):
        send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    world.drain(trainer)
    assert trainer.learnt == a.num_rows
    assert trainer.deps.metrics.total("gap_total") == 1
    cursor = trainer.source.cursor()
    assert cursor.next_offsets["1"] == 1  # the record that waits is read again after a restart
    send(world.log, b, after=b_after)
    world.drain(trainer)
    assert trainer.learnt == a.num_rows + b.num_rows + c.num_rows


def test_nan_is_refused_and_counted():
    """A sample with a NaN is counted as refused and the others are learnt."""
    world = World()
    trainer = Trainer(world.deps())
    trainer.recover()
    rows, after = cut(5, 0, COUNT)[0]
    label = np.array(rows["label"])
    label[0] = np.nan
    send(
        world.log, rows.set_column(rows.schema.get_field_index("label"), rows.schema.field("label"), label), after=after
    )
    world.drain(trainer)
    assert trainer.deps.metrics.total("samples_refused_total") == 1
    assert trainer.learnt == rows.num_rows - 1
    assert all(np.isfinite(v).all() for v in trainer.learner.state().values())
