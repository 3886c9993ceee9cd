"""Goal: a variant learns the lake beside the project's own recipe, and neither loses or disturbs anything of the other,
whenever either dies.

Method: two trainers of one project over one log and one store, with checkpoints, snapshots and moves of steps every few
turns. Either is killed before and after each call by which it changes the world, by number. Checked from outside: the
steps of both, from store and topic, without a gap; a replay of each; what is announced, and when. Planted bugs must be
seen.
"""

from __future__ import annotations

import msgspec
import pytest
from beside_world import (
    BESIDE,
    CONFIG,
    DEEP,
    VIEWS,
    Kills,
    begun,
    learn_beside,
    new_world,
    promote,
    replayed,
    steps_of,
    topics_of,
)
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.snapshot import decode_manifest, decode_update
from headrace.contract.project import Project
from headrace.trainer.commit.checkpoint import stored_checkpoints
from headrace.trainer.commit.claim import models_of
from headrace.trainer.commit.decisions import home_of, knows_by, promoted, read_decisions
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.commit.standing import behind_records, standing_of
from headrace.trainer.run import Trainer

WAYS = ("before", "after")


class Announced:
    """Watches that the variant says nothing before it has learnt the lake, and that the other goes on meanwhile."""

    def __init__(self, world: World) -> None:
        self.world, self.others, self.held = world, set[int](), 0

    def __call__(self) -> None:
        steps = steps_of(self.world, "deep")
        rows = self.world.lake.rows.num_rows if self.world.lake is not None else 0
        is_learning = not steps or any(r.kind == "stored" and r.stop < rows for r in steps[-1].ranges)
        said = self.world.log.partitions(topics_of("deep").deltas)[0]
        told = read_manifests(self.world.log.reader(), TOPICS, VIEWS["deep"].model)
        if is_learning and steps:
            self.held += 1
            self.others.add(len(self.world.log.partitions(TOPICS.deltas)[0]))
            assert not said and not told, "a variant that learns the lake is announced"


def whole_and_apart(world: World) -> None:
    """Fail unless each model learnt all, once, and replays to its live digest, in topics and blobs of its own."""
    runs = {}
    for variant, view in VIEWS.items():
        steps = {(s.run, s.step): s for s in steps_of(world, variant)}
        (run,) = {s.run for s in steps.values()}
        assert sorted(n for _, n in steps) == list(range(1, len(steps) + 1))
        assert sum(r.rows for s in steps.values() for r in s.ranges) == PARTITIONS * COUNT
        result = replayed(world, variant)
        assert result.equal is True and result.rows == PARTITIONS * COUNT and result.run == run
        runs[variant] = run
        in_topic = [r.value for r in world.log.partitions(topics_of(variant).deltas)[0]]
        assert {decode_update(data)[1].model for data in in_topic} == {view.model}
        assert {each.run for each in stored_checkpoints(world.blobs, view.model)} == {run}
        assert any(n.startswith(f"steps/{topics_of(variant).steps}-") for n in world.blobs.objects), "none was moved"
    assert len(set(runs.values())) == 2 and runs["deep"].endswith("-deep")
    assert models_of(world.blobs, "small") == ["small", "small.deep"]


@pytest.mark.parametrize("seed", range(1))
def test_a_variant_learns_the_lake_while_the_other_goes_on(seed):
    world = new_world(seed)
    announced = Announced(world)
    assert learn_beside(world, seed, {}, announced) == 0
    whole_and_apart(world)
    assert announced.held > 2 and len(announced.others) > 1, "the project's own recipe stood still meanwhile"


def test_each_is_killed_at_numbered_calls():
    killed_at_every(seed=3, every=71)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3, 5))
def test_each_is_killed_at_every_call_long(seed):
    killed_at_every(seed, every=1)


def killed_at_every(seed: int, every: int) -> None:
    calls = {variant: Kills() for variant in VIEWS}
    counted = dict(calls)
    learn_beside(new_world(seed), seed, counted)
    at = 0
    for variant, kills in calls.items():
        assert kills.calls > 60
        for number in range(0, kills.calls, every):
            world, at = new_world(seed), at + 1
            deaths = learn_beside(world, seed, {variant: Kills(number, WAYS[at % 2])})
            assert deaths <= 1
            whole_and_apart(world)


def test_moved_to_the_projects_own_recipe_it_goes_on_with_its_run():
    world = new_world(4)
    learn_beside(world, 4, {})
    steps = len(steps_of(world, "deep"))
    moved = msgspec.structs.replace(PROJECT, recipe=DEEP)

    def home(project: Project) -> Project:
        reader = world.log.reader()
        return home_of(project, read_decisions(reader, TOPICS, "small"), knows_by(world.blobs, reader, TOPICS))

    assert home(BESIDE) == BESIDE and home(moved).model == "small", "nothing was promoted yet"
    promote(world, "deep", 1)
    assert home(BESIDE) == BESIDE, "while it is declared, the project's own recipe has its own model"
    assert home(moved).model == "small.deep"
    again = begun(world, "deep", project=home(moved))
    assert again.run_id == steps_of(world, "deep")[0].run and again.learner.step == steps
    again.close()
    # A further change begins a run in the model that is served, as ever.
    tuned = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(DEEP, lr_dense=0.5))
    assert home(tuned).model == "small.deep"
    # Put back, the recipe of before goes on with its own run; then it can be promoted again.
    assert home(BESIDE).model == "small" and home(PROJECT).model == "small"
    # What was moved is no variant's name any more.
    with pytest.raises(ConfigRejected, match="give the new variant another name than 'deep'"):
        home(msgspec.structs.replace(moved, variants={"deep": msgspec.structs.replace(DEEP, dim=2)}))
    # Another one is promoted and given up: the own recipe stays where it was.
    promote(world, "wide", 2)
    assert home(msgspec.structs.replace(moved, variants={"wide": PROJECT.recipe})).model == "small.deep"
    promote(world, "deep", 3)
    assert home(moved).model == "small.deep"
    assert promoted(read_decisions(world.log.reader(), TOPICS, "small")) == "deep"
    promote(world, "", 4)
    assert home(moved).model == "small" and promoted(read_decisions(world.log.reader(), TOPICS, "small")) == ""


def test_how_both_stand_is_read_from_store_and_log():
    world = new_world(5)
    reader, blobs = world.log.reader(), world.blobs
    nothing = standing_of(VIEWS["deep"], reader, TOPICS, blobs)
    assert not nothing.run and nothing.snapshot is None and not nothing.learns_lake
    trainer = begun(world, "deep")
    for _ in range(6):
        trainer.turn()
        world.clock.advance(0.2)
    learning = standing_of(VIEWS["deep"], reader, TOPICS, blobs)
    assert learning.learns_lake and learning.snapshot is None and learning.figures["rows"] > 0
    learn_beside(world, 5, {})
    own, deep = (standing_of(view, reader, TOPICS, blobs) for view in VIEWS.values())
    assert not deep.learns_lake and deep.snapshot is not None and deep.snapshot.model == "small.deep"
    assert behind_records(own, deep) == behind_records(deep, own) == 0 and behind_records(own, learning) > 0
    assert {"auc", "log_loss", "calibration", "samples", "rows"} <= own.figures.keys() & deep.figures.keys()
    changed = msgspec.structs.replace(VIEWS["deep"], recipe=msgspec.structs.replace(DEEP, seed=8))
    other = standing_of(changed, reader, TOPICS, blobs)
    assert other.snapshot is None and other.other_recipe == deep.snapshot.version


# -- planted bugs


def test_a_variant_that_is_announced_while_it_learns_is_seen(monkeypatch):
    def behind(self, m):
        return self.source.is_stored and bool(m) and m[-1].run != self.run_id

    monkeypatch.setattr(Trainer, "_is_behind", behind)
    world = new_world(6)
    with pytest.raises(AssertionError, match="is announced"):
        learn_beside(world, 6, {}, Announced(world))


def test_runs_that_two_models_share_are_seen(monkeypatch):
    monkeypatch.setattr(Trainer, "_new_run", lambda self, taken: "r1")
    world = new_world(6)
    learn_beside(world, 6, {})
    with pytest.raises(AssertionError):
        whole_and_apart(world)


def test_a_checkpoint_taken_from_the_other_model_is_seen(monkeypatch):
    monkeypatch.setattr("headrace.trainer.commit.checkpoint.folder_of", lambda model: "checkpoints/small")
    monkeypatch.setattr("headrace.trainer.commit.checkpointer.folder_of", lambda model: "checkpoints/small")
    world = new_world(6)
    learn_beside(world, 6, {})
    with pytest.raises(AssertionError):
        whole_and_apart(world)


def test_manifests_of_the_first_model_are_not_the_variants():
    """Its first version is announced under a key of its own: compaction keeps both."""
    world = new_world(7)
    learn_beside(world, 7, {})
    records = [r for r in world.log.partitions(TOPICS.model)[0] if r.headers.get("kind") == "snapshot"]
    assert {r.key for r in records} == {b"small/snapshot", b"small.deep/snapshot"}
    assert {decode_manifest(r.value or b"").model for r in records} == {"small", "small.deep"}
    assert CONFIG.steps_moved
