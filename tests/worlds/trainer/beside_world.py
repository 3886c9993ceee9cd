"""Two trainers of one project beside each other, its own recipe's and a variant's, and what may kill either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgspec
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, Killed, World, cut, lake_of, send

from headrace.contract.config import TrainConfig
from headrace.contract.formats.decision import KIND, Decision, encode_decision, key_of
from headrace.contract.formats.topics import Topics
from headrace.replay.as_trained import Result, as_trained
from headrace.replay.recorded import recorded_steps
from headrace.trainer.commit.steps_archive import StepsArchive
from headrace.trainer.run import Trainer

DEEP = msgspec.structs.replace(PROJECT.recipe, hidden=(12,), dim=6)
BESIDE = msgspec.structs.replace(PROJECT, variants={"deep": DEEP}).checked()
VIEWS = {"": BESIDE, "deep": BESIDE.of_variant("deep")}
"""By variant, "" for the project's own recipe."""
CONFIG = TrainConfig(wait_ms=20, publish_ms=100, snapshot_ms=300, checkpoint_ms=300, steps_moved=5, lake_bytes=30_000)
OUTSIDE = {
    "steps_writer": ("open", "append"),
    "blobs": ("put", "delete"),
    "producer": ("send", "flush"),
    "admin": ("delete_before",),
}
"""What a trainer does to the world outside."""


class Kills:
    """Counts the calls of all that a process does outside; it dies before or after the one of this number."""

    def __init__(self, number: int = -1, how: str = "before") -> None:
        self.number, self.how, self.calls = number, how, 0

    def around(self, inner: Any, names: tuple[str, ...]) -> Any:
        return _Killing(inner, names, self)

    def call(self, act: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls - 1 != self.number:
            return act(*args, **named)
        if self.how == "after":
            act(*args, **named)
        raise Killed


class _Killing:
    def __init__(self, inner: Any, names: tuple[str, ...], kills: Kills) -> None:
        self._inner, self._names, self._kills = inner, names, kills

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return (lambda *a, **n: self._kills.call(found, *a, **n)) if name in self._names else found


def topics_of(variant: str) -> Topics:
    return TOPICS.of(VIEWS[variant].model)


def new_world(seed: int, stored: int = 4) -> World:
    """Return a world whose lake has each partition's first records, and whose topic has all that the lake has."""
    world = World(lake=lake_of(seed, stored))
    world.log.admin().ensure_topics(topics_of("deep").specs(PARTITIONS))
    return world


def begun(world: World, variant: str, kills: Kills | None = None, **changes: Any) -> Trainer:
    """Return a new process that trains a variant, recovered."""
    view, topics = changes.pop("project", VIEWS[variant]), topics_of(variant)
    deps = world.deps(
        **{
            "project": view,
            "config": CONFIG,
            "admin": world.log.admin(),
            "open_reader": world.log.reader,
            "steps_id": world.log.ids[topics.steps],
            **changes,
        }
    )
    for room, names in OUTSIDE.items() if kills is not None else ():
        setattr(deps, room, kills.around(getattr(deps, room), names))
    trainer = Trainer(deps)
    trainer.recover()
    return trainer


def queue_of(seed: int) -> list[tuple[Any, tuple[int, int]]]:
    """Return all samples' records, in the order of time."""
    todo = [record for p in range(PARTITIONS) for record in cut(seed, p, COUNT)]
    return sorted(todo, key=lambda record: record[0]["event_time_ms"][0].as_py())


def fill(world: World, seed: int, records: int) -> Iterator[None]:
    """Send `records` at once, then one more each time."""
    todo = queue_of(seed)
    for at, (rows, after) in enumerate(todo):
        send(world.log, rows, after=after)
        if at >= records:
            yield


def learn_beside(world: World, seed: int, kills: dict[str, Kills], check: Callable[[], None] = lambda: None) -> int:
    """Let both learn all of it, each killed as it is told; processes that die are started anew. Return the deaths.

    The project's own trainer learns what is there when the variant begins: it is served meanwhile.
    """
    rng, trainers, deaths = Random(seed), dict[str, Trainer | None](), 0
    coming = fill(world, seed, 14)

    def turn(variant: str) -> None:
        nonlocal deaths
        try:
            if (trainer := trainers.get(variant)) is None:
                trainer = trainers[variant] = begun(world, variant, kills.pop(variant, None))
            trainer.turn()
        except Killed:
            trainers[variant], deaths = None, deaths + 1
        world.clock.advance(rng.choice((0.02, 0.11)))
        check()

    next(coming)
    for _ in range(20):
        turn("")
    is_more, idle, turns = True, 0, 0
    while is_more or idle < 12:
        turns += 1
        assert turns < 400, "they learn for ever"
        is_more = next(coming, "none") is None
        turn("")
        turn("deep")
        idle += not is_more and all(is_done(world, variant) for variant in VIEWS)
    for variant in VIEWS:
        try:
            trainer = trainers.get(variant) or begun(world, variant, kills.pop(variant, None))
            world.drain(trainer)
            trainer.close()
        except Killed:
            deaths, last = deaths + 1, begun(world, variant)
            world.drain(last)
            last.close()
    return deaths


def is_done(world: World, variant: str) -> bool:
    """Say whether a model's newest run has taken all samples."""
    steps = steps_of(world, variant)
    ours = [step for step in steps if steps and step.run == steps[-1].run]
    return sum(r.rows for step in {s.step: s for s in ours}.values() for r in step.ranges) >= PARTITIONS * COUNT


def archive_of(world: World, variant: str) -> StepsArchive:
    topic = topics_of(variant).steps
    return StepsArchive(world.blobs, topic, world.log.ids[topic])


def steps_of(world: World, variant: str) -> list[Any]:
    """Return the recorded steps of a model, of the store and of the topic."""
    steps = recorded_steps(world.log.reader(), topics_of(variant), archive_of(world, variant))
    return [step for step in steps if step.model == VIEWS[variant].model]


def replayed(world: World, variant: str) -> Result:
    topics, archive = topics_of(variant), archive_of(world, variant)
    return as_trained(VIEWS[variant], topics, world.log.reader(), world.lake, archive=archive)


def promote(world: World, variant: str, at_ms: int) -> None:
    """Write the decision that a variant is served."""
    decision = Decision(model=PROJECT.name, what="promote", variant=variant, created_ms=at_ms, by="test")
    world.log.append(TOPICS.model, 0, encode_decision(decision), key_of(decision).encode(), {"kind": KIND})
