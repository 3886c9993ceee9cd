"""Goal: a record that is not ours costs nothing; a damaged one stops the trainer just where samples were in it.

Method: the trainer's small world with such records put into its topics; a world without them judges.
"""

from __future__ import annotations

import pytest
from trainer_world import PROJECT, TOPICS, World, cut, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.events import encode_batch
from headrace.replay.as_trained import as_trained
from headrace.replay.ledger.keys import sample_keys
from headrace.trainer.run import Trainer

RECORDS = cut(3, 0, 200)
FOREIGN = {
    "a console's": (b"hello", {}),
    "a mirror's": (encode_batch(RECORDS[0][0]), {"source": "elsewhere"}),
    "a tombstone": (None, {}),
}
NOT_MISSED = FOREIGN | {
    "with our headers": (b"hello", {"after": "-1:-1", "last": "999999:0", "spec": "x"}),
    "a damaged repeat": (b"hello", {"after": "-1:-1", "last": "0:1", "spec": "x"}),
}


def begun(*, stopped_at: int = 3) -> World:
    world = World()
    for rows, after in RECORDS[:stopped_at]:
        send(world.log, rows, after=after)
    return world


def trained(world: World) -> tuple[Trainer, MemoryMetrics]:
    metrics = MemoryMetrics()
    trainer = Trainer(world.deps(metrics=metrics))
    trainer.recover()
    world.drain(trainer)
    return trainer, metrics


@pytest.fixture(scope="module")
def digest() -> str:
    world = begun(stopped_at=len(RECORDS))
    return trained(world)[0].learner.digest()


@pytest.mark.parametrize("name", NOT_MISSED)
def test_what_nobody_misses_is_counted_and_skipped(name: str, digest: str):
    value, headers = NOT_MISSED[name]
    world = begun()
    world.log.append(TOPICS.samples, 0, value, None, headers)
    for rows, after in RECORDS[3:]:
        send(world.log, rows, after=after)
    trainer, metrics = trained(world)
    assert trainer.learner.digest() == digest
    kind = "foreign" if name in FOREIGN else "damaged"
    assert metrics.counters["records_unreadable_total", f"samples {kind}"] == 1
    trainer.close()
    assert as_trained(PROJECT, TOPICS, world.log.reader(), None).equal
    assert sample_keys(world.log.partitions(TOPICS.samples)[0])[0].num_rows == 200


def test_a_foreign_step_leaves_a_replay_alone():
    world = begun(stopped_at=len(RECORDS))
    trained(world)[0].close()
    world.log.append(TOPICS.steps, 0, b"hello", None, {})
    assert as_trained(PROJECT, TOPICS, world.log.reader(), None).equal


def damage(world: World, at: int) -> None:
    """Append record `at` with its headers and half its bytes."""
    rows, after = RECORDS[at]
    last = (rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
    headers = {"after": f"{after[0]}:{after[1]}", "last": f"{last[0]}:{last[1]}", "spec": "x"}
    world.log.append(TOPICS.samples, 0, encode_batch(rows)[:-100], None, headers)


def test_samples_lost_in_a_damaged_record_stop_the_trainer_at_the_next_one():
    world = begun()
    damage(world, 3)
    trainer, _ = trained(world)
    before = trainer.positions.at(0)
    send(world.log, RECORDS[4][0], after=RECORDS[4][1])
    with pytest.raises(InvariantBroken, match=r"samples/0 offset 3 is damaged .* nowhere else"):
        world.drain(trainer)
    assert trainer.positions.at(0) == before, "nothing behind the hole was learnt"
    with pytest.raises(InvariantBroken, match="offset 3 is damaged"):
        trained(world)


def test_a_checkpoint_between_the_damage_and_the_next_record_hides_nothing():
    world = begun()
    damage(world, 3)
    trainer, _ = trained(world)
    assert trainer.source.cursor().next_offsets["0"] == 3
    trainer.close()
    send(world.log, RECORDS[4][0], after=RECORDS[4][1])
    with pytest.raises(InvariantBroken, match="offset 3 is damaged"):
        trained(world)


def test_a_restart_goes_on_where_the_samples_came_again(digest: str):
    """The restarted join writes them again, behind what was written meanwhile."""
    world = begun()
    damage(world, 3)
    for at in (4, 5):
        send(world.log, RECORDS[at][0], after=RECORDS[at][1])
    with pytest.raises(InvariantBroken):
        trained(world)
    for rows, after in RECORDS[3:]:
        send(world.log, rows, after=after)
    trainer, metrics = trained(world)
    assert trainer.learner.digest() == digest and metrics.counters["gap_total", "samples"] == 2
    trainer.close()


def test_the_ledger_leaves_out_what_is_damaged():
    world = begun()
    damage(world, 3)
    for rows, after in RECORDS[4:]:
        send(world.log, rows, after=after)
    assert sample_keys(world.log.partitions(TOPICS.samples)[0])[0].num_rows == sum(r.num_rows for r, _ in RECORDS[:3])
