"""The loss ledger.

Goal: it closes on a sound pipeline, and one missing or repeated row anywhere is found where it happened. Method: an
expected set of samples, effects made from it, each broken once in one place.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from headrace.contract.formats.dead_letters import DeadLetter
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.steps import Step, StepRange
from headrace.contract.recipe import Recipe
from headrace.replay.ledger.draw import Expected, Found, draw
from headrace.replay.ledger.keys import JOINED, KEYS, covers
from headrace.replay.ledger.ledger import TaskCounts
from headrace.replay.ledger.taken import stored_by_log

ROWS = 40
SAMPLES = pa.Table.from_pylist(
    [
        {"partition": i % 2, "offset": 3 + i // 4, "rank": (i // 2) % 2, "event_id": f"e{i}", "task": "click"}
        for i in range(ROWS)
    ],
    schema=KEYS,
).sort_by([("partition", "ascending"), ("offset", "ascending"), ("rank", "ascending")])
RECIPE = Recipe(task="click")
EXPECTED = Expected(
    samples=SAMPLES.append_column("event_time_ms", pa.nulls(ROWS, pa.int64()))
    .append_column("label", pa.array(np.arange(ROWS) % 4 == 0).cast(pa.float32()))
    .cast(JOINED),
    rows={"impression": 45, "feedback": 13, "external": 0},
    repeated_in_log=3,
    tasks={
        "click": TaskCounts(
            impressions=43, feedback=12, positives=10, negatives=30, waiting=3, matched=10, duplicate=1, late=1
        )
    },
    impressions=43,
    feedback=12,
)
ALL = {"0": [12, 1], "1": [12, 1]}


def live(partition: int, after: tuple[int, int], upto: tuple[int, int], rows: int) -> StepRange:
    return StepRange("live", 0, partition, after, upto, rows=rows)


def step(number: int, *ranges: StepRange, positions: dict[str, list[int]] = ALL) -> Step:
    return Step(model="shop", run="r1", step=number, ranges=ranges, positions=positions)


def sound() -> Found:
    """Four rows an offset (two a partition): the lake's first 10 rows of partition 0, then live."""
    stored = SAMPLES.filter(pa.compute.field("partition") == 0).slice(0, 10)
    steps = [
        step(1, StepRange("stored", version=3, start=0, stop=6, rows=6)),
        step(2, StepRange("stored", version=3, start=6, stop=10, rows=4)),
        step(3, live(0, (7, 1), (12, 1), 10), live(1, (-1, -1), (7, 1), 10)),
        step(4, live(1, (7, 1), (12, 1), 10)),
    ]
    said = Punctuation("g", 1, 0, counts={"read": 65, "appended": 58, "dead_lettered": 2, "repeated": 5})
    letters = [
        DeadLetter(reason=r, detail="", origin="", tag=t)
        for r, t in (("future", "a"), ("bad_type", "b"), ("undeclared", "c"))
    ]
    positions = Positions.from_json(1, ALL)
    return Found(SAMPLES, SAMPLES, positions, steps, {3: stored}.__getitem__, letters, frozenset("ab"), [said])


def change(found: Found, **changes: object) -> Found:
    return Found(**{**{n: getattr(found, n) for n in Found.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def test_a_sound_pipeline_closes():
    ledger = draw(EXPECTED, sound(), recipe=RECIPE)
    assert ledger.closes
    assert (ledger.read, ledger.appended, ledger.dead_lettered, ledger.repeated) == (65, 58, 2, 5)
    assert (ledger.samples, ledger.learnt, ledger.stored) == (ROWS, ROWS, ROWS)
    assert ledger.dead_letters == {"future": 1, "bad_type": 1, "undeclared": 1}
    assert (ledger.lost, ledger.twice, ledger.in_flight) == (0, 0, 0)
    assert msgspec.json.decode(msgspec.json.encode(ledger))["models"]["r1"]["steps"] == 4


def test_what_is_beyond_the_positions_is_on_its_way_and_not_lost():
    steps = [*sound().steps[:2], step(3, live(0, (7, 1), (12, 1), 10), positions={"0": [12, 1]})]
    lake = SAMPLES.filter(pa.compute.field("offset") <= 8)
    found = change(sound(), steps=steps, lake=lake, lake_positions=Positions.from_json(1, {"0": [8, 1], "1": [8, 1]}))
    ledger = draw(EXPECTED, found, recipe=RECIPE)
    assert ledger.closes
    assert (ledger.learnt, ledger.in_flight, ledger.lost) == (20, 20, 0)


@pytest.mark.parametrize("where", ["topic", "lake"])
@pytest.mark.parametrize("row", [0, 19, 20, ROWS - 2])
def test_one_row_missing_or_repeated_is_found(where: str, row: int):
    missing = pa.concat_tables([SAMPLES.slice(0, row), SAMPLES.slice(row + 1)])
    ledger = draw(EXPECTED, change(sound(), **{where: missing}), recipe=RECIPE)
    assert (ledger.lost_where[where], ledger.lost, ledger.twice, ledger.closes) == (1, 1, 0, False)
    repeated = pa.concat_tables([SAMPLES, SAMPLES.slice(row, 1)])
    ledger = draw(EXPECTED, change(sound(), **{where: repeated}), recipe=RECIPE)
    assert (ledger.twice_where[where], ledger.lost, ledger.twice, ledger.closes) == (1, 0, 1, False)


def test_a_row_nobody_logged_is_found():
    strange = SAMPLES.slice(0, 1).set_column(3, "event_id", pa.array(["made up"]))
    ledger = draw(EXPECTED, change(sound(), lake=pa.concat_tables([SAMPLES, strange])), recipe=RECIPE)
    assert ledger.twice_where["lake"] == 1 and not ledger.closes


def test_a_gap_and_an_overlap_between_steps_are_found():
    gap = [*sound().steps[:2], step(3, live(0, (7, 1), (12, 1), 10), live(1, (-1, -1), (7, 0), 9)), sound().steps[3]]
    ledger = draw(EXPECTED, change(sound(), steps=gap), recipe=RECIPE)
    assert (ledger.lost_where["model"], ledger.learnt, ledger.twice) == (1, ROWS - 1, 0)
    overlap = [*sound().steps[:3], step(4, live(1, (7, 0), (12, 1), 11))]
    ledger = draw(EXPECTED, change(sound(), steps=overlap), recipe=RECIPE)
    assert (ledger.twice_where["model"], ledger.learnt, ledger.lost) == (1, ROWS, 0)


def test_a_step_that_learnt_fewer_rows_than_its_range_holds_is_found():
    short = [*sound().steps[:3], step(4, live(1, (7, 1), (12, 1), 9))]
    assert draw(EXPECTED, change(sound(), steps=short), recipe=RECIPE).lost_where["model"] == 1


def test_a_receipt_for_what_the_log_lacks_is_a_loss():
    said = Punctuation("g", 1, 0, counts={"read": 67, "appended": 60, "dead_lettered": 2, "repeated": 5})
    ledger = draw(EXPECTED, change(sound(), punctuations=[said]), recipe=RECIPE)
    assert ledger.lost_where["log"] == 2 and not ledger.closes


def test_a_killed_gateway_said_less_than_it_did():
    said = [
        Punctuation("g", 1, 0, counts={"read": 10, "appended": 10, "dead_lettered": 0, "repeated": 0}),
        Punctuation("g", 1, 9, counts={"read": 30, "appended": 28, "dead_lettered": 0, "repeated": 1}),
        Punctuation("g", 2, 20, counts={"read": 20, "appended": 18, "dead_lettered": 1, "repeated": 1}),
    ]
    ledger = draw(EXPECTED, change(sound(), punctuations=said), recipe=RECIPE)
    assert (ledger.read, ledger.repeated, ledger.closes) == (62, 2, True)


def test_a_letter_that_was_offered_again_is_counted_where_its_event_ended():
    """Three declared letters: one is in the log now, one was there before, one is refused again by a newer letter."""
    old = [DeadLetter(reason="bad_type", detail="", origin="", tag="a", event_id=str(n)) for n in range(3)]
    newer = DeadLetter(reason="bad_type", detail="", origin="", tag="a", event_id="2", retry_of=2, attempts=1)
    said = Punctuation("g", 1, 0, counts={"read": 65, "appended": 57, "dead_lettered": 3, "repeated": 5})
    before = change(sound(), letters=old, punctuations=[said])
    rows = {**EXPECTED.rows, "impression": 44}
    ledger = draw(Expected(**{**EXPECTED.__dict__, "rows": rows}), before, recipe=RECIPE)
    assert (ledger.read, ledger.appended, ledger.dead_lettered, ledger.repeated) == (65, 57, 3, 5)
    after = change(
        before, letters=[*old, newer], retried=[(old[0], "appended"), (old[1], "repeated"), (old[2], "refused")]
    )
    ledger = draw(EXPECTED, after, recipe=RECIPE)
    assert (ledger.read, ledger.appended, ledger.dead_lettered, ledger.repeated) == (65, 58, 1, 6)
    assert (ledger.retried, ledger.closes, ledger.dead_letters) == (3, True, {"bad_type": 1})


def test_a_mark_for_what_the_log_lacks_is_a_loss():
    letter = DeadLetter(reason="undeclared", detail="", origin="", tag="a")
    said = Punctuation("g", 1, 0, counts={"read": 60, "appended": 58, "dead_lettered": 0, "repeated": 2})
    found = change(sound(), letters=[letter], punctuations=[said], retried=[(letter, "appended")])
    ledger = draw(EXPECTED, found, recipe=RECIPE)
    assert ledger.lost_where["log"] == 1 and not ledger.closes


@pytest.mark.parametrize("dropped", [0, 3])
def test_a_version_that_is_no_more_is_told_by_the_step_that_went_on_from_it(dropped: int):
    """The version held the first 10 rows of either partition; retention had taken the oldest `dropped` of them."""
    timed = SAMPLES.append_column("event_time_ms", pa.array([(i * 7) % ROWS for i in range(ROWS)]))
    known = {"0": [7, 1], "1": [7, 1]}
    steps = [
        step(1, StepRange("stored", version=3, start=0, stop=8), positions={}),
        step(2, StepRange("stored", version=3, start=8, stop=20 - dropped), positions={}),
        step(2, StepRange("stored", version=3, start=8, stop=20 - dropped), positions={}),
        step(3, live(0, (7, 1), (9, 1), 4), positions={"0": [9, 1], "1": [7, 1]}),
        step(4, live(1, (7, 1), (9, 1), 4), positions={"0": [9, 1], "1": [9, 1]}),
    ]
    held = timed.filter(pa.array(covers(timed, Positions.from_json(1, known)))).sort_by("event_time_ms")
    found = stored_by_log(timed, steps, 3, ("click",), retained=dropped > 0)
    assert held.num_rows == 20 and found == held.slice(dropped).select(KEYS.names)
    assert stored_by_log(timed, steps[:3], 3, ("click",), retained=False) is None
    assert stored_by_log(timed, steps, 4, ("click",), retained=False) is None
