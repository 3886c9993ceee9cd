"""Goal: replay reaches the live digest from the lake, from the topic, and from both; and says so when it does not.

Method: a trainer learns a seeded world, the samples are then given to the replay by different ways.
"""

from __future__ import annotations

import time

import pyarrow as pa
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, lake_of, learnt, send

from headrace.backends.blobs_file import FileBlobs
from headrace.backends.clock import VirtualClock
from headrace.backends.delta.leases import Leases
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.contract.config import LakeConfig
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Position
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.checkpoint import stored_versions
from headrace.trainer.run import Trainer


@pytest.mark.parametrize("records", [None, 3, 10_000])
def test_replay_reaches_the_live_digest(records):
    world, trainer = learnt(1)
    lake = None if records is None else lake_of(1, records)
    result = as_trained(PROJECT, TOPICS, world.log.reader(), lake)
    assert result.equal is True
    assert result.digest == trainer.learner.digest()
    assert result.rows == PARTITIONS * COUNT
    assert (result.from_lake == 0) == (records is None)
    assert (result.from_topic == 0) == (records == 10_000)


def test_stored_first_then_live():
    """A run that begins with the lake learns each sample once, resumes anywhere, and is replayed."""
    world, trainer = learnt(2, lake_of(2, 4))
    assert trainer.learnt == PARTITIONS * COUNT
    again = Trainer(world.deps())
    again.recover()
    assert again.learner.digest() == trainer.learner.digest()
    world.blobs.objects.clear()
    redone = Trainer(world.deps())
    redone.recover()
    assert redone.learner.digest() == trainer.learner.digest()
    assert as_trained(PROJECT, TOPICS, world.log.reader(), world.lake).equal is True


def test_on_a_real_delta_table(tmp_path):
    """The same through the Delta table that the sink writes: stored first, then live, then replayed."""
    fake = lake_of(5, 4)
    lake = DeltaLake(str(tmp_path / "lake"))
    lake.append(fake.rows.to_batches(), fake.next_offsets, fake.positions.by_partition)
    world, trainer = learnt(5, lake)
    assert trainer.learnt == PARTITIONS * COUNT
    result = as_trained(PROJECT, TOPICS, world.log.reader(), lake)
    assert result.equal is True and result.from_lake == fake.rows.num_rows


def test_a_changed_sample_is_found():
    world, _ = learnt(3)
    lake = lake_of(3, 10_000)
    label = lake.rows.column("label").to_numpy().copy()
    label[5] = 1 - label[5]
    at = lake.rows.schema.get_field_index("label")
    lake.rows = lake.rows.set_column(at, lake.rows.schema.field(at), pa.chunked_array([label]))
    assert as_trained(PROJECT, TOPICS, world.log.reader(), lake).equal is False


def test_a_missing_sample_is_found():
    world, _ = learnt(4)
    lake = lake_of(4, 10_000)
    lake.rows = lake.rows.slice(1)
    with pytest.raises(InvariantBroken, match="are stored"):
        as_trained(PROJECT, TOPICS, world.log.reader(), lake)


def test_compaction_and_vacuum_change_no_digest(tmp_path):
    """The lake of many commits is learnt, half of it by a trainer that stops; then its files become others.

    The trainer that goes on and the replay find the same rows in the same order: from the version's files while a
    lease keeps them, by positions when they are gone.
    """
    fake, clock = lake_of(6, 4), VirtualClock(1_000)
    leases = Leases(FileBlobs(tmp_path / "blobs"), clock, lease_ms=60_000)
    config = LakeConfig(vacuum_ms=1_000, compact_files=2)
    lake = DeltaLake(str(tmp_path / "lake"), partitions=PARTITIONS, config=config, leases=leases)
    for batch in fake.rows.to_batches():
        partition, last = batch["partition"][0].as_py(), (batch["offset"][-1].as_py(), batch["rank"][-1].as_py())
        lake.append([batch], {partition: fake.next_offsets[partition]}, {partition: Position(*last)})
    world = World(lake=lake)
    for partition in range(PARTITIONS):
        for rows, after in cut(6, partition, COUNT):
            send(world.log, rows, after=after)
    trainer = Trainer(world.deps())
    trainer.recover()
    while trainer.learner.step < 3:
        trainer.turn()
    assert [(x.holder, x.version) for x in leases.active()] == [("train-small", 11)]
    trainer.close()
    keeper = Upkeep(lake)
    keeper.compact(done := Done())
    assert done.files_compacted == len(fake.rows.to_batches())
    time.sleep(2.1)
    assert keeper.vacuum(Done(), []) == []  # the lease keeps all of it
    leases.give_back("train-small")
    assert len(keeper.vacuum(Done(), [])) == done.files_compacted
    again = Trainer(world.deps())
    again.recover()
    world.drain(again)
    again.close()
    assert trainer.learnt + again.learnt == PARTITIONS * COUNT and leases.active() == []
    assert as_trained(PROJECT, TOPICS, world.log.reader(), lake).equal is True


def test_checkpoints_name_the_versions_that_they_are_in_the_middle_of():
    world = World(lake=lake_of(7, 4))
    trainer = Trainer(world.deps())
    trainer.recover()
    trainer.turn()
    trainer.close()
    assert stored_versions(world.blobs, PROJECT.name) == {5}
