"""Goal: live samples are learnt beside the lake from the positions on that it holds, each sample once, whatever dies.

Method: a lake of each partition's first records, a topic that has all of them and gets more while the lake is learnt.
All calls that a trainer makes outside are numbered; at one of them it dies, before or after it took effect, and another
goes on. Checkers from outside: the recorded ranges have each sample once, in the stated order, and a replay as trained
reaches the digest. Planted bugs: live samples begin elsewhere after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, Killed, Lake, World, cut, lake_of, send

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.config import TrainConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.formats.snapshot import decode_update
from headrace.contract.formats.steps import Step, decode_step
from headrace.contract.interfaces.lake import LakeState
from headrace.replay.as_trained import as_trained
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.run import Trainer
from headrace.trainer.source.source import Source

COUNT, STORED, SENT = 120, 2, 3
"""Samples of a partition; records of it that the lake holds; those that the topic has when the run begins."""
SEED = 7
PROJECT8 = msgspec.structs.replace(PROJECT, recipe=msgspec.structs.replace(PROJECT.recipe, batch_rows=8))
CONFIG = TrainConfig(
    wait_ms=20, publish_ms=100, snapshot_ms=400, checkpoint_ms=200, lake_bytes=1_048_576, live_share=0.5
)
CALLS = 150
"""How many calls an undisturbed run makes outside, at least; a test counts them."""
NUMBERED = ("poll", "append", "put", "get", "list", "delete", "send", "flush", "state", "read", "let_go", "hold")


class Numbered:
    """Passes calls on; at number `at` of all that share the counter the process dies."""

    def __init__(self, target: Any, calls: list[int], at: int, way: str) -> None:
        self.target, self.calls, self.at, self.way = target, calls, at, way

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.target, name)
        return self._numbered(found) if name in NUMBERED else found

    def _numbered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def numbered(*args: Any, **kwargs: Any) -> Any:
            self.calls[0] += 1
            if self.calls[0] != self.at:
                return call(*args, **kwargs)
            if self.way == "after":
                call(*args, **kwargs)
            raise Killed

        return numbered


def process(world: World, *, at: int = 0, way: str = "", calls: list[int] | None = None, **changes: Any) -> Trainer:
    """Return a new process's trainer."""
    project = changes.pop("project", PROJECT8)
    deps = world.deps(project=project, config=changes.pop("config", CONFIG), **changes)
    counter = [0] if calls is None else calls
    names = ("reader", "producer", "steps_writer", "blobs", "lake")
    wrapped = {name: Numbered(getattr(deps, name), counter, at, way) for name in names}
    return Trainer(world.deps(project=project, config=deps.config, **wrapped))


def begun(seed: int = SEED) -> tuple[World, list[Any]]:
    """Return a world whose lake and topic have what there is when a run begins, and the records still to come."""
    world, later = World(lake=lake_of(seed, STORED, COUNT)), []
    for partition in range(PARTITIONS):
        records = cut(seed, partition, COUNT)
        for rows, after in records[:SENT]:
            send(world.log, rows, after=after)
        later += records[SENT:]
    return world, sorted(later, key=lambda record: record[0]["event_time_ms"][0].as_py())


def to_the_end(trainer: Trainer, world: World, later: list[Any]) -> None:
    """Turn until all is learnt; a record comes every other turn."""
    for turn in range(400):
        if later and turn % 2:
            rows, after = later.pop(0)
            send(world.log, rows, after=after)
        trainer.turn()
        world.clock.advance(0.03)
        if not later and turn % 8 == 0:
            break
    world.drain(trainer)


def lived(at: int = 0, way: str = "") -> tuple[World, Trainer, int]:
    """Run trainers until all is learnt; return the last one, and how many calls the first one made."""
    world, later = begun()
    calls = [0]
    trainer = process(world, at=at, way=way, calls=calls)
    try:
        trainer.recover()
        to_the_end(trainer, world, later)
        trainer.close()
        return world, trainer, calls[0]
    except Killed:
        world.clock.advance(0.5)
    trainer = process(world)
    trainer.recover()
    to_the_end(trainer, world, later)
    trainer.close()
    return world, trainer, calls[0]


def steps_of(world: World) -> list[Step]:
    """Return the steps of the newest run; a record that was written again counts once."""
    steps = [decode_step(record.value) for record in world.log.partitions(TOPICS.steps)[0]]
    ours = {step.step: step for step in steps if step.run == steps[-1].run}
    return [ours[number] for number in sorted(ours)]


def check(world: World, trainer: Trainer) -> None:
    """Raise where a sample is missing or twice, ranges lie in another order, or a replay differs."""
    steps = steps_of(world)
    assert len(steps) == trainer.learner.step
    for step in steps:
        assert [(r.kind == "live", r.partition) for r in step.ranges] == sorted(
            (r.kind == "live", r.partition) for r in step.ranges
        )
    assert set(ids_of(world, steps).values()) == {1}
    assert len(ids_of(world, steps)) == PARTITIONS * COUNT
    replayed = as_trained(PROJECT8, TOPICS, world.log.reader(), world.lake, train=CONFIG)
    assert replayed.equal is True and replayed.digest == trainer.learner.digest()
    assert replayed.rows == PARTITIONS * COUNT


def ids_of(world: World, steps: list[Step]) -> Counter[str]:
    """Return how often the steps' ranges took each sample, by the ranges alone."""
    assert world.lake is not None
    stored = world.lake.rows.sort_by([(n, "ascending") for n in ("event_time_ms", "partition", "offset", "rank")])
    stored_ids, found = stored["event_id"].to_pylist(), Counter[str]()
    in_log = {
        partition: [
            ((row["offset"], row["rank"]), row["event_id"])
            for rows, _ in cut(SEED, partition, COUNT)
            for row in rows.select(["offset", "rank", "event_id"]).to_pylist()
        ]
        for partition in range(PARTITIONS)
    }
    for each in (r for step in steps for r in step.ranges):
        if each.kind == "stored":
            found.update(stored_ids[each.start : each.stop])
        else:
            found.update(name for place, name in in_log[each.partition] if tuple(each.after) < place <= each.upto)
    return found


def test_live_samples_are_learnt_beside_the_lake_from_its_positions_on():
    """Half of each step, where both sides have enough; positions claim nothing until the lake is learnt."""
    world, trainer, calls = lived()
    check(world, trainer)
    assert calls >= CALLS
    steps = steps_of(world)
    both = [s for s in steps if len({r.kind for r in s.ranges}) == 2]
    assert steps[0] in both and len(both) > 5
    first = {r.partition: r.after for r in reversed([r for s in steps for r in s.ranges if r.kind == "live"])}
    assert first == {p: tuple(at) for p, at in world.lake.positions.by_partition.items()}
    assert sum(r.rows for r in both[0].ranges if r.kind == "stored") == 4
    last_stored = max(s.step for s in steps if any(r.kind == "stored" for r in s.ranges))
    assert all(not s.positions for s in steps[:last_stored])
    assert set(steps[last_stored].positions) == {"0", "1", "2"}


def test_what_is_published_meanwhile_says_what_it_has():
    """A delta and a snapshot come while the lake is learnt; they claim no position and name the live ones beside."""
    world, later = begun()
    trainer = process(world)
    trainer.recover()
    while trainer.source.is_mixed:
        trainer.turn()
        world.clock.advance(0.13)
    to_the_end(trainer, world, later)
    trainer.close()
    told = [decode_update(r.value)[1] for r in world.log.partitions(TOPICS.deltas)[0]]
    told += read_manifests(world.log.reader(), TOPICS, PROJECT.name)
    mixed = [m for m in told if m.stored_left and m.step]
    assert {m.kind for m in mixed} == {"delta", "snapshot"}
    assert all(not m.positions for m in mixed) and all(
        m.positions and not m.live for m in told if m not in mixed and m.step
    )
    steps = steps_of(world)
    for manifest in mixed:
        live = [r for s in steps[: manifest.step] for r in s.ranges if r.kind == "live"]
        assert manifest.live == {str(r.partition): list(r.upto) for r in sorted(live, key=lambda r: r.partition)}
    assert [m.stored_left for m in sorted(mixed, key=lambda m: m.step)] == sorted(
        (m.stored_left for m in mixed), reverse=True
    )


@pytest.mark.parametrize("at", [*range(1, CALLS, 23), *(pytest.param(n, marks=pytest.mark.long) for n in range(CALLS))])
@pytest.mark.parametrize("way", ["before", "after"])
def test_it_may_die_at_any_call(at: int, way: str):
    world, trainer, _ = lived(at, way)
    check(world, trainer)


def held_elsewhere(self: Source, state: LakeState) -> None:
    """Place live samples behind what the lake holds now, not behind what it held when the run began."""
    for p in self._live.partitions:
        self._place(p, NEWER[p], 0, is_new=True)


NEWER = {p: Position(20, 0) for p in range(PARTITIONS)}


@pytest.mark.parametrize("is_checked", [True, False])
def test_planted_another_begin_of_live_samples_after_a_restart_is_caught(monkeypatch, is_checked: bool):
    """The lake's version holds something else: refused. Without that check, what is checked from outside differs."""
    world, _ = begun()
    trainer = process(world)
    trainer.recover()
    while trainer.learner.step < 3:
        trainer.turn()
        world.clock.advance(0.03)
    world.clock.advance(1.0)
    trainer.turn()
    lake = world.lake
    moved = {p: Position(at.offset - 2, 0) for p, at in lake.positions.by_partition.items()}
    world.lake = Lake(lake.rows, Positions(1, moved), lake.next_offsets)
    if is_checked:
        with pytest.raises(InvariantBroken, match="would be lost, or learnt twice"):
            process(world).recover()
        return
    world.lake = lake
    monkeypatch.setattr(Source, "_place_behind", held_elsewhere)
    begin = Source.begin
    monkeypatch.setattr(Source, "begin", lambda self, cursor: begin(self, cursor and forgetful(cursor)))
    with pytest.raises((AssertionError, InvariantBroken)):
        again = process(world)
        again.recover()
        world.drain(again)
        again.close()
        world_check = ids_of(world, steps_of(world))
        assert set(world_check.values()) == {1} and len(world_check) >= lake.rows.num_rows + 3


def forgetful(cursor: Any) -> Any:
    return msgspec.structs.replace(cursor, live={})


def test_where_the_lake_is_away_live_samples_are_learnt():
    class Away(Lake):
        is_away = False

        def read(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_away:
                raise Unavailable("no DataNode")
            return super().read(*args, **kwargs)

    world, later = begun()
    lake = world.lake
    world.lake = Away(lake.rows, lake.positions, lake.next_offsets)
    trainer = process(world)
    trainer.source._stored._bytes_max = 8_000
    trainer.recover()
    world.lake.is_away = True
    with pytest.raises(Unavailable):
        for _ in range(40):
            trainer.turn()
            world.clock.advance(0.03)
    assert any(not s.positions and all(r.kind == "live" for r in s.ranges) for s in steps_of(world))
    world.lake.is_away = False
    to_the_end(trainer, world, later)
    trainer.close()
    check(world, trainer)


def test_a_lake_alone_fills_every_step():
    """Nothing live comes: the lake is not held up."""
    world = World(lake=lake_of(SEED, STORED, COUNT))
    trainer = process(world)
    trainer.recover()
    world.drain(trainer)
    assert not trainer.source.is_stored and trainer.learnt == world.lake.rows.num_rows
    assert [sum(r.rows for r in s.ranges) for s in steps_of(world)[:-1]] == [8] * (len(steps_of(world)) - 1)


@pytest.mark.parametrize("first", [0.0, 0.5])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_the_share_may_change_in_the_midst(first: float, has_checkpoint: bool):
    """A restart turns it on, or off: live samples then wait for the lake's end, and go on where they stood."""
    world, later = begun()
    trainer = process(world, config=msgspec.structs.replace(CONFIG, live_share=first, group_steps=0))
    trainer.recover()
    while trainer.learner.step < 4:
        trainer.turn()
    if has_checkpoint:
        trainer.close()
    else:
        for name in world.blobs.list("checkpoints/small"):
            world.blobs.delete(name)
    again = process(world, config=msgspec.structs.replace(CONFIG, live_share=0.5 - first))
    again.recover()
    assert again.learner.step == 4 and again.source.is_stored
    to_the_end(again, world, later)
    again.close()
    check(world, again)
    steps = steps_of(world)
    kinds = [{r.kind for r in s.ranges} for s in steps]
    assert ("live" in kinds[3]) == bool(first) and ("live" in kinds[4]) == (not first)


def test_what_is_stored_meanwhile_is_not_learnt_twice(tmp_path: Path):
    """Through the Delta table that the sink writes: newer versions come, the run is killed, and stays at its own."""
    world, later = begun()
    fake = world.lake
    lake = world.lake = DeltaLake(str(tmp_path / "lake"))
    lake.append(fake.rows.to_batches(), fake.next_offsets, fake.positions.by_partition)
    trainer = process(world, config=msgspec.structs.replace(CONFIG, group_steps=0))
    trainer.recover()
    while trainer.learner.step < 5:
        trainer.turn()
        world.clock.advance(0.05)
    for partition in range(PARTITIONS):
        rows, _ = cut(SEED, partition, COUNT)[STORED]
        last = Position(rows["offset"][-1].as_py(), rows["rank"][-1].as_py())
        lake.append([rows], {partition: STORED + 1}, {partition: last})
    again = process(world)
    again.recover()
    assert again.source.is_mixed and again.learner.step == 5
    to_the_end(again, world, later)
    again.close()
    steps = steps_of(world)
    assert {r.version for s in steps for r in s.ranges if r.kind == "stored"} == {0}
    replayed = as_trained(PROJECT8, TOPICS, world.log.reader(), lake, train=CONFIG)
    assert replayed.equal is True and replayed.rows == PARTITIONS * COUNT
    world.lake = fake
    found = ids_of(world, steps)
    assert set(found.values()) == {1} and len(found) == PARTITIONS * COUNT


def test_figures_are_of_live_samples_alone():
    """Those of the lake that are learnt before anything live could be judged, and are not counted all the same."""
    world, later = World(lake=lake_of(SEED, STORED, COUNT)), []
    for partition in range(PARTITIONS):
        later += cut(SEED, partition, COUNT)[STORED:]
    trainer = process(world)
    trainer.recover()
    while trainer.learner.step < 19:
        trainer.turn()
        world.clock.advance(0.03)
    assert trainer.evaluation.windows[0].provisional(1 << 60).figures().samples == 0
    for rows, after in later:
        send(world.log, rows, after=after)
    to_the_end(trainer, world, [])
    steps = steps_of(world)
    assert {r.kind for r in steps[18].ranges} == {"stored"} and {r.kind for r in steps[19].ranges} == {"stored", "live"}
    live = sum(r.rows for s in steps for r in s.ranges if r.kind == "live")
    counted = trainer.evaluation.windows[0].provisional(1 << 60).figures().samples
    assert 0 < counted <= live and counted + trainer.evaluation.unscored == PARTITIONS * COUNT
