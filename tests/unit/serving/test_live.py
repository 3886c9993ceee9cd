"""Goal: serving follows the chain, and what the gate refuses changes nothing. Method: a publisher on a memory log."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from serving_world import KEYS, PROJECT, RECIPE, SPEC, TOPICS, Trainer, World, weights_of

from headrace.backends.log.memory import MemoryReader
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.snapshot import Weights
from headrace.contract.spec import Categorical, FeatureSpec
from headrace.serving.model.shared_region import Meta, SharedModel, View


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def begun(world: World, steps: int = 3) -> tuple[Trainer, Random]:
    """Publish a snapshot and some deltas, and let serving take them."""
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    for _ in range(steps):
        trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version
    return trainer, rng


def test_a_delta_a_version_and_each_is_exact(world: World):
    trainer, rng = begun(world)
    for _ in range(20):
        trainer.delta(trainer.learn(rng))
        world.follow(1)
        assert world.version == trainer.version
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))
    assert world.metrics.counters["swaps_total", ""] == 24
    assert len(world.metrics.observations["swap_seconds"]) == 24


def test_a_clock_that_is_set_back_hides_no_old_model(world: World, monkeypatch: pytest.MonkeyPatch):
    begun(world)
    now_ms = world.clock.now_ms
    monkeypatch.setattr(world.clock, "now_ms", lambda: now_ms() - 86_400_000)
    world.clock.advance(1_000.0)
    world.updater.watch()
    assert world.metrics.gauges["model_age_seconds", ""] == pytest.approx(1_000)


def test_a_newer_snapshot_of_the_chain_is_not_loaded(world: World):
    trainer, rng = begun(world)
    trainer.delta(trainer.learn(rng))
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version and world.shared.meta().snapshot == "a-1"


def test_a_new_region_begins_with_the_newest_snapshot(world: World):
    trainer, rng = begun(world)
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.shared = SharedModel(world.shared.path, dim=RECIPE.dim, rows_max=1_000, create=True)
    world.updater = world.new_updater()
    world.follow()
    assert world.version == trainer.version and world.shared.meta().snapshot == "a-4"


def test_a_lost_delta_is_healed_by_the_next_snapshot(world: World):
    trainer, rng = begun(world)
    trainer.learn(rng)
    trainer.base = trainer.version  # the delta to it was lost
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-4", "a delta with another base is not applied"
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    # Never idle: the switch must not wait for a moment without deltas.
    world.updater.step(0.0)
    world.updater.step(0.0)
    assert world.version == trainer.version and world.shared.meta().snapshot == "a-6"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))


@pytest.mark.parametrize("deltas", [0, 1, 9])
@pytest.mark.parametrize("topics", [[TOPICS.deltas], [TOPICS.model], [TOPICS.model, TOPICS.deltas]])
def test_topics_that_are_made_anew_are_healed_by_the_next_snapshot(world: World, topics: list[str], deltas: int):
    """No id is needed: a delta has its base, a snapshot its chain, and the version that is served stays meanwhile."""
    trainer, rng = begun(world)
    for topic in topics:
        world.log.delete(topic)
    world.log.admin().ensure_topics(TOPICS.specs(2))
    served = world.version
    for _ in range(deltas):
        trainer.delta(trainer.learn(rng))
    for _ in range(3):
        world.follow()
        assert int(world.version.rpartition("-")[2]) >= int(served.rpartition("-")[2])
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(world.version))
    trainer.learn(rng)
    trainer.base = trainer.version
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow(8)
    assert world.version == trainer.version
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))


def test_another_run_takes_over(world: World):
    begun(world)
    other, rng = Trainer(world, run="b"), Random(5)
    other.learn(rng)
    other.snapshot()
    other.delta(other.learn(rng))
    world.follow()
    assert world.version == "b-2"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("b-2"))


def test_a_restarted_trainer_of_the_same_run_goes_on(world: World):
    trainer, rng = begun(world)
    trainer.snapshot()  # what a trainer does first: the version that is already served
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version == "a-5"


def test_a_store_that_is_away_is_asked_again(world: World):
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    world.blobs.is_away = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            world.updater.step(0.0)
    world.blobs.is_away = False
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version


def test_deltas_that_retention_took_begin_reading_again(world: World):
    trainer, rng = begun(world)
    trainer.delta(trainer.learn(rng))
    trainer.delta(trainer.learn(rng))
    trainer.snapshot()
    world.log.trim(TOPICS.deltas, 0, 5)
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version
    assert world.metrics.counters["gap_total", "deltas"] == 1


class AwayAtTimes(MemoryReader):
    """Raises on every third poll, losing nothing."""

    polls = 0

    def poll(self, records_max, timeout_s):
        self.polls += 1
        if self.polls % 3 == 0:
            raise Unavailable("no broker")
        return super().poll(2, timeout_s)


@pytest.mark.parametrize("seed", range(10))
def test_a_broker_that_comes_and_goes_changes_nothing(world: World, seed: int):
    rng = Random(seed)
    trainer = Trainer(world)
    world.updater.reader = AwayAtTimes(world.log)
    trainer.learn(rng)
    trainer.snapshot()
    seen = set()
    for _ in range(30):
        weights = trainer.learn(rng)
        if rng.random() < 0.1:
            trainer.base, trainer.chain = "", ""  # lost
            trainer.snapshot()
        else:
            trainer.delta(weights)
        for _ in range(rng.randint(0, 3)):
            try:
                world.updater.step(0.0)
            except Unavailable:
                continue
            seen.add(world.version)
            np.testing.assert_array_equal(world.served_rows(), world.expected_rows(world.version))
    for _ in range(60):
        try:
            world.updater.step(0.0)
        except Unavailable:
            continue
    assert world.version == trainer.version and len(seen) > 3


def bad_values(weights: Weights) -> Weights:
    values = weights.values_KV.copy()
    values[0, 1] = np.inf
    return Weights(weights.keys_K, values, weights.dense)


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("not_finite", bad_values),
        ("not_finite", lambda w: Weights(w.keys_K, w.values_KV, w.dense | {"bias": np.array([np.nan], np.float32)})),
        ("dim", lambda w: Weights(w.keys_K, w.values_KV[:, :3].copy(), w.dense)),
        ("dense", lambda w: Weights(w.keys_K, w.values_KV, {"bias": w.dense["bias"]})),
    ],
)
def test_a_bad_delta_is_refused_with_its_reason(world: World, reason, spoil):
    trainer, rng = begun(world)
    before = world.served_rows()
    trainer.delta(spoil(trainer.learn(rng)))
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-4"
    np.testing.assert_array_equal(world.served_rows(), before)
    assert world.shared.refused().startswith(f"{reason}: ") and world.metrics.counters["errors_total", reason] == 1
    trainer.snapshot()
    world.follow()
    assert world.version == trainer.version and world.shared.refused() == ""


def test_a_damaged_delta_is_refused(world: World):
    trainer, rng = begun(world)
    trainer.learn(rng)
    world.log.append(TOPICS.deltas, 0, b"\x00" * 90, b"small", {"version": "a-5", "base": "a-4"})
    world.follow()
    assert world.version == "a-4" and world.shared.refused().startswith("damaged: ")


OTHER_SPEC = msgspec.json.encode(FeatureSpec(features=(Categorical(field="colour"),))).decode()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("sha256", {"sha256": "0" * 64}),
        ("recipe", {"recipe_json": '{"model":"transformer"}'}),
        ("recipe", {"recipe_json": "{"}),
        ("spec", {"spec_json": OTHER_SPEC}),
        ("version", {"version": "a-77", "step": 77}),
        ("dense", {"recipe_json": msgspec.json.encode(msgspec.structs.replace(RECIPE, hidden=(9,))).decode()}),
    ],
)
def test_a_bad_snapshot_is_refused_once_and_the_served_one_stays(world: World, reason, changes):
    trainer, rng = begun(world)
    other = Trainer(world, run="b")
    other.learn(rng)
    manifest = other.snapshot(**changes)
    world.follow()
    assert world.version == trainer.version
    assert world.shared.refused().startswith(f"{reason}: ")
    assert world.metrics.counters["errors_total", reason] == 1, manifest
    other.learn(rng)
    other.snapshot()
    world.follow()
    assert world.version == "b-2" and world.shared.refused() == ""


def test_a_missing_blob_is_refused(world: World):
    trainer, rng = begun(world)
    other = Trainer(world, run="b")
    other.learn(rng)
    world.blobs.delete(other.snapshot().blob)
    world.follow()
    assert world.version == trainer.version and world.shared.refused().startswith("no_blob: ")


def test_other_models_are_left_alone(world: World):
    begun(world)
    world.log.append(TOPICS.deltas, 0, b"not ours", b"other", {"version": "x-1", "base": "a-4"})
    world.log.append(TOPICS.model, 0, None, b"other/snapshot", {})
    world.follow()
    assert world.version == "a-4" and world.shared.refused() == ""


def test_a_write_that_broke_off_is_never_written_on(tmp_path: Path):
    class Breaks(SharedModel):
        def _put(self, copy: int, weights: Weights, meta: Meta) -> None:
            if meta.manifest.step == 2:
                raise MemoryError
            super()._put(copy, weights, meta)

    world = World(tmp_path)
    world.shared = Breaks(tmp_path / "other", dim=RECIPE.dim, rows_max=100, create=True)
    world.updater = world.new_updater()
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot()
    world.follow()
    trainer.delta(trainer.learn(rng))
    with pytest.raises(MemoryError):
        world.follow()
    assert world.version == "a-1", "the copy that readers have is whole"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-1"))
    with pytest.raises(InvariantBroken, match="restart `serve`"):
        world.shared.apply_delta(weights_of("a", 3), world.shared.meta())


def test_lookup_gives_unknown_keys_their_first_values(world: World):
    from headrace.trainer.model.tables.table import initial_values

    begun(world)
    unknown = np.array([12345, -9], np.int64)
    rows, _ = world.shared.read(lambda view: View.lookup(view, unknown, seed=7, scale=0.01))
    np.testing.assert_array_equal(rows, initial_values(unknown, dim=RECIPE.dim, seed=7, scale=0.01))
    assert len(KEYS) == 40 and PROJECT.features is SPEC
