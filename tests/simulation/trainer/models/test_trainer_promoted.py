"""Goal: serving follows the model that was decided for, and each version that it serves is one model's, whatever dies.

Method: two trainers of one project and a server, in one log and one store, from a seed. Decisions come at any moment;
the server is killed in the middle of a swap, or started anew with its region or without one. A checker compares each
version that is served with the learner that made it. Planted bugs must be seen.
"""

from __future__ import annotations

import threading
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from beside_world import BESIDE, CONFIG, VIEWS, begun, fill, new_world, promote
from trainer_world import PROJECT, TOPICS, Killed, World

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.snapshot import as_served
from headrace.serving.gate.admit import can_serve
from headrace.serving.model.scorer import recipe_of
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.trainer.run import Trainer

ROWS_MAX = 500


class Server:
    """One replica of a project with a variant."""

    def __init__(self, world: World, folder: Path, *, dim: int = BESIDE.row_dim) -> None:
        self.world, self.path, self.dim, self.metrics = world, folder / "m", dim, MemoryMetrics()
        self.models: dict[str, tuple[str, dict[int, np.ndarray], dict[str, np.ndarray]]] = {}
        self.dies_in = -1
        self.restart(keeps_region=False)

    def restart(self, *, keeps_region: bool) -> None:
        self.shared = SharedModel(self.path, dim=self.dim, rows_max=ROWS_MAX, create=not keeps_region)
        if keeps_region and not self.shared.take_over(lambda meta: can_serve(meta, BESIDE)):
            self.shared = SharedModel(self.path, dim=self.dim, rows_max=ROWS_MAX, create=True)
        write = self.shared._write_copy

        def write_copy(copy: int, act: object) -> None:
            self.dies_in -= 1
            if self.dies_in == 0:
                self.shared._region.head[1 + copy] += 1  # Left odd, as by a writer that was killed.
                raise Killed
            write(copy, act)  # type: ignore[arg-type]

        self.shared._write_copy = write_copy  # type: ignore[method-assign]
        self.updater = Updater(
            project=BESIDE, topics=TOPICS, shared=self.shared, reader=self.world.log.reader(),
            blobs=self.world.blobs, metrics=self.metrics, clock=self.world.clock, stop=threading.Event(),
        )  # fmt: skip

    def watch(self, trainer: Trainer) -> Trainer:
        """Remember what the learner holds now and after each step."""
        apply = trainer._apply

        def applied(step: object) -> None:
            apply(step)  # type: ignore[arg-type]
            self.note(trainer)

        trainer._apply = applied  # type: ignore[method-assign]
        self.note(trainer)
        return trainer

    def note(self, trainer: Trainer) -> None:
        """Remember what a learner holds now, as it is to be served."""
        weights = trainer.learner.weights()
        rows = dict(zip(weights.keys_K.tolist(), as_served(weights.values_KV, "float32"), strict=True))
        version = f"{trainer.run_id}-{trainer.learner.step}"
        self.models[version] = trainer.project.model, rows, weights.dense

    def follow(self) -> str:
        """Take what has come, and compare; return the model that is served."""
        try:
            self.updater.step(0.0)
        except Killed:
            self.restart(keeps_region=True)
        if not self.shared.holds_model:
            return ""
        meta = self.shared.meta()
        model, rows, dense = self.models[meta.manifest.version]
        assert model == meta.manifest.model
        recipe, keys = recipe_of(meta.recipe_json), np.array(sorted(rows), np.int64)
        found, found_dense = self.shared.read(
            lambda view: (
                view.lookup(keys, seed=recipe.seed, scale=recipe.row_scale, dim=recipe.row_dim), view.dense()
            )
        )[0]  # fmt: skip
        for key, values in zip(keys.tolist(), found, strict=True):
            np.testing.assert_array_equal(values, rows[key])
        assert all((found_dense[name] == array).all() for name, array in dense.items())
        assert set(self.shared.held().keys_R.tolist()) <= set(rows)
        return model

    @property
    def wrong(self) -> float:
        return self.metrics.total("replica_digest_wrong_total") + self.metrics.total("versions_refused_total")


def story(seed: int, folder: Path) -> None:
    rng, world = Random(seed), new_world(seed)
    server = Server(world, folder)
    coming = fill(world, seed, 14)
    next(coming)
    config = msgspec.structs.replace(CONFIG, steps_moved=0)
    trainers = {variant: server.watch(begun(world, variant, config=config)) for variant in VIEWS}
    decided, at_ms, seen, left = "small", 0, set[str](), 3
    for turn in range(90):
        for trainer in trainers.values():
            trainer.turn()
        world.clock.advance(rng.choice((0.02, 0.11, 0.3)))
        if rng.random() < 0.4:
            next(coming, None)
        if rng.random() < 0.15 and turn > 20:
            decided, at_ms = rng.choice([view.model for view in VIEWS.values()]), at_ms + 1
            promote(world, decided.partition(".")[2], at_ms)
            left = 4
            server.dies_in = rng.choice((-1, 1, 2, 3))
        if rng.random() < 0.08:
            server.restart(keeps_region=rng.random() < 0.5)
            left = 4
        model, left = server.follow(), left - 1
        seen.add(model)
        assert left > 0 or model == decided, f"{model} is served, and {decided} was decided for"
    assert seen >= {"small", "small.deep"} and server.wrong == 0


@pytest.mark.parametrize("seed", range(2))
def test_serving_follows_the_decision_whatever_dies(tmp_path: Path, seed: int):
    story(seed, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 160))
def test_serving_follows_the_decision_whatever_dies_long(tmp_path: Path, seed: int):
    story(seed, tmp_path)


def both(seed: int, folder: Path, *, dim: int = BESIDE.row_dim) -> tuple[World, Server, dict[str, Trainer]]:
    """Return a world in which both models are published and live, and a server of it that has taken nothing yet."""
    world = new_world(seed)
    coming, server = fill(world, seed, 14), Server(world, folder, dim=dim)
    next(coming)
    trainers = {variant: server.watch(begun(world, variant)) for variant in VIEWS}
    for trainer in trainers.values():
        world.drain(trainer)
    return world, server, trainers


def test_a_server_that_starts_late_serves_the_same(tmp_path: Path):
    world, first, _ = both(1, tmp_path)
    assert first.follow() == "small"
    promote(world, "deep", 1)
    assert first.follow() == "small.deep"
    (tmp_path / "late").mkdir()
    late = Server(world, tmp_path / "late")
    late.models = first.models
    assert late.follow() == "small.deep"
    promote(world, "", 2)
    assert (first.follow(), late.follow()) == ("small", "small")


def test_a_variant_that_does_not_fit_leaves_the_served_model_fresh(tmp_path: Path):
    """A decision that no verb looked at first: rows are wider than the region."""
    world, server, trainers = both(2, tmp_path, dim=PROJECT.recipe.row_dim)
    server.updater.project = PROJECT
    assert server.follow() == "small"
    promote(world, "deep", 1)
    assert server.follow() == "small" and "room for" in server.shared.refused()
    before = server.shared.meta().manifest.step
    for _ in fill(world, 12, 30):
        pass
    for _ in range(20):
        for trainer in trainers.values():
            trainer.turn()
        world.clock.advance(0.2)
        assert server.follow() == "small"
    assert server.shared.meta().manifest.step > before, "its deltas are read on"


def test_a_damaged_decision_and_one_of_another_project_change_nothing(tmp_path: Path):
    world, server, _ = both(3, tmp_path)
    assert server.follow() == "small"
    world.log.append(TOPICS.model, 0, b"\xff", b"small/decision/1", {"kind": "decision"})
    value = b'{"model": "other", "what": "promote", "variant": "deep"}'
    world.log.append(TOPICS.model, 0, value, b"other/decision/1", {"kind": "decision"})
    assert server.follow() == "small"


# -- planted bugs


def test_a_server_that_forgets_the_decision_at_its_start_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begin = Updater._begin

    def forgets(self: Updater) -> None:
        note, self._note_decision = self._note_decision, lambda decision: None  # type: ignore[method-assign]
        begin(self)
        self._note_decision = note  # type: ignore[method-assign]

    monkeypatch.setattr(Updater, "_begin", forgets)
    with pytest.raises(AssertionError, match="was decided for"):
        for seed in range(4):
            story(seed, tmp_path)
