"""Goal: drawing at any moments on the way changes nothing of what is drawn at the end.

Method: a pipeline that goes on in random pieces, from a seed. Now and then it is drawn from seals, and what that keeps
is what the next drawing begins with; a full drawing of the same moment stands beside it.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from ledger_world import TOPICS, World, exchanged, figures, repeated, without

SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 40))]


def go_on(world: World, random: Random, fault: str = "") -> None:
    """Do one thing that a stage does; the join's state is newer than what is drawn, or older."""
    change = {"": lambda rows: rows, "lost": without(0), "twice": repeated(0), "swap": exchanged(0)}[fault]
    what = "append" if random.random() < 0.4 else random.choice(["store", "learn", "learn", "other"])
    if what == "append":
        world.append(random.randrange(2), random.randint(1, 60))
    elif what == "store":
        world.store(random.randint(1, 60), change, partitions=random.choice([(0,), (1,), (0, 1)]))
    elif what == "learn":
        world.learn(random.randint(1, 60), change)
    else:
        world.learn(random.randint(1, 60), run="r2", heads=("order", "soon"))


@pytest.mark.parametrize("seed", SEEDS)
def test_drawings_on_the_way_change_nothing_of_the_last_one(tmp_path: Path, seed: int):
    random, world = Random(seed), World(tmp_path, seed=seed + 1)
    for _ in range(30):
        go_on(world, random)
        if random.random() < 0.2:
            world.snapshot()
            sealed, full = world.draw("seals"), world.draw("full")
            assert figures(sealed) == figures(full) and sealed.closes, (sealed.not_sealed, sealed.reread)
    world.snapshot()
    last = world.draw("seals")
    afresh = {name: data for name, data in world.blobs.items.items() if not name.startswith("ledger/")}
    world.blobs.items = afresh
    assert figures(last) == figures(world.draw("seals")) == figures(world.draw("full"))
    assert last.drawn_from == "seals" or not world.samples[0] or not world.samples[1]
    if last.drawn_from == "seals":
        for partition in (0, 1):
            world.log.trim(TOPICS.events, partition, max(0, world.states[partition].offset))
        assert figures(world.draw("seals")) == figures(last)


@pytest.mark.parametrize("fault", ["lost", "twice", "swap"])
@pytest.mark.parametrize("seed", range(2))
def test_faults_on_the_way_are_counted_as_in_a_full_drawing(tmp_path: Path, seed: int, fault: str):
    random, world = Random(seed), World(tmp_path, seed=seed + 1)
    for _ in range(20):
        go_on(world, random, fault if random.random() < 0.3 else "")
        if random.random() < 0.15:
            world.snapshot()
            world.draw("seals")
    world.snapshot()
    sealed, full = world.draw("seals"), world.draw("full")
    # What was learnt is what the ranges hold in a full drawing, and what the steps say here.
    assert (sealed.lost_where, sealed.twice_where) == (full.lost_where, full.twice_where)
    assert sealed.closes == full.closes and (sealed.lost + sealed.twice > 0) == (not sealed.closes)
