"""Steps move to the store while trainers die: nothing of them is lost, and no recovery, replay or ledger sees it.

Method: a trainer learns a topic's samples with small moves; it is killed before, in or after each call of the move, by
number. The next one goes on. All steps are read once, in order, and replay reaches the digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, FaultyBlobs, Killed, World, cut, send

from headrace.backends.log.memory import MemoryAdmin, MemoryLog
from headrace.contract.config import TrainConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step
from headrace.replay.as_trained import as_trained
from headrace.replay.recorded import recorded_steps
from headrace.trainer.commit.steps_archive import StepsArchive, read_all_steps
from headrace.trainer.run import Trainer

CONFIG = TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=300, steps_moved=6)
COUNT = 400


class Kills:
    """Counts the calls of a move; one of them, in one way, ends the process."""

    def __init__(self, number: int, how: str) -> None:
        self.left, self.how = number, how

    def around(self, call, *args):
        self.left -= 1
        if self.left != -1:
            return call(*args)
        if self.how == "before":
            raise Killed
        if self.how == "away":
            raise Unavailable("injected")
        call(*args)
        if self.how == "done, away":
            raise Unavailable("injected")
        raise Killed


class KilledBlobs(FaultyBlobs):
    """Ends the process around a call that concerns the archive."""

    def __init__(self, inner: FaultyBlobs, kills: Kills) -> None:
        self.objects, self.kills = inner.objects, kills

    def put(self, name: str, data: bytes) -> None:
        if not name.startswith("steps/"):
            return super().put(name, data)
        return self.kills.around(super().put, name, data)

    def get(self, name: str) -> bytes | None:
        return self.kills.around(super().get, name) if name.startswith("steps/") else super().get(name)

    def list(self, prefix: str) -> list[str]:
        return self.kills.around(super().list, prefix) if prefix.startswith("steps/") else super().list(prefix)


class KilledAdmin(MemoryAdmin):
    """Ends the process around a deletion."""

    def __init__(self, log: MemoryLog, kills: Kills) -> None:
        super().__init__(log)
        self.kills = kills

    def delete_before(self, topic: str, offsets) -> None:
        self.kills.around(super().delete_before, topic, offsets)


def trainers(world: World, number: int, how: str) -> Iterator[Trainer]:
    """Yield a trainer that is killed at the numbered call, then others that nothing happens to."""
    while True:
        kills = Kills(number, how)
        yield Trainer(
            world.deps(
                config=CONFIG,
                blobs=KilledBlobs(world.blobs, kills),
                admin=KilledAdmin(world.log, kills),
                open_reader=world.log.reader,
                steps_id="first",
            )
        )
        number = 1_000_000


def archive_of(world: World, topic_id: str = "first") -> StepsArchive:
    return StepsArchive(world.blobs, TOPICS.steps, topic_id)


def steps_of(world: World) -> list[Step]:
    return recorded_steps(world.log.reader(), TOPICS, archive_of(world))


def run(seed: int, number: int = 1_000_000, how: str = "before") -> tuple[World, Trainer, int]:
    """Return the world in which all samples were learnt, the last trainer, and how many processes died."""
    rng, world, deaths = Random(seed), World(), 0
    todo = [r for p in range(PARTITIONS) for r in cut(seed, p, COUNT)]
    todo.sort(key=lambda r: r[0]["event_time_ms"][0].as_py())
    coming, trainer = trainers(world, number, how), None
    while todo or trainer is None:
        for rows, after in todo[:3]:
            send(world.log, rows, after=after)
        del todo[:3]
        try:
            if trainer is None:
                trainer = next(coming)
                trainer.recover()
            for _ in range(rng.randint(1, 12)):
                trainer.turn()
                world.clock.advance(0.05)
        except Killed:
            trainer, deaths = None, deaths + 1
    world.drain(trainer)
    trainer.close()
    return world, trainer, deaths


def check(world: World, trainer: Trainer) -> None:
    steps = steps_of(world)
    assert [s.step for s in steps if s.run == trainer.run_id] == list(range(1, trainer.learner.step + 1))
    first, end = archive_of(world).span()
    begin = world.log.reader().begin_offsets(TOPICS.steps)[0]
    assert first == 0 and begin == end > 0
    found = as_trained(PROJECT, TOPICS, world.log.reader(), None, archive=archive_of(world))
    assert found.equal is True and found.step == trainer.learner.step
    again = Trainer(world.deps(config=CONFIG, steps_id="first"))
    again.recover()
    assert again.learner.digest() == trainer.learner.digest()


def test_steps_move_and_nothing_sees_it() -> None:
    world, trainer, deaths = run(1)
    assert deaths == 0
    check(world, trainer)


CALLS = 24
"""Calls of the archive that the first two moves make, and the looks between them."""


@pytest.mark.parametrize("how", ["before", "in", "away", "done, away"])
def test_a_move_that_is_cut_off_anywhere_is_ended_by_a_later_one(how: str) -> None:
    died = 0
    for number in range(CALLS):
        world, trainer, deaths = run(2, number, how)
        check(world, trainer)
        died += deaths
    assert died == (0 if "away" in how else CALLS)


def test_records_that_were_deleted_before_they_were_stored_are_missed() -> None:
    """A planted fault: the topic is trimmed beyond what the store has."""
    world, _, _ = run(1)
    end = archive_of(world).span()[1]
    world.log.trim(TOPICS.steps, 0, end + 2)
    with pytest.raises(InvariantBroken, match=f"steps from offset {end} to below {end + 2} are neither in topic"):
        steps_of(world)
    with pytest.raises(InvariantBroken, match=r"is not in the log"):
        Trainer(world.deps(steps_id="first", blobs=_without_checkpoints(world))).recover()


def test_a_damaged_file_is_named_and_another_that_holds_the_same_serves() -> None:
    world, _, _ = run(1)
    names = sorted(name for name in world.blobs.objects if name.startswith("steps/"))
    everything, archive = steps_of(world), archive_of(world)
    kept = list(archive.read())
    world.blobs.objects[names[0]] = world.blobs.objects[names[0]][:-1]
    with pytest.raises(InvariantBroken, match=names[0]):
        steps_of(world)
    archive.put(0, kept[3][0] + 1, kept[:4])
    archive.put(kept[2][0], kept[-1][0] + 1, kept[2:])
    assert steps_of(world) == everything


def test_a_topic_that_was_made_anew_has_none_of_the_moved_steps() -> None:
    world, _, _ = run(1)
    assert archive_of(world, "second").span() == (0, 0) != archive_of(world).span()


def test_steps_that_move_while_they_are_read_are_read_once() -> None:
    world, _, _ = run(1)
    archive, log = archive_of(world), world.log
    everything, found = steps_of(world), []
    begin = log.reader().begin_offsets(TOPICS.steps)[0]
    left = [(r.offset, r.value) for r in log.partitions(TOPICS.steps)[0] if r.value is not None]
    for _, step in read_all_steps(log.reader(), TOPICS.steps, archive):
        found.append(step)
        if len(found) == 3:
            archive.put(begin, left[1][0] + 1, left[:2])
            log.trim(TOPICS.steps, 0, left[1][0] + 1)
    assert found == everything


def _without_checkpoints(world: World) -> FaultyBlobs:
    blobs = FaultyBlobs()
    blobs.objects = {name: data for name, data in world.blobs.objects.items() if not name.startswith("checkpoints/")}
    return blobs
