"""The ledger of a run that goes on from another one.

Goal: it has the other run's steps up to there and none of its later ones, and what it left out by name is `skipped`;
from seals as in full. Method: a whole pipeline in memory; a run goes back, learns again, leaves samples out; faults are
planted on either side of the branch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_world import PROJECT, TOPICS, World, figures, repeated, without

from headrace.contract.formats.positions import Position, Positions
from headrace.contract.formats.steps import Branch, PassedOver, Step, decode_step, encode_step
from headrace.replay.ledger.ledger import Ledger, table
from headrace.trainer.identity import recipe_digest


def both(world: World) -> Ledger:
    sealed, full = world.draw("seals"), world.draw("full")
    assert sealed.drawn_from == "seals" and full.drawn_from == "log", sealed.not_sealed
    assert figures(sealed) == figures(full)
    return sealed


def advance(world: World, run: str, **kwargs: object) -> None:
    for partition in (0, 1):
        world.append(partition, 60)
    world.snapshot()
    world.store(33)
    world.learn(47, run=run, **kwargs)  # type: ignore[arg-type]


def positions_at(world: World, run: str, step: int) -> dict[int, Position]:
    records = [decode_step(r.value or b"") for r in world.log.partitions(TOPICS.steps)[0]]
    at = next(each for each in records if each.run == run and each.step == step and each.branch is None)
    return dict(Positions.from_json(1, at.positions).by_partition)


def go_back(world: World, new: str, run: str, step: int, left_out: tuple[PassedOver, ...] = ()) -> None:
    """Begin run `new` behind a step of `run`, as the verb does."""
    positions = positions_at(world, run, step)
    for each in left_out:
        positions[each.partition] = Position(*each.upto)
    world.taken[new], world.numbers[new] = dict(positions), step
    first = Step(
        model=PROJECT.name, run=new, step=step, ranges=(), positions=Positions(1, positions).to_json(),
        recipe=recipe_digest(PROJECT), branch=Branch(run=run, step=step, instead_of=run, passed_over=left_out),
    )  # fmt: skip
    world.log.append(TOPICS.steps, 0, encode_step(first), None, {})


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a pipeline whose run r1 has four steps."""
    made = World(tmp_path)
    for _ in range(4):
        advance(made, "r1")
    return made


def test_a_branch_has_the_other_runs_steps_up_to_there(world):
    go_back(world, "r2", "r1", 2)
    ledger = both(world)
    assert ledger.closes and ledger.models["r2"].steps == 2
    assert 0 < ledger.models["r2"].learnt < ledger.models["r1"].learnt
    advance(world, "r2")
    world.learn(run="r2")
    ledger = both(world)
    assert ledger.closes and list(ledger.models)[-1] == "r2" and ledger.models["r2"].steps == 4
    assert ledger.in_flight == 0 and ledger.models["r1"].in_flight > 0


def test_a_branch_is_known_from_what_was_kept(world):
    assert world.draw("seals").closes
    go_back(world, "r2", "r1", 3)
    world.learn(30, run="r2")
    assert world.draw("seals").closes
    world.learn(run="r2")
    ledger = both(world)
    assert ledger.closes and ledger.in_flight == 0 and ledger.models["r2"].steps == 5


def test_a_branch_of_a_branch(world):
    go_back(world, "r2", "r1", 3)
    world.learn(20, run="r2")
    world.learn(20, run="r2")
    go_back(world, "r3", "r2", 4)
    world.learn(run="r3")
    ledger = both(world)
    assert ledger.closes and ledger.models["r3"].steps == 5 and ledger.models["r2"].steps == 5


def skipped(world: World, run: str, step: int) -> tuple[PassedOver, ...]:
    found = []
    for partition, after in positions_at(world, run, step).items():
        rows, upto = world.between(partition, after, 21)
        if rows.num_rows:
            found.append(
                PassedOver(partition=partition, after=tuple(after), upto=tuple(upto), why="skipped")  # type: ignore[arg-type]
            )
    return tuple(found)


def test_what_is_left_out_by_name_is_skipped_and_not_lost(world):
    left_out = skipped(world, "r1", 2)
    assert left_out
    go_back(world, "r2", "r1", 2, left_out)
    world.learn(run="r2")
    ledger = both(world)
    assert ledger.closes and ledger.lost == 0 and ledger.skipped > 0
    assert ledger.models["r1"].skipped == 0
    assert "skipped" in table(ledger)


def test_planted_a_gap_that_nobody_named_is_lost(world):
    for each in skipped(world, "r1", 2):
        world.taken["r1"][each.partition] = Position(*each.upto)
    left_out = skipped(world, "r1", 2)
    go_back(world, "r2", "r1", 2)
    for each in left_out:
        world.taken["r2"][each.partition] = Position(*each.upto)
    world.learn(run="r2")
    ledger = world.draw("full")
    assert not ledger.closes and ledger.models["r2"].lost > 0 and ledger.models["r2"].skipped == 0


@pytest.mark.parametrize(("change", "what"), [(without(2), "lost"), (repeated(2), "twice")])
def test_a_fault_behind_the_branch_is_found_from_seals(world, change, what):
    go_back(world, "r2", "r1", 2)
    assert both(world).closes
    world.learn(40, change, run="r2")
    for mode in ("seals", "full"):
        ledger = world.draw(mode)
        assert getattr(ledger.models["r2"], what) == 2 and ledger.models["r1"].lost == 0 and not ledger.closes


def test_planted_a_branch_that_counts_the_later_steps_of_the_other_run_is_seen(world, monkeypatch):
    from headrace.replay.ledger import draw
    from headrace.trainer.commit.lineage import lineages

    def whole(steps, *runs):  # type: ignore[no-untyped-def]
        found = lineages(steps, *runs)
        later = [s for s in steps if s.run == "r1" and s.step > 2]
        return found | {"r2": found["r2"] + later}

    monkeypatch.setattr(draw, "lineages", whole)
    go_back(world, "r2", "r1", 2)
    world.learn(run="r2")
    ledger = world.draw("full")
    assert ledger.models["r2"].twice > 0
