"""A project with three tasks, seeded traffic of it as records, and the join run over them with crashes."""

from __future__ import annotations

from random import Random

import pyarrow as pa

from headrace.contract.config import JoinConfig
from headrace.contract.formats.events import (
    AGGREGATE_SCHEMA,
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.rules import Change, encode_change
from headrace.contract.spec import Categorical, Counter, FeatureSpec, Numeric, Rate
from headrace.stream.join.join import JoinState
from headrace.stream.join.state import encode_state, load_state

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64", "price": "float64"}),
    feedback=(
        FeedbackType(name="click", tag="c", fields={"item": "int64"}),
        FeedbackType(name="order", tag="o", fields={"item": "int64"}),
    ),
    tasks=(
        Task(name="click", feedback="click", window_ms=500),
        Task(name="order", feedback="order", window_ms=2000),
        Task(name="soon", feedback="click", window_ms=100),
    ),
    features=FeatureSpec(
        counters=(
            Counter(name="u", key="user", counts=("impression", "click"), window_ms=2000, buckets=4),
            Counter(name="i", key="item", counts=("impression", "click", "order"), window_ms=2000, buckets=4),
            Counter(name="ui", key=("user", "item"), counts=("impression", "order"), window_ms=1000, buckets=4),
            Counter(name="pi", key=("price", "item"), counts=("impression",), window_ms=1000, buckets=2),
        ),
        features=(
            Categorical(field="item"),
            Numeric(field="price"),
            Rate(of="counter.u.click", over="counter.u.impression"),
            Rate(of="counter.i.click", over="counter.i.impression"),
            Rate(of="counter.ui.order", over="counter.ui.impression"),
            Numeric(field="counter.pi.impression"),
        ),
    ),
    recipe=Recipe(task="click"),
).checked()
CONFIG = JoinConfig(early_feedback_ms=400, resolved_ms=1600, repeat_horizon_ms=3200)
# Nothing is forgotten: every repeat is known as one.
LONG = JoinConfig(early_feedback_ms=400, resolved_ms=1600, repeat_horizon_ms=3_600_000)
SCHEMAS = {
    "impression": impression_schema(PROJECT),
    "click": feedback_schema(PROJECT, PROJECT.feedback[0]),
    "order": feedback_schema(PROJECT, PROJECT.feedback[1]),
    "aggregate": AGGREGATE_SCHEMA,
}
POSITION_COLUMNS = ["offset", "rank", "impression_offset", "impression_row"]

Item = tuple[str, dict | Punctuation | Change]


def traffic(seed: int, steps: int = 400) -> list[Item]:
    """Return rows and punctuation in log order: early, late, repeated and orphaned feedback included."""
    random = Random(seed)
    items: list[Item] = [("time", Punctuation("a", 1, 9_900))]
    shown: list[dict] = []
    now = 10_000
    for n in range(steps):
        now += random.randrange(0, 30)
        kind = random.choices(["impression", "click", "order", "time", "aggregate", "again"], [8, 5, 2, 3, 1, 1])[0]
        if kind == "time":
            bye = random.random() < 0.05
            items.append(("time", Punctuation(random.choice("ab"), 1, now - random.randrange(0, 60), bye)))
        elif kind == "aggregate":
            counts = [float(random.randrange(3)) for _ in range(3)]
            row = {"counter": "i", "key": str(random.randrange(5)), "as_of_ms": now - now % 100, "epoch": 1}
            pair = {**row, "counter": "pi", "key": f"{n % 4 + 1}:{row['key']}", "counts": counts[:1]}
            items.append(("aggregate", {**row, "counts": counts} if n % 3 else pair))
        elif kind == "again":
            items += random.sample([i for i in items if i[0] not in ("time", "aggregate")][-20:] or items[:1], 1)
        else:
            request = f"r{max(0, n + random.choice([0, 0, 0, 5, -5, -20, -60]))}" if kind != "impression" else f"r{n}"
            user = random.randrange(4)
            row = {"event_id": f"{kind}{n}", "request_id": request, "place": 0, "key": str(user)}
            row |= {"event_time_ms": now - random.randrange(0, 20), "user": user, "item": random.randrange(5)}
            if kind == "impression":
                row |= {"price": round(random.random() * 4) or None, "version": "v"}
                shown.append(row)
            elif shown and random.random() < 0.6:
                row["request_id"] = random.choice(shown[-15:])["request_id"]
            if kind != "impression":
                row["value"] = n / 4 if n % 3 else None
            items.append((kind, row))
    return items


def records(items: list[Item], random: Random | None, schemas: dict[str, pa.Schema] = SCHEMAS) -> list[Record]:
    """Return the items as records; with `random`, neighbours of one kind share a record at will."""
    made: list[Record] = []
    run: list[Item] = []

    def close() -> None:
        if run:
            kind = run[0][0]
            if kind == "time":
                value, headers = encode_punctuation(run[0][1]), {"kind": "punctuation"}
            elif kind == "spec":
                value, headers = encode_change(run[0][1]), {"kind": "spec"}
            else:
                value = encode_batch(batch_from_rows([row for _, row in run], schemas[kind]))
                named = kind in ("click", "order")
                headers = {"kind": "feedback", "type": kind} if named else {"kind": kind}
            made.append(Record("events", 0, len(made), None, value, headers, 0))
            run.clear()

    for item in items:
        alone = item[0] in ("time", "spec")
        if run and (random is None or item[0] != run[0][0] or alone or random.random() < 0.3):
            close()
        run.append(item)
    close()
    return made


def state(config: JoinConfig = CONFIG) -> JoinState:
    return JoinState(PROJECT, config, silent_ms=300, partition=0)


def drain(log: list[Record], crash: Random | None = None, config: JoinConfig = CONFIG) -> tuple[pa.Table, JoinState]:
    """Return all samples by the reader's rule; `crash` restores from an older snapshot now and then."""
    join, stored, at = state(config), None, 0
    tables: list[pa.RecordBatch] = []
    taken = (-1, -1)
    while at < len(log):
        emitted = join.take(log[at])
        at += 1
        if emitted is not None and emitted.last > taken:
            assert emitted.after == taken
            tables.append(emitted.batch)
            taken = emitted.last
        if crash is not None and crash.random() < 0.05:
            stored = encode_state(join)
        if crash is not None and crash.random() < 0.03:
            join = state()
            if stored is not None:
                load_state(join, stored)
            at = join.offset + 1
    return pa.Table.from_batches(tables, schema=join.schema), join
