"""Goal: a recipe that is tried and put back costs nothing that a checkpoint, a manifest or a server still needs.

Method: runs of several recipes follow each other over one world, under clocks that go forwards, stand still or were set
back. After each run the newest manifest's blob must be in the store, and a recipe that comes back must go on from its
last step without redoing one.
"""

from __future__ import annotations

import re

import msgspec
import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, as_one_blob, cut, send, store_checkpoint

from headrace.backends.clock import VirtualClock
from headrace.contract.formats.positions import Cursor
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Branch
from headrace.contract.project import Project
from headrace.trainer.commit.checkpoint import (
    Checkpoint,
    Meta,
    newest_checkpoint,
    on_path,
    runs_of,
    stored_checkpoints,
    stored_versions,
)
from headrace.trainer.commit.lineage import Leg
from headrace.trainer.commit.publish import SNAPSHOTS_KEPT, named_blobs, read_manifests
from headrace.trainer.commit.retention import KEEP, OTHER_RUNS_KEPT
from headrace.trainer.run import Trainer

CLOCKS = {"forwards": 60_000, "set back": -60_000, "standing still": 0}


def recipe(number: int) -> Project:
    """Return the project with the recipe of this number; 0 is its own."""
    changed = msgspec.structs.replace(PROJECT.recipe, lr_dense=PROJECT.recipe.lr_dense / (1 + number))
    return msgspec.structs.replace(PROJECT, recipe=changed)


class Runs:
    """A world whose samples come bit by bit, and the trainers that follow each other in it."""

    def __init__(self, step_ms: int) -> None:
        self.world, self.step_ms, self.begun_ms = World(), step_ms, 2_000_000
        self.records = {p: cut(3, p, COUNT) for p in range(PARTITIONS)}

    def feed(self, share: float) -> None:
        for records in self.records.values():
            for rows, after in records[: max(1, int(len(records) * share))]:
                send(self.world.log, rows, after=after)
            del records[: max(1, int(len(records) * share))]

    def train(self, project: Project, *, snapshots: int) -> Trainer:
        """Run one process of this project until it has written some snapshots; the next one has another clock."""
        self.world.clock = VirtualClock(self.begun_ms)
        trainer = Trainer(self.world.deps(project=project))
        trainer.recover()
        for _ in range(snapshots):
            self.feed(0.05)
            # The second turn without a step has found nothing; the first one may wait for rows to join.
            idle = 0
            while idle < 2:
                idle = 0 if trainer.turn() else idle + 1
                self.world.clock.advance(0.03)
            self.world.clock.advance(3.0)
            trainer.turn()
        trainer.close()
        self.begun_ms += self.step_ms
        return trainer

    def newest(self) -> Manifest:
        return read_manifests(self.world.log.reader(), TOPICS, PROJECT.name)[-1]


@pytest.mark.parametrize("step_ms", CLOCKS.values(), ids=CLOCKS)
def test_a_recipe_that_is_put_back_goes_on_and_is_served(step_ms):
    runs = Runs(step_ms)
    first = runs.train(recipe(0), snapshots=3)
    second = runs.train(recipe(1), snapshots=4)
    again = runs.train(recipe(0), snapshots=4)
    assert first.run_id == again.run_id != second.run_id
    assert again.learner.step > first.learner.step
    newest = runs.newest()
    assert newest.run == again.run_id and newest.step == again.learner.step
    assert newest.blob in runs.world.blobs.objects
    found = newest_checkpoint(runs.world.blobs, PROJECT.name, recipe=again.recipe)
    assert found is not None and found.meta.step == again.learner.step
    other = newest_checkpoint(runs.world.blobs, PROJECT.name, recipe=second.recipe)
    assert other is not None and other.meta.step == second.learner.step


def test_a_recipe_that_is_put_back_redoes_no_step_that_its_checkpoint_holds():
    runs = Runs(CLOCKS["set back"])
    first = runs.train(recipe(0), snapshots=2)
    runs.train(recipe(1), snapshots=2)
    back = Trainer(runs.world.deps(project=recipe(0)))
    back.recover()
    assert back.learner.step == first.learner.step and back.learnt == 0
    assert back.learner.digest() == first.learner.digest()
    assert runs.newest().run == first.run_id


def test_what_many_runs_leave_behind_is_bounded():
    runs, ids = Runs(CLOCKS["set back"]), []
    for number in range(OTHER_RUNS_KEPT + 3):
        ids.append(runs.train(recipe(number), snapshots=2).run_id)
        assert runs.newest().blob in runs.world.blobs.objects
    assert len(set(ids)) == len(ids)
    assert runs_of(runs.world.blobs, PROJECT.name) == set(ids[-1 - OTHER_RUNS_KEPT :])
    assert len(runs.world.blobs.list(f"checkpoints/{PROJECT.name}")) <= KEEP * (1 + OTHER_RUNS_KEPT)
    snapshots = {n.rpartition("/")[2].rpartition("-")[0] for n in runs.world.blobs.list(f"snapshots/{PROJECT.name}")}
    assert snapshots == set(ids[-1 - OTHER_RUNS_KEPT :])
    assert len(runs.world.blobs.list(f"snapshots/{PROJECT.name}")) <= SNAPSHOTS_KEPT + OTHER_RUNS_KEPT


def checkpoint(
    run: str, step: int, offset: int, *, recipe: str, version: int = -1, branch: Branch | None = None
) -> Checkpoint:
    cursor = Cursor(lake_version=version)
    meta = Meta(run=run, step=step, steps_offset=offset, recipe=recipe, cursor=cursor, branch=branch)
    return Checkpoint(meta, {}, {})


def test_what_a_branch_goes_on_from_stays_until_it_has_enough_of_its_own():
    """The run that it goes on from came before all others: by its age it would go at once."""
    blobs = World().blobs
    for step in (4, 5, 6):
        store_checkpoint(blobs, "small", checkpoint("old", step, step, recipe="A"))
    for number in range(OTHER_RUNS_KEPT):
        store_checkpoint(blobs, "small", checkpoint(f"r{number}", 1, 10 + number, recipe="A"))
    branch = Branch(run="old", step=5)
    for own in range(1, KEEP + 1):
        store_checkpoint(blobs, "small", checkpoint("new", 5 + own, 20 + own, recipe="A", branch=branch))
        path = (Leg("old", 5), Leg("new", 2**62))
        stored = on_path(stored_checkpoints(blobs, "small"), path)
        old = [each.step for each in stored if each.run == "old"]
        assert old == ([5, 4] if own < KEEP else [])
        assert len(stored) - len(old) == own


def test_checkpoints_of_release_0_1_are_found_and_replaced_by_their_lineage():
    """Their names say run and step alone: `z` is the older run though its name sorts last."""
    blobs = World().blobs
    for each in (
        checkpoint("z", 7, 7, recipe="A", version=4),
        checkpoint("a", 2, 9, recipe="A"),
        checkpoint("m", 1, 8, recipe="B"),
    ):
        blobs.put(f"checkpoints/small/{each.meta.run}-{each.meta.step:012d}", as_one_blob(each))
    found = newest_checkpoint(blobs, "small", recipe="A")
    assert found is not None and (found.meta.run, found.meta.step) == ("a", 2)
    assert stored_versions(blobs, "small") == {4}
    for step in range(3, 9):
        store_checkpoint(blobs, "small", checkpoint("a", step, 10 + step, recipe="A"))
    assert [re.sub(r"\.[0-9a-f]{16}\.json$", "", n.rpartition("/")[2]) for n in blobs.list("checkpoints/small")] == [
        "a-000000000006.A.16.v-1",
        "a-000000000007.A.17.v-1",
        "a-000000000008.A.18.v-1",
        "m-000000000001",
        "z-000000000007",
    ]


def test_what_another_release_wrote_is_left_alone():
    blobs = World().blobs
    foreign = {"checkpoints/small/new-000000000009": b"HRCKPT9\n", "checkpoints/small/notes": b"by hand"}
    blobs.objects |= foreign
    for number in range(OTHER_RUNS_KEPT + 3):
        store_checkpoint(blobs, "small", checkpoint(f"r{number}", 1, number, recipe=f"{number}"))
    assert foreign.items() <= blobs.objects.items()
    assert runs_of(blobs, "small") == {"new", "r2", "r3", "r4", "r5"}
    assert newest_checkpoint(blobs, "small", recipe="1") is None


def test_a_damaged_checkpoint_is_followed_by_the_one_before():
    blobs = World().blobs
    for step in (9, 10, 11):
        name = store_checkpoint(blobs, "small", checkpoint("r", step, step, recipe="A"))
    blobs.objects[f"checkpoints/small/{name}"] = b"damaged"
    found = newest_checkpoint(blobs, "small", recipe="A")
    assert found is not None and found.meta.step == 10


def test_the_last_snapshot_of_each_run_that_was_announced_last_stays():
    def manifest(run: str, step: int) -> Manifest:
        return Manifest(kind="snapshot", model="m", run=run, step=step, version="", blob=f"{run}-{step}")

    told = [manifest(*each) for each in (("z", 1), ("d", 1), ("c", 1), ("own", 3), ("d", 2), ("b", 1), ("own", 4))]
    assert named_blobs(told, but="own") == {"d-2", "c-1", "b-1"}
    assert named_blobs([], but="own") == frozenset()
