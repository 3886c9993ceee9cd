"""Goal: recorded ranges find the same rows in the topic, in the lake before it, and in a version of the lake.
Method: the trainer's small world; one source proposes the ranges, other readers find them."""

from __future__ import annotations

import pytest
from trainer_world import COUNT, PARTITIONS, PROJECT, TOPICS, World, cut, lake_of, send

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.steps import StepRange
from headrace.trainer.source.columns import stored_columns
from headrace.trainer.source.live import LivePartition, LiveRows
from headrace.trainer.source.range_reader import RangeReader
from headrace.trainer.source.source import Source
from headrace.trainer.source.stored import StoredRows

SCHEMA, COLUMNS, TASKS = sample_schema(PROJECT), stored_columns(PROJECT), PROJECT.recipe.heads


def proposed(world: World, lake=None):
    """Yield what a source proposes and then gives out, to the end of what there is."""
    source = Source(PROJECT, world.log.reader(), TOPICS.samples, generation=1, metrics=MemoryMetrics(), lake=lake)
    source.begin(None)
    source.poll(0.0)
    while source.ready_rows():
        ranges = source.propose(50)
        yield ranges, source.take(ranges)
        source.poll(0.0)


@pytest.fixture
def world() -> World:
    world = World()
    for partition in range(PARTITIONS):
        for rows, after in cut(3, partition, COUNT):
            send(world.log, rows, after=after)
    return world


def reader_of(world: World, *, in_lake: int, begun: Position = START) -> RangeReader:
    """Return a reader with the first `in_lake` records of each partition from a lake, the others from the topic."""
    live = LiveRows(SCHEMA, TASKS)
    for partition in range(PARTITIONS):
        live.partitions[partition] = LivePartition.at(begun, in_lake)
        if in_lake:
            lake = lake_of(3, in_lake)
            rows = lake.rows.filter([p == partition for p in lake.rows["partition"].to_pylist()])
            live.seed(partition, rows, lake.positions.at(partition))
        for record in world.log.partitions(TOPICS.samples)[partition][max(0, in_lake - 1) :]:
            live.intake(record)
    return RangeReader(StoredRows(lake_of(3, 4), COLUMNS, TASKS, "test"), live, SCHEMA)


@pytest.mark.parametrize("in_lake", [0, 1, 4])
def test_live_ranges_find_the_same_rows_wherever_they_are_read(world, in_lake):
    reader, count = reader_of(world, in_lake=in_lake), 0
    for ranges, rows in proposed(world):
        assert reader.has(ranges)
        assert reader.take(ranges).equals(rows)
        count += rows.num_rows
    assert count == PARTITIONS * COUNT


def test_stored_ranges_come_in_total_order_and_the_topic_goes_on_behind_them(world):
    lake = lake_of(3, 4)
    stored, found = StoredRows(lake, COLUMNS, TASKS, "test"), []
    stored.open(lake.version)
    for ranges, rows in proposed(world, lake):
        found.append(rows.num_rows)
        if ranges[0].kind == "stored":
            assert stored.take(ranges[0]).equals(rows)
            last = ranges[0]
    assert sum(found) == PARTITIONS * COUNT and stored.is_done and last.stop == lake.rows.num_rows


def test_rows_before_the_first_range_are_left_out(world):
    """A run that began with stored rows takes live ones behind them, and a newer lake holds both."""
    first = Position(10, 0)
    reader = reader_of(world, in_lake=4, begun=first)
    upto = (12, 1)
    wanted = StepRange(kind="live", partition=0, after=first, upto=upto, rows=7)
    assert [(r["offset"], r["rank"]) for r in reader.take((wanted,)).to_pylist()] == [
        *[(10, 1), (10, 2)],
        *[(11, 0), (11, 1), (11, 2)],
        *[(12, 0), (12, 1)],
    ]


def test_a_range_that_is_not_the_next_one_is_refused(world):
    reader = reader_of(world, in_lake=0)
    with pytest.raises(InvariantBroken, match="it is at"):
        reader.take((StepRange(kind="live", partition=0, after=(3, 0), upto=(4, 0), rows=3),))
    with pytest.raises(InvariantBroken, match="at row 0 of version -1"):
        reader.has((StepRange(kind="stored", version=5, start=0, stop=3, rows=3),))
    with pytest.raises(InvariantBroken, match="took 5 samples and 3 are stored"):
        reader.take((StepRange(kind="live", partition=0, upto=(0, 2), rows=5),))
