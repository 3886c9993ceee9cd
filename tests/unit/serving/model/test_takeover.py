"""Goal: a restarted stage serves at once what the one before it served, and only what is whole and its own.
Method: regions that a writer left at each point of a write, or that are of something else; a store that is away."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from serving_world import PROJECT, RECIPE, TOPICS, Trainer, World

from headrace.contract.formats.snapshot import Weights
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.serving.gate.admit import can_serve
from headrace.serving.model import region_layout
from headrace.serving.model.region_file import open_region
from headrace.serving.model.shared_region import Meta, SharedModel


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def begun(world: World) -> tuple[Trainer, Random]:
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    for _ in range(3):
        trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version
    return trainer, rng


def restarted(world: World, **changes: object) -> SharedModel:
    """Return the region as the next stage opens it."""
    if world.shared.lock >= 0:
        os.close(world.shared.lock)
    project = msgspec.structs.replace(PROJECT, **changes)
    world.shared = open_region(
        world.shared.path, dim=RECIPE.dim, rows_max=1_000, is_good=partial(can_serve, project=project), wait_s=0.0
    )
    world.updater = world.new_updater()
    return world.shared


def test_with_the_store_away_a_restarted_stage_serves_and_follows_on(world: World):
    trainer, rng = begun(world)
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    trainer.delta(trainer.learn(rng))
    world.blobs.is_away = True
    shared = restarted(world)
    assert shared.meta().manifest.version == "a-4", "at once"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-4"))
    for _ in range(5):
        world.follow(1)
        assert world.version == trainer.version
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))
        trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version


def test_what_retention_took_meanwhile_is_healed_by_the_newest_snapshot(world: World):
    trainer, rng = begun(world)
    for _ in range(3):
        trainer.delta(trainer.learn(rng))
    trainer.snapshot()
    world.log.trim(TOPICS.deltas, 0, 6)
    trainer.delta(trainer.learn(rng))
    restarted(world)
    world.follow()
    assert world.version == trainer.version
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))


@pytest.mark.parametrize("writes", range(2))
def test_a_writer_that_died_within_a_write_leaves_one_whole_version(world: World, writes: int):
    trainer, rng = begun(world)

    class Dies(SharedModel):
        left = writes

        def _put(self, copy: int, weights: Weights, meta: Meta) -> None:
            if self.left == 0:
                self._region.values[copy][:] = np.nan
                self._region.index[copy][:] = 7
                self._region.meta[copy][:99] = 0
                raise KeyboardInterrupt
            self.left -= 1
            super()._put(copy, weights, meta)

    world.shared = Dies(world.shared.path, dim=RECIPE.dim, rows_max=1_000)
    world.updater.shared = world.shared
    trainer.delta(trainer.learn(rng))
    with pytest.raises(KeyboardInterrupt):
        world.follow()
    shared = restarted(world)
    assert shared.meta().manifest.version == ("a-4", "a-5")[writes]
    for _ in range(2):
        world.follow()
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-5"))
        trainer.delta(trainer.learn(rng))
        world.follow()
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))
        break


def spoilt(word: int, value: int) -> Callable[[SharedModel], None]:
    def spoil(shared: SharedModel) -> None:
        shared._region.head[word] = value

    return spoil


def other_file(shared: SharedModel) -> None:
    with open(shared.path, "r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    "spoil",
    [
        spoilt(region_layout._LAYOUT, 1), spoilt(region_layout._BOOT, 5), spoilt(region_layout._DIM, 9),
        spoilt(region_layout._ROWS_MAX, 9), spoilt(region_layout._ACTIVE, 7), spoilt(region_layout._META_SIZE, 3),
        spoilt(region_layout._SEQ + 0, 7), spoilt(region_layout._SEQ + 0, 0), spoilt(region_layout._ROWS + 0, 2_000),
        other_file, lambda shared: shared.path.chmod(0o666), lambda shared: shared.path.unlink(),
    ],
)  # fmt: skip
def test_what_is_not_whole_or_not_ours_is_begun_anew(world: World, spoil: Callable[[SharedModel], None]):
    trainer, _ = begun(world)
    world.shared._region.head[region_layout._ACTIVE] = 0
    spoil(world.shared)
    assert not restarted(world).holds_model
    world.follow()
    assert world.version == trainer.version


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"impression": msgspec.structs.replace(PROJECT.impression, fields={"user": "int64"})},
    ],
)
def test_a_model_that_this_project_cannot_serve_is_not_taken_over(world: World, changes: dict[str, object]):
    begun(world)
    assert not restarted(world, **changes).holds_model


def test_another_spec_that_the_project_has_now_is_served_until_its_own_model_comes(world: World):
    begun(world)
    assert restarted(world, features=FeatureSpec(features=(Categorical(field="item"),))).holds_model


def test_a_region_that_is_still_in_use_is_left_to_its_owners(world: World):
    begun(world)
    with open(world.shared.path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        old = world.shared
        assert not restarted(world).holds_model
        assert old.meta().manifest.version == "a-4", "its processes go on"
