"""Goal: a run goes back to an earlier checkpoint with the bits of a run that never went further, and what it learns
then is learnt once; whatever dies on the way, serving goes back with it and nothing that was left is served again.

Method: a trainer learns a seeded topic, is left in the middle of its work, and somebody goes back. The calls of the
going back, and of the trainer that begins then, are numbered: at each one the process dies, before or after it took
effect, and another one goes on. A run that has learnt the same ranges and never went back says which bits are right.
A server, late or working, is asked what it holds. Bugs are planted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rollback_world import (
    CONFIG,
    COUNT,
    MODEL,
    SHORT,
    check_once,
    decisions,
    fed,
    finish,
    go_back,
    gone_on,
    stands,
    start,
    steps_of,
    turns,
    undisturbed,
)
from trainer_world import PARTITIONS, TOPICS, Killed, World, cut, lake_of, samples, send

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.steps import Step
from headrace.replay.as_trained import as_trained
from headrace.replay.ledger.draw import _runs
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.trainer import recovery
from headrace.trainer.commit import rollback
from headrace.trainer.commit.lineage import lineage
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.run import Trainer
from headrace.trainer.source.gaps import until


class Server:
    """One replica over the world."""

    def __init__(self, world: World, folder: Path) -> None:
        recipe = SHORT.recipe
        self.shared = SharedModel(folder / "m", dim=recipe.row_dim, rows_max=2_000, create=True)
        self.updater = Updater(
            project=SHORT, topics=TOPICS, shared=self.shared, reader=world.log.reader(), blobs=world.blobs,
            metrics=MemoryMetrics(), clock=world.clock, stop=threading.Event(),
        )  # fmt: skip

    def version(self) -> str:
        for _ in range(3):
            self.updater.step(0.0)
        return self.shared.meta().manifest.version if self.shared.holds_model else ""


@pytest.fixture
def late(tmp_path: Path) -> Callable[[World], str]:
    """Return what a server that starts now comes to serve."""
    count = 0

    def ask(world: World) -> str:
        nonlocal count
        count += 1
        (tmp_path / f"{count}").mkdir()
        return Server(world, tmp_path / f"{count}").version()

    return ask


def test_a_run_goes_back_and_learns_what_came_since_once(tmp_path):
    world = fed(1)
    left, place = gone_on(world)
    server = Server(world, tmp_path)
    assert server.version().startswith(left.run_id)
    first = go_back(world, place, "r9")
    with pytest.raises(InvariantBroken, match=r"somebody asked for another run, r9: it goes on from run .* a test"):
        turns(world, left, 20)  # It learns what it had recorded ahead, first.
    before = server.version()
    assert before.startswith(left.run_id)
    trainer = finish(world)
    assert trainer.run_id == "r9" and place.stored.step == first.step
    check_once(world, "r9")
    assert trainer.learner.digest() == undisturbed(world, "r9")
    assert server.version() == f"r9-{trainer.learner.step}"
    assert as_trained(SHORT, TOPICS, world.log.reader(), None, train=CONFIG).equal is True
    again = start(world)
    assert again.run_id == "r9" and again.learnt == 0 and again.learner.digest() == trainer.learner.digest()


def test_a_trainer_that_learns_nothing_finds_out_too():
    world = fed(2)
    trainer = start(world)
    world.drain(trainer)
    go_back(world, stands(world).on_path()[1], "r9")
    world.clock.advance(3.0)
    with pytest.raises(InvariantBroken, match="somebody asked for another run"):
        turns(world, trainer, 3)


def test_what_was_left_is_served_to_nobody_again(late):
    """A late server, before and after the new run's first snapshot; and one that sees the old trainer's last words."""
    world = fed(3)
    left, place = gone_on(world)
    newest = read_manifests(world.log.reader(), TOPICS, MODEL)[-1]
    assert newest.run == left.run_id and newest.step > place.stored.step
    assert late(world) == newest.version
    go_back(world, place, "r9")
    assert late(world) == ""
    trainer = finish(world)
    assert late(world) == f"r9-{trainer.learner.step}"
    assert left.publisher is not None
    left.publisher._failed = True
    assert left.publisher.snapshot(left.learner, left.positions)
    assert read_manifests(world.log.reader(), TOPICS, MODEL)[-1].run == left.run_id
    assert late(world) == f"r9-{trainer.learner.step}"


def test_a_region_that_is_taken_over_takes_no_delta_of_the_run_that_was_left(tmp_path):
    world = fed(4)
    left, place = gone_on(world)
    server = Server(world, tmp_path)
    served = server.version()
    go_back(world, place, "r9")
    turns_left(world, left)
    again = Updater(
        project=SHORT, topics=TOPICS, shared=server.shared, reader=world.log.reader(), blobs=world.blobs,
        metrics=MemoryMetrics(), clock=world.clock, stop=threading.Event(),
    )  # fmt: skip
    for _ in range(3):
        again.step(0.0)
    assert server.shared.meta().manifest.version == served
    trainer = finish(world)
    for _ in range(3):
        again.step(0.0)
    assert server.shared.meta().manifest.version == f"r9-{trainer.learner.step}"


def turns_left(world: World, left: Trainer) -> None:
    """Let a trainer that was fenced off, and does not know, publish once more."""
    assert left.publisher is not None
    left.learner.step += 1
    left.publisher.delta(left.learner, left.positions)
    left.learner.step -= 1


def test_back_twice_and_forth_again():
    """From a branch to a place before it, and then to a place of the first run that both had left."""
    world = fed(5)
    first, place = gone_on(world, 16)
    go_back(world, place, "r7")
    second = start(world)
    turns(world, second, 8)
    earlier = next(p for p in stands(world).on_path() if p.stored.step < place.stored.step)
    assert earlier.stored.run == first.run_id
    go_back(world, earlier, "r8")
    assert [leg.run for leg in stands(world).path] == [first.run_id, "r8"]
    third = start(world)
    turns(world, third, 4)
    assert third.run_id == "r8"
    furthest = stands(world).on_path(first.run_id)[0]
    assert furthest.stored.step > place.stored.step
    go_back(world, furthest, "r9")
    last = finish(world)
    assert last.run_id == "r9"
    check_once(world, "r9")
    assert last.learner.digest() == undisturbed(world, "r9")
    assert as_trained(SHORT, TOPICS, world.log.reader(), None, train=CONFIG).equal is True
    told = decisions(world)
    assert [(d.run, d.refused_run, d.refused_after) for d in told] == [
        ("r7", first.run_id, place.stored.step),
        ("r8", "r7", 0),
        ("r9", "r8", 0),
    ]


def test_a_branch_of_a_branch_goes_on_from_the_middle_one():
    world = fed(6)
    _, place = gone_on(world, 10)
    go_back(world, place, "r7")
    second = start(world)
    turns(world, second, 10)
    middle = next(p for p in stands(world).on_path() if p.stored.run == "r7" and p.stored.step < second.learner.step)
    go_back(world, middle, "r8")
    last = finish(world)
    assert [leg.run for leg in stands(world).path][1:] == ["r7", "r8"]
    check_once(world, "r8")
    assert last.learner.digest() == undisturbed(world, "r8")


def test_the_checkpoint_is_gone_meanwhile():
    """The trainer that was left deletes it with its last one: the one before and the recorded steps lead there."""
    world = fed(7)
    _, place = gone_on(world, 16)
    go_back(world, place, "r9")
    del world.blobs.objects[f"checkpoints/{MODEL}/{place.stored.name}"]
    trainer = finish(world)
    check_once(world, "r9")
    assert trainer.learner.digest() == undisturbed(world, "r9")
    for name in [n for n in world.blobs.objects if n.startswith("checkpoints/")]:
        del world.blobs.objects[name]
    again = start(world)
    assert again.run_id == "r9" and again.learner.digest() == trainer.learner.digest()


def test_a_checkpoint_that_was_being_written_ends_after_it():
    """The trainer that was left ends the one that it had begun: it says less than the new run's record does."""
    world = fed(9)
    left, place = gone_on(world)
    go_back(world, place, "r9")
    left._checkpoint()
    assert stands(world).places[-1].stored.run == left.run_id
    trainer = finish(world)
    assert trainer.run_id == "r9"
    check_once(world, "r9")
    assert trainer.learner.digest() == undisturbed(world, "r9")


def test_what_is_skipped_is_left_out_by_name():
    world = fed(8)
    _, place = gone_on(world)
    left_out = tuple(until(world.log.reader(), TOPICS.samples, place.manifest.meta.cursor, None))
    assert len(left_out) == PARTITIONS
    go_back(world, place, "r9", left_out=left_out)
    trainer = start(world)
    world.drain(trainer)
    assert trainer.learnt == 0
    last = samples_behind(world, 9)
    world.drain(trainer)
    trainer.close()
    assert trainer.learnt == last
    assert as_trained(SHORT, TOPICS, world.log.reader(), None, train=CONFIG).equal is True
    again = start(world)
    assert again.learner.digest() == trainer.learner.digest() and again.learnt == 0


def samples_behind(world: World, seed: int) -> int:
    """Append a record to each partition behind what there is; return how many samples."""
    for partition in range(PARTITIONS):
        end = ((COUNT - 1) // 3, (COUNT - 1) % 3)
        send(world.log, samples(seed, partition, 9, offset=COUNT), after=end)
    return 9 * PARTITIONS


class Numbered:
    """Calls of one process; one of them is the last, or fails."""

    def __init__(self, at: int, way: str) -> None:
        self.at, self.way, self.calls = at, way, 0

    def wrap(self, _who: str, inner: Any) -> Any:
        outer = self

        class Wrapped:
            def __getattr__(self, name: str) -> Any:
                target = getattr(inner, name)
                if not callable(target):
                    return target
                return lambda *args, **kwargs: outer.call(target, *args, **kwargs)

        return Wrapped()

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls != self.at:
            return target(*args, **kwargs)
        if self.way in ("dies after", "fails after"):
            target(*args, **kwargs)
        raise Killed if self.way.startswith("dies") else Unavailable("away")


WAYS = ("dies before", "dies after", "fails", "fails after")


def story(seed: int, at: int, way: str) -> tuple[World, Trainer, int, bool]:
    """Go back with a fault at one call of the verb; return what is left, its last trainer, and how many calls."""
    world = fed(seed)
    _, place = gone_on(world)
    numbered = Numbered(at, way)
    try:
        go_back(world, place, "r9", wrap=numbered.wrap)
        is_done = True
    except (Killed, Unavailable):
        is_done = False
    return world, finish(world), numbered.calls, is_done


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", range(1, 7))
def test_the_verb_dies_or_fails_at_any_call(at, way, late):
    world, trainer, calls, is_done = story(11, at, way)
    assert calls >= at
    has_begun = any(step.branch is not None for step in steps_of(world))
    assert has_begun or not is_done
    assert trainer.run_id == ("r9" if has_begun else stands(world).path[0].run)
    check_once(world, trainer.run_id)
    assert trainer.learner.digest() == undisturbed(world, trainer.run_id)
    assert len(decisions(world)) == has_begun
    assert late(world) == f"{trainer.run_id}-{trainer.learner.step}"


def begun(seed: int, at: int, way: str) -> tuple[World, Trainer, int]:
    """Go back; the trainer that begins then dies at one of its calls, and another one ends the work."""
    world = fed(seed)
    _, place = gone_on(world)
    with pytest.raises(Killed):
        go_back(world, place, "r9", wrap=Numbered(5, "dies before").wrap)
    numbered = Numbered(at, way)
    try:
        trainer = start(
            world,
            blobs=numbered.wrap("blobs", world.blobs),
            producer=numbered.wrap("producer", world.log.producer()),
            steps_writer=numbered.wrap("writer", FencedMemory(world.log, TOPICS.steps, f"steps-{MODEL}", world.epochs)),
        )
        turns(world, trainer, 4)
    except (Killed, Unavailable, InvariantBroken):
        pass
    return world, finish(world), numbered.calls


@pytest.mark.parametrize(
    "at", [n if n in (1, 9, 17, 26, 35) else pytest.param(n, marks=pytest.mark.long) for n in range(1, 46)]
)
@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_dies_or_fails_at_any_call_of_the_new_runs_beginning(at, way, late):
    world, trainer, calls = begun(12, at, way)
    assert trainer.run_id == "r9" and calls >= at
    check_once(world, "r9")
    assert trainer.learner.digest() == undisturbed(world, "r9")
    assert len(decisions(world)) == 1
    assert late(world) == f"r9-{trainer.learner.step}"


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 120))])
def test_going_back_at_any_time_any_number_of_times(seed, late):
    rng, world = Random(seed), fed(seed)
    trainer: Trainer | None = None
    backs = 0
    for _ in range(rng.randint(20, 60)):
        try:
            trainer = trainer or start(world)
            turns(world, trainer, 1)
        except InvariantBroken as error:
            assert "somebody asked for another run" in str(error)
            trainer = None
        places = stands(world).places
        if rng.random() < 0.15 and places:
            place = rng.choice(stands(world).on_path() if rng.random() < 0.7 else places)
            go_back(world, place, f"s{backs}")
            backs += 1
        if rng.random() < 0.1:
            trainer = None
    last = finish(world)
    if backs:
        assert last.run_id == f"s{backs - 1}"
    check_once(world, last.run_id)
    assert last.learner.digest() == undisturbed(world, last.run_id)
    assert late(world) == f"{last.run_id}-{last.learner.step}"
    assert as_trained(SHORT, TOPICS, world.log.reader(), None, train=CONFIG).equal is True
    assert [run[-1].run for run in _runs(steps_of(world))][-1] == last.run_id


def test_planted_steps_that_the_old_run_had_beyond_are_redone_is_seen(monkeypatch):
    def all_of_it(steps: Any, path: Any, run: str, step: int) -> list[Step]:
        return [each for each in steps if each.branch is None and each.step > step]

    monkeypatch.setattr(recovery, "behind", all_of_it)
    monkeypatch.setattr(recovery, "lineage", lambda steps, run: list(steps))
    world = fed(13)
    left, place = gone_on(world)
    go_back(world, place, "r9")
    trainer = start(world)
    assert trainer.learner.step >= left.learner.step > place.stored.step
    assert trainer.learner.digest() != undisturbed(world, "r9")


def test_planted_a_decision_that_is_forgotten_is_seen(monkeypatch, late):
    monkeypatch.setattr(rollback, "decision_of", lambda first: None)
    world = fed(14)
    left, place = gone_on(world)
    go_back(world, place, "r9")
    assert late(world).startswith(left.run_id)


@pytest.mark.parametrize("seed", [1, 2])
def test_back_into_the_lake(seed, late):
    """A checkpoint in the middle of the lake: the new run learns the rest of it, and is published at once."""
    world = World(lake=lake_of(seed, 4, COUNT))
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)
    left = start(world)
    turns(world, left, 12)
    place = next(p for p in stands(world).on_path() if p.manifest.meta.cursor.lake_version >= 0)
    world.drain(left)
    assert place.stored.step < left.learner.step and not left.source.is_stored
    go_back(world, place, "r9")
    trainer = start(world)
    assert trainer.source.is_stored and late(world) == f"r9-{place.stored.step}"
    world.drain(trainer)
    trainer.close()
    taken = [r for step in lineage(steps_of(world), "r9") for r in step.ranges]
    assert sum(r.rows for r in taken) == COUNT * PARTITIONS
    assert late(world) == f"r9-{trainer.learner.step}"
    assert as_trained(SHORT, TOPICS, world.log.reader(), world.lake, train=CONFIG).equal is True
