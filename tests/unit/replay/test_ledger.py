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
from headrace.contract.spec import FeatureSpec, Numeric
from headrace.replay.ledger.draw import Expected, Found, draw
from headrace.replay.ledger.keys import JOINED, KEYS, covers, sample_ids
from headrace.replay.ledger.ledger import Ledger, TaskCounts, is_sound, table
from headrace.replay.ledger.refused import JUDGED, refused_ids
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
    lake = {3: stored}
    return Found(SAMPLES, SAMPLES, positions, steps, lambda v, *_: lake[v], letters, frozenset("ab"), [said])


def change(found: Found, **changes: object) -> Found:
    return Found(**{**{n: getattr(found, n) for n in Found.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def test_a_sound_pipeline_closes():
    ledger = draw(EXPECTED, sound(), recipe=RECIPE)
    assert ledger.closes
    assert (ledger.read, ledger.appended, ledger.dead_lettered, ledger.repeated) == (65, 58, 2, 5)
    assert (ledger.samples, ledger.learnt, ledger.stored) == (ROWS, ROWS, ROWS)
    assert ledger.dead_letters == {"future": 1, "bad_type": 1}
    assert sum(ledger.dead_letters.values()) == ledger.dead_lettered
    assert ledger.undeclared == 1, "an event of no declared tag is in no total, and told beside them"
    assert "1 event of tags that the project does not declare" in table(ledger)
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


def test_a_version_that_is_no_more_is_told_where_live_samples_were_learnt_beside_it():
    """The step after its last row stands behind what it held: where the live ranges of each partition began says it."""
    timed = SAMPLES.append_column("event_time_ms", pa.array([(i * 7) % ROWS for i in range(ROWS)]))
    steps = [
        step(1, StepRange("stored", version=3, start=0, stop=8), live(0, (7, 1), (8, 0), 1), positions={}),
        step(2, live(0, (8, 0), (8, 1), 1), positions={}),
        step(3, StepRange("stored", version=3, start=8, stop=20), live(0, (8, 1), (9, 1), 2), positions={}),
        step(4, live(1, (7, 1), (9, 1), 4), positions={"0": [9, 1], "1": [9, 1]}),
    ]
    held = timed.filter(pa.array(covers(timed, Positions.from_json(1, {"0": [7, 1], "1": [7, 1]}))))
    found = stored_by_log(timed, steps, 3, ("click",), retained=False)
    assert held.num_rows == 20 and found == held.sort_by("event_time_ms").select(KEYS.names)


def of_kinds(*kinds: tuple[int, str, str, bool]) -> pa.Table:
    """Return samples of one partition at these offsets: (offset, event id, task, correction)."""
    rows = [
        {"partition": 0, "offset": o, "rank": 0, "event_id": e, "task": t, "correction": c or None, "event_time_ms": o}
        | {"label": float(c)}
        for o, e, t, c in kinds
    ]
    return pa.Table.from_pylist(rows, schema=JOINED)


EAGER = of_kinds((1, "i1", "click", False), (2, "i2", "click", False), (9, "i1", "click", True))
"""An impression that was a negative at once and corrected later, and one that was not."""


def eager(samples: pa.Table = EAGER, *, model: str = "shop", run: str = "r1", **found: object) -> Ledger:
    """Draw a ledger of a run that took all of `samples` from version 3 of the lake, or of what is `found`."""
    took = StepRange("stored", version=3, stop=samples.num_rows, rows=samples.num_rows)
    keys, positions = samples.select(KEYS.names), {"0": [9, 0]}
    steps = [Step(model=model, run=run, step=1, ranges=(took,), positions=positions)]
    there = Positions.from_json(1, positions)
    sound = Found(keys, keys, there, steps, lambda *_: keys, [], frozenset(), [])
    return draw(Expected(samples, {}, 0, {}, 0, 0), change(sound, **found), recipe=RECIPE)


def test_a_correction_learnt_from_the_lake_is_not_its_negative():
    ledger = eager()
    assert (ledger.learnt, ledger.lost, ledger.twice, ledger.closes) == (3, 0, 0, True)


@pytest.mark.parametrize("where", ["topic", "lake"])
def test_a_correction_in_place_of_its_negative_is_found(where: str):
    """As many rows, and of the same impression and task: one is missing, one there twice."""
    wrong = EAGER.select(KEYS.names).take([1, 2, 2])
    ledger = eager(**{where: wrong})
    assert (ledger.lost_where[where], ledger.twice_where[where], ledger.closes) == (1, 1, False)


def test_what_a_learner_refuses_is_told_apart():
    ids = sample_ids(EAGER)
    ledger = eager(refused=ids.slice(1, 1))
    assert (ledger.learnt, ledger.refused, ledger.samples, ledger.closes) == (2, 1, 3, True)


def test_samples_that_no_learner_takes():
    spec = FeatureSpec(features=(Numeric(field="price"),))
    rows = [
        {"event_id": f"e{i}", "task": "click", "label": label, "weight": weight, "numeric": [number], "spec": digest}
        for i, (label, weight, number, digest) in enumerate(
            [
                (1.0, 1.0, 0.5, spec.digest()),
                (0.0, 1.0, float("nan"), spec.digest()),
                (0.0, -1.0, 0.5, spec.digest()),
                (2.0, 1.0, 0.5, spec.digest()),
                (0.0, 1.0, float("nan"), "another"),
                (0.0, float("inf"), 0.5, "another"),
            ]
        )
    ]
    table = pa.Table.from_pylist(rows, schema=JUDGED)
    refused = refused_ids(table, spec, Recipe())
    assert pa.compute.is_in(sample_ids(table), value_set=refused).to_pylist() == [False, True, True, True, False, True]
    assert len(refused_ids(JUDGED.empty_table(), spec, Recipe())) == 0


def test_every_run_is_held_against_its_own_steps():
    """Run r1 lost a row and r2, which is newer, took all; r1 goes on then and is the newest again."""
    took = StepRange("stored", version=3, stop=3, rows=3)
    short = live(0, (1, 0), (9, 0), 2)
    steps = [
        Step(model="shop", run="r1", step=1, ranges=(short,), positions={"0": [9, 0]}),
        Step(model="shop", run="r2", step=1, ranges=(took,), positions={"0": [9, 0]}),
    ]
    ledger = eager(steps=steps)
    assert [(m.run, m.learnt, m.lost, m.twice) for m in ledger.models.values()] == [("r1", 2, 1, 0), ("r2", 3, 0, 0)]
    assert (ledger.learnt, ledger.lost, ledger.lost_where["model"], ledger.closes) == (3, 1, 1, False)
    assert "run r1: 1 steps, 2 learnt, lost 1" in table(ledger)
    again = Step(model="shop", run="r1", step=2, ranges=(), positions={"0": [9, 0]})
    ledger = eager(steps=[*steps, again])
    assert (list(ledger.models), ledger.learnt, ledger.lost) == (["r2", "r1"], 2, 1)


MIXED = of_kinds(*((i, f"i{i}", task, False) for i, task in enumerate(("click", "order", "click", "like"), 1)))


@pytest.mark.parametrize("tasks", [("click",), ("order", "like"), ("click", "like", "order"), ("order",)])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_run_of_another_recipe_is_counted_by_its_own_tasks(tasks: tuple[str, ...], is_known: bool):
    """A recipe of other tasks: told by a snapshot, or found by how many rows the live ranges hold."""
    ours = MIXED.filter(pa.compute.is_in(MIXED["task"], value_set=pa.array(tasks)))
    upto = ours["offset"].to_pylist()
    ranges = (live(0, (-1, -1), (2, 0), sum(o <= 2 for o in upto)), live(0, (2, 0), (9, 0), sum(o > 2 for o in upto)))
    steps = [Step(model="shop", run="old", step=1, ranges=ranges, positions={"0": [9, 0]})]
    recipes = {"old": Recipe(task=tasks[0], tasks=tasks)} if is_known else {}
    ledger = eager(MIXED, steps=steps, recipes=recipes)
    run = ledger.models["old"]
    assert (run.learnt, run.sampled_out, run.other_tasks) == (len(upto), 0, 4 - len(upto))
    assert (run.lost, run.twice) == (0, 0)


def test_rows_of_a_version_that_is_no_more_are_named_and_not_lost():
    took = StepRange("stored", version=2, stop=2, rows=2)
    old = Step(model="shop", run="old", step=1, ranges=(took,), positions={"0": [2, 0]})
    now = Step(model="shop", run="now", step=1, ranges=(live(0, (-1, -1), (9, 0), 3),), positions={"0": [9, 0]})
    ledger = eager(steps=[old, now], stored_keys=lambda *_: None)
    assert (ledger.models["old"].unaccounted, ledger.models["old"].lost, ledger.closes) == (2, 0, True)
    assert "run old: 1 steps, 0 learnt, 2 rows of a version of the lake that is no more" in table(ledger)
    ledger = eager(steps=[now, old], stored_keys=lambda *_: None)
    assert (ledger.unaccounted, ledger.in_flight, ledger.closes) == (2, 1, False)


def aged(**found: object) -> Ledger:
    """Draw a ledger of 40 samples, one resolved every second, while the newest watermark is at 60 s."""
    order = np.argsort(SAMPLES["offset"].to_numpy() * 10 + SAMPLES["rank"].to_numpy(), kind="stable")
    resolved = np.zeros(ROWS, np.int64)
    resolved[order] = np.arange(ROWS) * 1_000
    expected = Expected(**{**EXPECTED.__dict__, "resolved_ms_N": resolved, "newest_ms": 60_000})
    return draw(expected, change(sound(), **found), recipe=RECIPE, behind_max_ms=30_000)


def test_nothing_is_behind_where_all_is_stored_and_learnt():
    ledger = aged()
    assert (ledger.behind_ms, ledger.overdue, is_sound(ledger)) == ({"lake": 0, "model": 0}, [], True)


def test_a_sink_that_stands_still_is_overdue_though_nothing_is_lost():
    """Case: the sink waited for its group for ever; nothing was stored for the rest of the run."""
    stood = change(sound(), lake=SAMPLES.filter(pa.compute.field("offset") <= 7))
    found = {"lake": stood.lake, "lake_positions": Positions.from_json(1, {"0": [7, 1], "1": [7, 1]})}
    ledger = aged(**found)
    assert (ledger.lost, ledger.closes, ledger.behind_ms["lake"]) == (0, True, 60_000 - 20_000)
    assert ledger.overdue == ["lake"] and not is_sound(ledger)
    assert "behind in lake: 40.0 s: OVERDUE" in table(ledger) and "`sink`" in table(ledger)
    nothing = {"lake": SAMPLES.slice(0, 0), "lake_positions": Positions(1)}
    assert aged(**nothing).behind_ms["lake"] == 60_000


def test_a_trainer_that_stands_still_or_never_came_is_overdue():
    stood = msgspec.structs.replace(sound().steps[2], positions={"0": [12, 1], "1": [7, 1]})
    ledger = aged(steps=[*sound().steps[:2], stood])
    assert ledger.behind_ms == {"lake": 0, "model": 60_000 - 20_000 - 1_000} and ledger.overdue == ["model"]
    assert aged(steps=[]).overdue == ["model"]


def test_what_a_run_has_still_to_learn_of_the_lake_is_told_by_its_ranges():
    """The positions of a run that learns the lake say nothing yet."""
    begun = [msgspec.structs.replace(sound().steps[0], positions={})]
    assert aged(steps=begun).behind_ms["model"] == 60_000 - 1_000, "partition 1's first sample"


def test_a_log_without_a_promise_has_no_age():
    assert draw(EXPECTED, change(sound(), steps=[]), recipe=RECIPE).behind_ms == {}


def test_samples_that_the_topic_has_forgotten_are_not_lost():
    """Retention took the topic's first records; the lake and the steps have them."""
    begins = Positions.from_json(1, {"0": [6, 1], "1": [5, 0]})
    left = SAMPLES.filter(pa.array(~covers(SAMPLES, begins)))
    ledger = draw(EXPECTED, change(sound(), topic=left, topic_begins=begins), recipe=RECIPE)
    assert (ledger.samples, ledger.learnt, ledger.lost, ledger.twice, ledger.closes) == (ROWS, ROWS, 0, 0, True)
    ledger = draw(EXPECTED, change(sound(), topic=left.slice(1), topic_begins=begins), recipe=RECIPE)
    assert (ledger.lost_where["topic"], ledger.lost) == (1, 1)
