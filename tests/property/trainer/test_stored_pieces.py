"""Goal: a version of the lake that is read piece by piece comes in the same total order as one that is sorted whole.
Method: lakes of random rows, in both orders, with memory for a few rows only; reads fail at random, and reading goes on
at random places. The oracle sorts all rows by plain Python."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest
from trainer_world import Lake

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import Positions
from headrace.trainer.source.columns import StoredColumns
from headrace.trainer.source.pieces import Pieces
from headrace.trainer.source.stored import StoredRows

HOUR_MS = 3_600_000
SCHEMA = pa.schema(
    [
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("event_time_ms", pa.int64()),
        pa.field("task", pa.string()),
        pa.field("later", pa.string()),
    ]
)
COLUMNS = StoredColumns.whole(SCHEMA)
TASKS = ("click", "order")


class Flaky(Lake):
    """Fails now and then, and counts the rows that it gave out."""

    rng = Random(0)
    failing = 0.0
    most = total = 0

    def read(self, *args, **named):
        if self.rng.random() < self.failing:
            raise Unavailable("the store is away")
        rows = super().read(*args, **named)
        self.most, self.total = max(self.most, rows.num_rows), self.total + rows.num_rows
        return rows


def lake_of(rng: Random, *, lone_clock: bool = False) -> Flaky:
    """Return rows of a few hours with gaps between them; positions go by time, about."""
    rows = []
    base = 1_700_000_000_000 // HOUR_MS * HOUR_MS
    for partition in rng.sample(range(8), rng.randint(1, 3)):
        now, offset, rank = base, 0, 0
        for _ in range(rng.randint(0, 150)):
            now += rng.choice([0, 0, 1, 900, 20_000, 60_000, 5 * HOUR_MS if rng.random() < 0.1 else 0])
            at = max(base, now - rng.choice([0, 0, 1_000, 90_000, 2 * HOUR_MS]))
            if rng.random() < 0.3:
                offset, rank = offset + rng.randint(1, 3), 0
            if lone_clock and len(rows) == 3:
                at = now + 40 * HOUR_MS
            rows.append((partition, offset, rank, at, rng.choice(["click", "click", "order", "another"])))
            rank += 1
    rng.shuffle(rows)
    table = pa.table(
        [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), SCHEMA, strict=False)]
        if rows
        else [pa.array([], f.type) for f in list(SCHEMA)[:5]],
        names=SCHEMA.names[:5],
    )
    return Flaky(table, Positions(1), {})


def expected(lake: Lake, order: str) -> list[tuple[int, int, int]]:
    """Return the places of the tasks' rows in total order."""
    rows = [tuple(r.values()) for r in lake.rows.to_pylist() if r["task"] in TASKS]
    if order == "event_time":
        return [r[:3] for r in sorted(rows, key=lambda r: (r[3], *r[:3]))]
    reached, keyed = {}, []
    for row in sorted(rows, key=lambda r: r[:3]):
        reached[row[0]] = max(reached.get(row[0], 0), row[3])
        keyed.append((reached[row[0]], row[:3]))
    return [place for _, place in sorted(keyed)]


def places(rows: pa.Table) -> list[tuple[int, int, int]]:
    return list(zip(*(rows[n].to_pylist() for n in ("partition", "offset", "rank")), strict=True))


@pytest.mark.parametrize("order", ["event_time", "position"])
@pytest.mark.parametrize("lone_clock", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_pieces_are_the_whole_in_order(order: str, lone_clock: bool, seed: int):
    rng = Random(f"{seed}/{lone_clock}")
    lake, bytes_max = lake_of(rng, lone_clock=lone_clock), rng.choice([600, 3_000, 30_000, 1 << 20])
    pieces, found, ends = Pieces(lake, 5, COLUMNS, TASKS, order, bytes_max=bytes_max), [], [(0, 0)]
    lake.rng, lake.failing = rng, rng.choice([0.0, 0.3])
    while not pieces.is_done:
        try:
            rows, end_ms = pieces.next()
        except Unavailable:
            continue
        found += places(rows)
        if end_ms >= 0:
            ends.append((end_ms, len(found)))
        assert rows.schema.equals(SCHEMA) and rows["later"].null_count == rows.num_rows
    assert found == expected(lake, order)
    lake.failing = 0.0
    from_ms, before = rng.choice(ends)
    again, other_bytes = [], rng.choice([bytes_max, 2_000])
    rest = Pieces(lake, 5, COLUMNS, TASKS, order, bytes_max=other_bytes, from_ms=from_ms)
    while not rest.is_done:
        again += places(rest.next()[0])
    assert again == found[before:]


@pytest.mark.parametrize("order", ["event_time", "position"])
@pytest.mark.parametrize("seed", range(15))
def test_rows_are_taken_once_across_restarts(order: str, seed: int):
    rng = Random(seed)
    lake, bytes_max, background = lake_of(rng), rng.choice([600, 3_000, 1 << 20]), seed % 2 == 0
    whole, found, taken, place = expected(lake, order), [], 0, (0, 0)
    while True:
        stored = StoredRows(lake, COLUMNS, TASKS, "t", order=order, bytes_max=bytes_max, background=background)
        stored.open(5, taken=taken, place=place)
        if not stored.is_open:
            assert not whole
            return
        for _ in range(rng.randint(0, 9)):
            stored.read_ahead(20)
            wanted = stored.propose(rng.randint(1, 20))
            found += places(stored.take(wanted))
        taken, place = stored.taken, stored.place
        assert place[1] <= taken == len(found)
        stored.read_ahead(1)
        if stored.is_done:
            break
        stored.close()
    assert found == whole


def test_rows_that_are_gone_are_told():
    lake = lake_of(Random(4))
    pieces = Pieces(lake, 5, COLUMNS, TASKS, "event_time", bytes_max=600)
    lake.rows = lake.rows.slice(0, lake.rows.num_rows - 7)
    with pytest.raises(InvariantBroken, match="retention dropped"):
        while not pieces.is_done:
            pieces.next()


def test_no_read_takes_more_rows_than_memory_allows():
    """A wrong clock makes one piece of all that follows it in the log."""
    lake = lake_of(Random(11), lone_clock=True)
    pieces = Pieces(lake, 5, COLUMNS, TASKS, "position", bytes_max=3_000)
    most = 0
    while not pieces.is_done:
        most = max(most, pieces.next()[0].num_rows)
    assert 0 < most < 30 < lake.rows.num_rows


def test_rows_that_are_gone_of_an_hour_that_is_cut_are_told():
    """What is cut is counted anew: what the log says of the hour tells that rows are missing."""
    lake = lake_of(Random(4))
    layout = lake.layout(5)
    lake.layout = lambda version: layout  # type: ignore[method-assign]
    lake.rows = lake.rows.slice(0, lake.rows.num_rows - 7)
    with pytest.raises(InvariantBroken, match="are left"):
        pieces = Pieces(lake, 5, COLUMNS, TASKS, "event_time", bytes_max=600)
        while not pieces.is_done:
            pieces.next()


def test_late_rows_do_not_make_earlier_times_be_read_again():
    """One row in twenty is up to an hour late, which is many spans: each span is read whole once."""
    rng, rows, base = Random(9), [], 1_700_000_000_000 // HOUR_MS * HOUR_MS + HOUR_MS
    for number in range(6_000):
        late = rng.randrange(HOUR_MS) if rng.random() < 0.05 else 0
        rows.append((number % 2, number, 0, base + number * 1_200 - late, "click"))
    fields = list(SCHEMA)[:5]
    columns = zip(*rows, strict=True)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, fields, strict=True)], names=SCHEMA.names[:5])
    lake = Flaky(table, Positions(1), {})
    pieces, found = Pieces(lake, 5, COLUMNS, TASKS, "position", bytes_max=60_000), []
    while not pieces.is_done:
        found += places(pieces.next()[0])
    assert found == expected(lake, "position")
    # Once for hours that are cut, once for places, once whole; and a little more.
    assert lake.total < 4 * len(rows)
