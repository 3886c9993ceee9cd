"""Goal: rows that are proposed ahead are given out as proposed, each once, and nothing moves before they are given out.

Method: one source proposes several ranges ahead, another takes each before it proposes the next. A seed says how many
rows a range has, when samples come, and when they are taken; the lake comes first in half of the cases.
"""

from __future__ import annotations

from random import Random

import pytest
from trainer_world import PARTITIONS, PROJECT, TOPICS, World, cut, lake_of, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.positions import START
from headrace.trainer.source.source import Source

COUNT = 120


def source_of(world: World) -> Source:
    source = Source(PROJECT, world.log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics(), lake=world.lake)
    source.begin(None)
    return source


@pytest.mark.parametrize("seed", range(40))
def test_what_is_proposed_ahead_is_what_is_taken(seed):
    rng = Random(seed)
    world = World(lake=lake_of(seed, 2, COUNT) if seed % 2 else None)
    todo = [r for p in range(PARTITIONS) for r in cut(seed, p, COUNT)]
    todo.sort(key=lambda r: r[0]["event_time_ms"][0].as_py())
    source, waiting, taken, promised = source_of(world), [], [], None
    most_ahead = 0
    for _ in range(1_000):
        if len(taken) == PARTITIONS * COUNT:
            break
        for rows, after in todo[: rng.randint(0, 6)]:
            send(world.log, rows, after=after)
            todo.pop(0)
        source.poll(0.0)
        while source.ready_rows() and rng.random() < 0.7:
            before, cursor = source.positions(), source.cursor()
            rows_max = rng.choice((1, 7, 40))
            ready = source.ready_rows()
            ranges = source.propose(rows_max)
            assert 0 < sum(r.rows for r in ranges) <= rows_max
            assert source.ready_rows() in (ready - sum(r.rows for r in ranges), 0)
            waiting.append((ranges, source.positions_after(ranges)))
            assert source.positions() == before and source.cursor() == cursor
        most_ahead = max(most_ahead, len(waiting))
        while waiting and rng.random() < 0.6:
            ranges, promised = waiting.pop(0)
            assert source.has(ranges)
            taken += source.take(ranges)["event_id"].to_pylist()
            if not source.is_stored and ranges[0].kind == "live":
                assert source.positions() == promised
    assert len(taken) == len(set(taken)) == PARTITIONS * COUNT and most_ahead > 2
    assert all(each.taken > START and not each.ahead for each in source._live.partitions.values())
    following = {p: each.resume_offset for p, each in source._live.partitions.items()}
    assert following == world.log.reader().end_offsets(TOPICS.samples)


@pytest.mark.parametrize("seed", range(6))
def test_ranges_that_were_proposed_and_forgotten_are_proposed_again(seed):
    """The next process begins at the cursor of the one that died."""
    rng, world = Random(seed), World()
    for partition in range(PARTITIONS):
        for rows, after in cut(seed, partition, COUNT):
            send(world.log, rows, after=after)
    source, taken = source_of(world), []
    source.poll(0.0)
    for _ in range(5):
        taken += source.take(source.propose(20))["event_id"].to_pylist()
    cursor = source.cursor()
    forgotten = [source.propose(rng.randint(1, 30)) for _ in range(3)]
    again = source_of(world)
    again.begin(cursor)
    again.poll(0.0)
    for ranges in forgotten:
        assert again.propose(sum(r.rows for r in ranges)) == ranges
        taken += again.take(ranges)["event_id"].to_pylist()
    while again.ready_rows():
        taken += again.take(again.propose(50))["event_id"].to_pylist()
    assert sorted(taken) == sorted(f"{p}-{n}" for p in range(PARTITIONS) for n in range(COUNT))
