"""Goal: two trainers of one model hand it over once and do not take turns.

Method: trainers of several names over one world; each that dies is started again at once, as a supervisor does. What is
counted is how often the writer of the steps changes hands.
"""

from __future__ import annotations

import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, send

from headrace.cli.stages.train import lock_home
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.claim import SUPERSEDED_MAX, read_claim, release_claim, take_claim
from headrace.trainer.run import Trainer


def start(world: World, name: str, **changes: object) -> Trainer:
    trainer = Trainer(world.deps(name=name, **changes))
    trainer.recover()
    return trainer


def test_two_supervised_trainers_do_not_take_turns():
    """The second one learns on; the first one stops, refuses to come back, and both times names the other."""
    world = World()
    running: dict[str, Trainer | None] = {"first": None, "second": None}
    refused: dict[str, list[str]] = {name: [] for name in running}
    for partition in range(PARTITIONS):
        for rows, after in cut(7, partition, COUNT):
            send(world.log, rows, after=after)
            for name, trainer in running.items():
                try:
                    trainer = trainer or start(world, name)
                    for _ in range(3):
                        trainer.turn()
                        world.clock.advance(0.02)
                except (InvariantBroken, ConfigRejected) as error:
                    refused[name].append(str(error))
                    trainer = None
                running[name] = trainer
    assert running["first"] is None and refused["second"] == []
    assert "Trainer second has the model." in refused["first"][0]
    assert len(refused["first"]) > 2
    assert all("trainer second took model 'small' over" in each for each in refused["first"][1:])
    assert world.epochs.newest[f"steps-{PROJECT.name}"] == 2
    second = running["second"]
    assert second is not None
    world.drain(second)
    second.close()
    assert as_trained(PROJECT, TOPICS, world.log.reader(), None).rows == PARTITIONS * COUNT


def test_a_trainer_comes_back_when_the_other_has_let_go():
    world = World()
    start(world, "first")
    second = start(world, "second")
    with pytest.raises(ConfigRejected, match="--take-over"):
        start(world, "first")
    second.close()
    start(world, "first").close()
    start(world, "second").close()


def test_a_trainer_takes_over_by_force_from_one_that_is_gone():
    world = World()
    start(world, "first")
    start(world, "second")
    start(world, "first", take_over=True)
    with pytest.raises(ConfigRejected, match="trainer first took model"):
        start(world, "second")


def test_a_trainer_that_is_killed_comes_back_under_its_name():
    world = World()
    for _ in range(3):
        start(world, "first")
    assert read_claim(world.blobs, PROJECT.name).superseded == ()


def test_one_that_was_superseded_lets_go_of_nothing():
    world = World()
    start(world, "first")
    start(world, "second")
    release_claim(world.blobs, PROJECT.name, "first")
    claim = read_claim(world.blobs, PROJECT.name)
    assert claim is not None and claim.holder == "second" and not claim.is_released


def test_names_that_are_remembered_are_bounded():
    world = World()
    for number in range(2 * SUPERSEDED_MAX):
        take_claim(world.blobs, "m", f"t{number}")
    claim = read_claim(world.blobs, "m")
    assert claim is not None and len(claim.superseded) == SUPERSEDED_MAX and claim.superseded[0] == "t30"


def test_a_claim_that_is_no_claim_is_written_anew():
    world = World()
    world.blobs.put("trainers/m", b"damaged")
    take_claim(world.blobs, "m", "t")
    claim = read_claim(world.blobs, "m")
    assert claim is not None and claim.holder == "t"


def test_a_second_trainer_in_one_home_is_refused(tmp_path):
    with lock_home(tmp_path, "m"):
        lock_home(tmp_path, "other").close()
        with pytest.raises(ConfigRejected, match="trains model 'm' from"):
            lock_home(tmp_path, "m")
    lock_home(tmp_path, "m").close()
