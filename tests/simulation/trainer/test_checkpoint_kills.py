"""Goal: a trainer that dies at any call that it makes for a checkpoint, or whose call fails, ends with the bits of an
undisturbed run, and leaves nothing behind that no checkpoint names.

Method: pages are of a few rows and a checkpoint comes every few steps, so that each writes pages, rows and a manifest,
and deletes old ones. The calls of the store below `checkpoints/` are numbered; one of them fails or is the last that
the process makes, before or after it took effect. Another process goes on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from trainer_world import PROJECT, FaultyBlobs, Killed, World, cut, samples, send

from headrace.contract.config import TrainConfig
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.blobs import Pieces
from headrace.trainer.commit import checkpoint
from headrace.trainer.commit.checkpoint import (
    newest_checkpoint,
    parts_of,
    read_manifest,
    stored_checkpoints,
)
from headrace.trainer.model.tables import changes
from headrace.trainer.run import Trainer

MODEL, COUNT = PROJECT.name, 120
SHORT = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, batch_rows=8))
CONFIG = TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=2_000, checkpoint_ms=60)
WAYS = ("dies before", "dies after", "fails", "fails after")
CALLS = 110
"""How many calls an undisturbed run makes, at least; a test counts them."""


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PAGE_BYTES", 500)


class Numbered(FaultyBlobs):
    """One call below `checkpoints/` ends so."""

    def __init__(self, objects: dict[str, bytes], at: int, way: str) -> None:
        self.objects, self.at, self.way, self.calls = objects, at, way, 0

    def put(self, name: str, data: bytes | Pieces) -> None:
        self._call(name, lambda: FaultyBlobs.put(self, name, data))

    def get(self, name: str) -> bytes | None:
        found: bytes | None = self._call(name, lambda: FaultyBlobs.get(self, name))
        return found

    def list(self, prefix: str) -> list[str]:
        found: list[str] = self._call(prefix, lambda: FaultyBlobs.list(self, prefix))
        return found

    def delete(self, name: str) -> None:
        self._call(name, lambda: FaultyBlobs.delete(self, name))

    def _call(self, name: str, act: Callable[[], Any]) -> Any:
        if not name.startswith("checkpoints/"):
            return act()
        self.calls += 1
        if self.calls != self.at:
            return act()
        if self.way in ("dies after", "fails after"):
            act()
        raise Killed if self.way.startswith("dies") else Unavailable(name)


def world_of() -> World:
    world = World()
    for rows, after in cut(11, 0, COUNT):
        send(world.log, rows, after=after)
    return world


def live(world: World, at: int = 0, way: str = "") -> tuple[Trainer, int]:
    """Run trainers until all is learnt; return the last one and how many calls the first one made."""
    calls = 0
    for turn in range(3):
        blobs = Numbered(world.blobs.objects, 0 if turn else at, way)
        trainer = Trainer(world.deps(project=SHORT, config=CONFIG, blobs=blobs))
        try:
            trainer.recover()
            world.drain(trainer)
            trainer.close()
        except Killed:
            calls = calls or blobs.calls
            continue
        return trainer, calls or blobs.calls
    raise AssertionError("a restart does not cure it")


@pytest.fixture(scope="module")
def undisturbed() -> str:
    return live(world_of())[0].learner.digest()


def check(world: World, trainer: Trainer, digest: str) -> None:
    assert trainer.learner.digest() == digest
    found = newest_checkpoint(world.blobs, MODEL, recipe=trainer.recipe)
    assert found is not None and found.meta.step == trainer.learner.step
    again = Trainer(world.deps(project=SHORT))
    again.learner.load(found.learner, found.rows)
    assert again.learner.digest() == digest
    manifests = [read_manifest(world.blobs, MODEL, each) for each in stored_checkpoints(world.blobs, MODEL)]
    named = {f"{parts_of(MODEL)}/{part.name}" for manifest in manifests for part in manifest.parts()}
    assert {name for name in world.blobs.objects if "/parts/" in name} == named


def test_there_are_so_many_calls(undisturbed):
    world = world_of()
    trainer, calls = live(world)
    assert calls >= CALLS
    check(world, trainer, undisturbed)
    tables = newest_checkpoint(world.blobs, MODEL, recipe=trainer.recipe).manifest.tables["table.0."]  # type: ignore[union-attr]
    assert len(tables.pages) > 2 and tables.changed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [n if n % 10 == 3 else pytest.param(n, marks=pytest.mark.long) for n in range(1, CALLS)])
def test_a_call_that_fails_or_is_the_last_changes_nothing(at, way, undisturbed):
    world = world_of()
    trainer, _ = live(world, at, way)
    check(world, trainer, undisturbed)


def test_a_manifest_before_its_parts_is_seen(undisturbed, monkeypatch):
    """Planted: parts are stored behind the manifest that names them."""
    from headrace.trainer.commit.checkpointer import Checkpointer

    late: list[Any] = []
    plain = Checkpointer._store

    def store(self: Checkpointer, *args: Any) -> str:
        put = self.blobs.put
        self._put_part = late.append  # type: ignore[method-assign, assignment]
        name = plain(self, *args)
        for encoded in late:
            put(f"{parts_of(MODEL)}/{encoded.part.name}", encoded.pieces)
        late.clear()
        return name

    monkeypatch.setattr(Checkpointer, "_store", store)
    broken = 0
    for at in range(2, 40):
        world = world_of()
        blobs = Numbered(world.blobs.objects, at, "dies before")
        trainer = Trainer(world.deps(project=SHORT, config=CONFIG, blobs=blobs))
        late.clear()
        try:
            trainer.recover()
            world.drain(trainer)
        except Killed:
            for each in stored_checkpoints(world.blobs, MODEL)[-1:]:
                parts = read_manifest(world.blobs, MODEL, each).parts()
                broken += any(f"{parts_of(MODEL)}/{part.name}" not in world.blobs.objects for part in parts)
    assert broken > 0


def test_an_old_checkpoint_that_is_taken_is_seen(undisturbed, monkeypatch):
    """Planted: the checkpoint that has got least far is taken, as the newest one: its steps are not those it says."""
    from headrace.trainer import recovery

    def oldest(blobs: Any, model: str, *, recipe: str, path: Any) -> Any:
        newest = newest_checkpoint(blobs, model, recipe=recipe, path=path)
        if newest is None:
            return None
        stored = sorted(stored_checkpoints(blobs, model), key=lambda each: each.step)
        from headrace.trainer.commit.checkpoint import read_checkpoint

        old = read_checkpoint(blobs, model, stored[0])
        return msgspec.structs.replace(old, meta=newest.meta, evaluation=newest.evaluation, manifest=None)

    world = world_of()
    live(world)
    monkeypatch.setattr(recovery, "newest_checkpoint", oldest)
    again = Trainer(world.deps(project=SHORT, config=CONFIG))
    again.recover()
    assert again.learner.digest() != undisturbed


def test_the_first_checkpoint_of_a_process_names_what_it_was_restored_from():
    """A page of which nothing changed since is not stored again; another row of learning stores a few parts."""
    world = world_of()
    trainer, _ = live(world)
    before = read_manifest(world.blobs, MODEL, stored_checkpoints(world.blobs, MODEL)[-1])
    send(world.log, samples(11, 1, 1), after=(-1, -1))
    stored = set(world.blobs.objects)
    again = Trainer(world.deps(project=SHORT, config=CONFIG))
    again.recover()
    world.drain(again)
    assert again.learner.step == trainer.learner.step + 1
    after = next(
        found
        for each in stored_checkpoints(world.blobs, MODEL)
        if (found := read_manifest(world.blobs, MODEL, each)).meta.step == again.learner.step
    )
    assert after.seq == before.seq + 1
    pages = {page.part.name for table in after.tables.values() for page in table.pages}
    new = {name for name in pages if f"{parts_of(MODEL)}/{name}" not in stored}
    assert len(pages) >= 6 and len(new) <= 3


def test_a_page_is_let_go_of_before_the_next_is_taken(monkeypatch):
    """So a restore needs no second copy of the tables; all parts are known to be whole before the first is taken."""
    world, kept = world_of(), []
    trainer, _ = live(world)
    decode = checkpoint.decode_part

    def noted(data: bytes) -> Any:
        arrays = decode(data)
        kept.extend(weakref.ref(array) for name, array in arrays.items() if name == "keys")
        return arrays

    monkeypatch.setattr(checkpoint, "decode_part", noted)
    found = newest_checkpoint(world.blobs, MODEL, recipe=trainer.recipe)
    pages, left = len(found.manifest.tables["table.0."].pages), []
    assert len(kept) >= pages > 3
    for _ in found.rows["table.0."].pieces:
        left.append(sum(each() is not None for each in kept))
    assert [before - after for before, after in itertools.pairwise(left[:pages])] == [1] * (pages - 1)
