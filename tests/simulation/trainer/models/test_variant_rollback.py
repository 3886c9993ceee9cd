"""Goal: one of a project's models goes back, by the verb, and the others go on as if nothing was.

Method: two trainers and a server in memory, with the runtime of the verb over them.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from beside_world import BESIDE, VIEWS, begun, fill, new_world, promote, replayed, steps_of, topics_of
from trainer_world import TOPICS, World

from headrace.backends.log.fenced_memory import FencedMemory
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.cli.main import main
from headrace.cli.runtime import Runtime
from headrace.cli.tools.models import rollback as verb
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.trainer.commit.decisions import read_decisions
from headrace.trainer.commit.standing import standing_of
from headrace.trainer.run import Trainer


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a world in which both models are live, with the verb's runtime over it."""
    found = new_world(4)
    runtime = Runtime(
        project=BESIDE, topics=TOPICS, config=Config(), port_base=None, home=tmp_path, brokers="", store="",
        webhdfs=None, project_dir=tmp_path,
    )  # fmt: skip
    object.__setattr__(runtime, "clock", found.clock)
    monkeypatch.setattr(Runtime, "require_kafka", lambda runtime: None)
    monkeypatch.setattr(Runtime, "reader", lambda runtime: found.log.reader())
    monkeypatch.setattr(Runtime, "admin", lambda runtime: found.log.admin())
    monkeypatch.setattr(Runtime, "producer", lambda runtime: found.log.producer())
    monkeypatch.setattr(Runtime, "blobs", lambda runtime: found.blobs)
    monkeypatch.setattr(
        Runtime, "fenced", lambda runtime, topic, name: FencedMemory(found.log, topic, name, found.epochs)
    )
    monkeypatch.setattr(verb, "open_runtime", lambda args: runtime)
    return found


def server_of(world: World, folder: Path) -> Updater:
    folder.mkdir()
    return Updater(
        project=BESIDE, topics=TOPICS, shared=SharedModel(folder / "m", dim=BESIDE.row_dim, rows_max=500, create=True),
        reader=world.log.reader(), blobs=world.blobs, metrics=MemoryMetrics(), clock=world.clock,
        stop=threading.Event(),
    )  # fmt: skip


def served(updater: Updater) -> tuple[str, str]:
    for _ in range(3):
        updater.step(0.0)
    manifest = updater.shared.meta().manifest
    return manifest.model, manifest.run


def live(world: World) -> dict[str, Trainer]:
    coming = fill(world, 4, 14)
    next(coming)
    trainers = {variant: begun(world, variant) for variant in VIEWS}
    for trainer in trainers.values():
        world.drain(trainer)
    for _ in coming:
        for trainer in trainers.values():
            trainer.turn()
        world.clock.advance(0.11)
    return trainers


def goes_back(world: World, capsys: pytest.CaptureFixture[str], variant: str) -> tuple[str, int]:
    """Go back by the verb to the oldest checkpoint that is live; return what it said, and the step."""
    words = ["--variant", variant] if variant else []
    assert main(["rollback", *words, "--list"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*") and "lake" not in line]
    version = shown[-1].split()[1].rstrip(":")
    assert main(["rollback", *words, "--to", version, "--yes", "--reason", "a test"]) == 0
    return capsys.readouterr().out, int(version.rpartition("-")[2])


@pytest.mark.parametrize("variant", ["", "deep"])
def test_a_model_goes_back_and_the_other_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    other = "" if variant else "deep"
    trainers = live(world)
    promote(world, variant, 1)
    server = server_of(world, tmp_path / "early")
    left = trainers[variant].run_id
    assert served(server) == (VIEWS[variant].model, left)
    before = len(steps_of(world, other))
    said, step = goes_back(world, capsys, variant)
    assert f"restart {f'train@{variant}' if variant else 'train'}`" in said
    assert [each.variant for each in read_decisions(world.log.reader(), TOPICS, "small")] == [variant, variant]
    standing = standing_of(VIEWS[variant], world.log.reader(), topics_of(variant), world.blobs)
    assert standing.checkpoint is not None and standing.checkpoint.meta.step == step
    assert standing.snapshot is None or standing.snapshot.step <= step
    between = server_of(world, tmp_path / "between")
    between.step(0.0)
    assert not between.shared.holds_model, "of the run that was left"
    with pytest.raises(InvariantBroken, match="another run"):
        for _ in range(60):
            trainers[variant].turn()
            world.clock.advance(0.1)
    again = begun(world, variant)
    assert (again.learner.step, again.learnt) == (step, 0), "it goes on from the checkpoint"
    assert again.run_id != left and again.run_id.endswith("-deep") == (variant == "deep")
    world.drain(again)
    again.close()
    trainers[other].close()
    assert len(steps_of(world, other)) == before and replayed(world, other).equal and replayed(world, variant).equal
    assert served(server) == served(server_of(world, tmp_path / "late")) == (VIEWS[variant].model, again.run_id)
    promote(world, other, 2**50)
    assert served(server) == (VIEWS[other].model, trainers[other].run_id)


def test_a_variant_that_is_not_declared_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollback", "--variant", "wide", "--list"]) == 2
    assert "not declared; there are: 'deep'" in capsys.readouterr().err
