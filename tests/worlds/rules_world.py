"""Projects that follow each other, and traffic that leads from one to the next: for tests of a change of rules."""

from __future__ import annotations

from random import Random

from join_world import PROJECT, Item, traffic
from msgspec import structs

from headrace.contract.formats.events import AGGREGATE_SCHEMA, feedback_schema, impression_schema
from headrace.contract.project import FeedbackType, Task
from headrace.contract.rules import Change, change_of
from headrace.contract.spec import Bucket, Categorical, Counter, FeatureSpec, Numeric, Rate

LATE = structs.replace(
    PROJECT,
    tasks=(structs.replace(PROJECT.tasks[0], window_ms=200, correct_ms=700, correction_weight=3.0), *PROJECT.tasks[1:]),
).checked()
"""The click's window is shorter, and late clicks correct it."""

WIDE = structs.replace(
    PROJECT,
    impression=structs.replace(PROJECT.impression, fields={**PROJECT.impression.fields, "device": "string"}),
    feedback=(*PROJECT.feedback, FeedbackType(name="dwell", tag="d", fields={"item": "int64"})),
    tasks=(
        structs.replace(PROJECT.tasks[2], policy="eager", correction_weight=2.0),
        structs.replace(PROJECT.tasks[0], window_ms=900, correct_ms=500),
        Task(name="stay", feedback="dwell", window_ms=300, correct_ms=900),
    ),
    features=FeatureSpec(
        counters=(
            PROJECT.features.counters[1],
            Counter(name="dwells", key="user", counts=("dwell", "sum:dwell.value", "last:click"), window_ms=1_000),
            Counter(name="items", key="item", counts=("dwell", "impression", "click", "order"), window_ms=3_000),
        ),
        features=(
            Categorical(field="device"),
            Categorical(field="item"),
            Bucket(field="price", edges=(2.0, 5.0)),
            Numeric(field="counter.dwells.sum:dwell.value"),
            Rate(of="counter.i.click", over="counter.i.impression"),
            Rate(of="counter.items.click", over="counter.items.impression"),
        ),
    ),
).checked()
"""A field, a feedback type, a task and counters more; a task and a counter less; another policy and windows."""

PROJECTS = (PROJECT, LATE, WIDE)
SCHEMAS = {
    "impression": impression_schema(WIDE),
    **{feedback.name: feedback_schema(WIDE, feedback) for feedback in WIDE.feedback},
    "aggregate": AGGREGATE_SCHEMA,
}


def changing(seed: int, steps: int = 400, changes: int = 3, order: tuple[int, ...] = ()) -> list[Item]:
    """Return traffic in which the rules change, each change written twice at times, and dwells among the feedback.

    Args:
        order: the projects to change to; by the seed otherwise.
    """
    random = Random(seed)
    items: list[Item] = []
    for kind, row in traffic(seed, steps):
        if kind == "impression":
            row = {**row, "device": random.choice(["phone", "desk", None])}
        elif kind == "order" and random.random() < 0.4:
            kind, row = "dwell", {**row, "event_id": f"d{row['event_id']}", "value": random.random()}
        elif kind == "aggregate" and random.random() < 0.5 and row["counter"] == "i":
            row = {**row, "counter": "items", "counts": [*row["counts"], 1.0]}
        items.append((kind, row))
    places = sorted(random.sample(range(1, len(items)), changes))
    for number, at in reversed(list(enumerate(places, start=2))):
        project = order[number - 2] if order else random.randrange(len(PROJECTS))
        items.insert(at, ("spec", change(project, number)))
        if random.random() < 0.4:
            items.insert(min(len(items), at + random.randrange(1, 20)), items[at])
    return items


def change(project: int, number: int) -> Change:
    """Return a change to one of the projects."""
    return change_of(PROJECTS[project], number, now_ms=0)
