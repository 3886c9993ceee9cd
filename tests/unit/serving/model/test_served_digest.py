"""Goal: a replica that serves something else than the trainer says finds it out, says so, and heals with a snapshot.
Method: deltas that skip, lack or keep what they should not; memory that changes; both formats; a later one."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from serving_world import RECIPE, TOPICS, Client, Trainer, World

from headrace.contract.formats.snapshot import Weights
from headrace.serving.api.app import make_app
from headrace.serving.model.shared_region import SharedModel


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def begun(world: World, **changes: int) -> tuple[Trainer, Random]:
    trainer, rng = Trainer(world), Random(1)
    trainer.learn(rng)
    trainer.snapshot(**changes)
    for _ in range(3):
        trainer.delta(trainer.learn(rng), **changes)
    world.follow()
    assert world.version == trainer.version and wrong(world) == 0
    return trainer, rng


def wrong(world: World) -> float:
    return world.metrics.counters.get(("replica_digest_wrong_total", ""), 0)


def lacks_a_row(weights: Weights) -> Weights:
    return Weights(weights.keys_K[1:], weights.values_KV[1:], weights.dense)


def removes_too_much(weights: Weights) -> Weights:
    gone = np.array([key for key in _known if key not in weights.keys_K][:1], np.int64)
    return Weights(weights.keys_K, weights.values_KV, weights.dense, gone)


_known: list[int] = []


@pytest.mark.parametrize("spoil", [lacks_a_row, removes_too_much])
def test_a_delta_that_leads_elsewhere_is_refused_and_the_next_snapshot_heals(world: World, spoil):
    trainer, rng = begun(world)
    _known[:] = list(trainer.rows)
    before = world.served_rows()
    trainer.delta(spoil(trainer.learn(rng)))
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-4" and wrong(world) == 1
    np.testing.assert_array_equal(world.served_rows(), before)
    assert world.shared.refused().startswith("digest: a-5 would be served with digest ")
    assert world.metrics.counters["versions_refused_total", "digest"] == 1
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == trainer.version and wrong(world) == 1
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))


def test_a_delta_that_was_skipped_here_is_found_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch):
    """The planted bug: the region says that it has the version, and its rows are those of before."""
    trainer, rng = begun(world)
    put = SharedModel._put

    def without_rows(self: SharedModel, copy: int, weights: Weights, meta) -> None:
        put(self, copy, Weights(weights.keys_K[:0], weights.values_KV[:0], weights.dense), meta)

    monkeypatch.setattr(SharedModel, "_put", without_rows)
    skipped = trainer.learn(rng)
    trainer.delta(skipped)
    world.follow()
    assert world.version == "a-5"
    monkeypatch.setattr(SharedModel, "_put", put)
    trainer.step += 1
    again = Weights(skipped.keys_K, skipped.values_KV + 1, skipped.dense)
    trainer.rows.update(zip(again.keys_K.tolist(), again.values_KV, strict=True))
    world.models[trainer.version] = dict(trainer.rows), again.dense
    trainer.delta(again)
    world.follow()
    assert world.version == "a-5" and wrong(world) == 1
    trainer.snapshot()
    world.follow()
    assert world.version == "a-6" and wrong(world) == 1
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-6"))


def test_memory_that_changed_is_found_when_a_snapshot_is_announced(world: World):
    trainer, rng = begun(world)
    trainer.snapshot()
    world.follow()
    assert wrong(world) == 0
    trainer.delta(trainer.learn(rng))
    world.follow()
    world.shared.held().values_RV[0, 2] += 1
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow(8)
    assert wrong(world) == 1 and world.version == trainer.version == "a-6"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-6"))
    assert world.shared.meta().snapshot == "a-5", "loaded though it led back"


def test_a_snapshot_that_deltas_did_not_lead_to_is_loaded(world: World):
    """The trainer forgot a row in all its deltas: their digests agree, and the snapshot's is another."""
    trainer, rng = begun(world)
    forgotten = trainer.learn(rng)
    known = world.models["a-4"]
    world.models[trainer.version] = known[0], forgotten.dense
    trainer.delta(Weights(forgotten.keys_K[:0], forgotten.values_KV[:0], forgotten.dense))
    world.follow()
    assert world.version == "a-5" and wrong(world) == 0
    world.models[trainer.version] = dict(trainer.rows), forgotten.dense
    trainer.snapshot()
    trainer.delta(trainer.learn(rng))
    world.follow(8)
    assert wrong(world) == 1 and world.version == "a-6"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-6"))


def test_a_region_that_is_taken_over_is_summed(world: World):
    trainer, rng = begun(world)
    world.updater = world.new_updater()
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-5" and wrong(world) == 0
    world.shared.held().values_RV[1, 1] += 1
    world.updater = world.new_updater()
    world.follow()
    assert wrong(world) == 1 and world.version == "a-5", "by the snapshot and its deltas"
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-5"))


def test_a_trainer_of_the_release_before_is_followed_and_one_of_this_takes_over(world: World):
    trainer, rng = begun(world, format=1)
    trainer.snapshot()
    for _ in range(3):
        trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-7" and wrong(world) == 0
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-7"))
    assert sum(n for (name, _), n in world.metrics.counters.items() if name == "versions_refused_total") == 0


def test_a_later_format_is_refused_with_words(world: World):
    trainer, rng = begun(world)
    trainer.learn(rng)
    later = trainer.snapshot(format=3)
    world.updater._is_broken = True
    world.follow()
    assert world.version == "a-4" and world.metrics.counters["versions_refused_total", "format"] == 1
    assert "is of format 3" in world.shared.refused() and "reads formats 1 to 2" in world.shared.refused()
    assert later.version == "a-5"


def test_rows_that_travel_otherwise_are_taken_from_the_snapshot_on(world: World):
    """The trainer was restarted with another `train.publish_values` at the version that is served."""
    trainer, rng = begun(world)
    trainer.rows = {key: row.astype(np.float16).astype(np.float32) for key, row in trainer.rows.items()}
    world.models[trainer.version] = dict(trainer.rows), world.models[trainer.version][1]
    trainer.snapshot(rows="float16")
    weights = trainer.learn(rng)
    halves = weights.values_KV.astype(np.float16).astype(np.float32)
    trainer.rows.update(zip(weights.keys_K.tolist(), halves, strict=True))
    world.models[trainer.version] = dict(trainer.rows), weights.dense
    trainer.delta(Weights(weights.keys_K, halves, weights.dense), rows="float16")
    world.follow(8)
    assert world.version == "a-5" and world.shared.meta().manifest.rows == "float16" and wrong(world) == 0
    np.testing.assert_array_equal(world.served_rows(), world.expected_rows("a-5"))
    assert world.shared.meta().snapshot == "a-4"


def test_the_page_of_the_model_names_chain_number_and_digest(world: World):
    trainer, _ = begun(world)
    said = Client(make_app(world.app)).get("/v1/model").json()
    assert (said["chain"], said["seq"], said["served_digest"]) == ("a-1", 3, trainer.served())
    assert said["format"] == 2 and said["rows"] == "float32"


def test_an_old_region_without_sums_is_taken_over(world: World):
    trainer, rng = begun(world, format=1)
    meta = world.shared.meta()
    manifest = msgspec.structs.replace(meta.manifest, served="")
    nothing = Weights(np.empty(0, np.int64), np.empty((0, 1 + RECIPE.dim), np.float32), {})
    plain = msgspec.structs.replace(meta, manifest=manifest, held=None, dense_sha256="")
    world.shared.apply_delta(nothing, plain)
    world.updater = world.new_updater()
    trainer.delta(trainer.learn(rng))
    world.follow()
    assert world.version == "a-5" and wrong(world) == 0 and world.shared.meta().held is not None
    assert len(world.log.partitions(TOPICS.deltas)[0]) == 4
