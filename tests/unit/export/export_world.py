"""What tests of the export share: a project with every kind of column, samples of it in a lake, and a plain oracle that
reads them one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.crawl import Crawl, Extract, external_columns
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import sample_schema
from headrace.contract.functions import feature_function
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import (
    PAD,
    Categorical,
    Counter,
    Cross,
    Custom,
    FeatureSpec,
    Mean,
    MultiValued,
    Numeric,
    Pairs,
    Product,
    Quantile,
    Rate,
    Recency,
    TimePart,
)
from headrace.stream.features.featurize import featurize

# 2026-11-25 00:00 UTC.
DAY_MS, HOUR_MS = 1_795_564_800_000, 3_600_000


@feature_function("export_halves", version=1)
def export_halves(item: pa.Array, price: pa.Array) -> Any:
    """Return two ids a row."""
    ids = [pc.fill_null(column, 0).to_numpy(zero_copy_only=False) for column in (item, price)]
    return np.stack([ids[0] % 2, 10 + (ids[1] > 2)], axis=1).astype(np.int64)


@feature_function("export_length", version=2)
def export_length(brand: pa.Array) -> pa.Array:
    """Return the length of a text that may be missing."""
    return pc.fill_null(pc.cast(pc.utf8_length(brand), pa.float32()), -1.0)


PROJECT = Project(
    name="exported",
    impression=ImpressionType(
        tag="x.impression",
        key="cookie",
        fields={
            "cookie": "string",
            "item": "int64",
            "price": "float64",
            "paid": "bool",
            "tags": "list[string]",
            "sizes": "list[int64]",
            "colour": "string",
        },
        private={"cookie": "hash"},
    ),
    feedback=(
        FeedbackType(
            name="click", tag="x.click", fields={"cookie": "string", "item": "int64"}, private={"cookie": "hash"}
        ),
        FeedbackType(
            name="order", tag="x.order", fields={"cookie": "string", "item": "int64"}, private={"cookie": "hash"}
        ),
    ),
    tasks=(
        Task(name="click", feedback="click", window_ms=1_000, correct_ms=1_000),
        Task(name="order", feedback="order", window_ms=5_000, policy="eager", correction_weight=2.0),
        Task(name="slow", feedback="order", window_ms=9_000),
    ),
    features=FeatureSpec(
        counters=(Counter(name="item", key="item", counts=("impression", "click", "last:click", "sum:order.value")),),
        features=(
            Categorical(field="item"),
            Cross(fields=("cookie", "item")),
            Pairs(fields=("item", "paid", "colour")),
            MultiValued(field="tags", values_max=3),
            Product(parts=(TimePart(part="hour"), Categorical(field="item"))),
            Numeric(field="price"),
            Rate(of="counter.item.click", over="counter.item.impression"),
            Numeric(field="price", transform="identity"),
            Categorical(field="external.stock.brand"),
            MultiValued(field="external.stock.kinds", values_max=2),
            Custom(function="export_halves", version=1, fields=("item", "price"), gives="slots", width=2),
            Custom(function="export_length", version=2, fields=("external.stock.brand",), gives="numbers"),
            Quantile(field="counter.item.click", edges=(0.0, 1.0, 3.0)),
            Quantile(field="external.stock.left", edges=(0.0, 2.0, 5.0)),
            Recency(of="counter.item.last:click", half_life_ms=5_000),
            Mean(of="counter.item.sum:order.value", over="counter.item.click"),
        ),
    ),
    crawls=(
        Crawl(
            name="stock",
            kind="json",
            joins="item",
            key=Extract(at="id"),
            fields={
                "brand": Extract(at="brand"),
                "left": Extract(at="left", type="float64"),
                "kinds": Extract(at="kinds", type="list[string]"),
            },
            start=("http://127.0.0.1/",),
        ),
    ),
).checked()
OLDER = msgspec.structs.replace(
    PROJECT,
    impression=msgspec.structs.replace(
        PROJECT.impression,
        fields={**{n: k for n, k in PROJECT.impression.fields.items() if n != "colour"}, "gone": "string"},
    ),
    features=FeatureSpec(
        counters=PROJECT.features.counters, features=(Categorical(field="gone"), Numeric(field="price"))
    ),
    crawls=(),
).checked()
"""The project before a change: it had `gone`, no `colour` and no crawler."""
FEATURES: tuple[tuple[str, str, int, int], ...] = (
    ("feature.categorical.item", "slots", 0, 0),
    ("feature.cross.cookie.item", "slots", 1, 0),
    ("feature.pairs.item.paid", "slots", 2, 0),
    ("feature.pairs.item.colour", "slots", 3, 0),
    ("feature.pairs.paid.colour", "slots", 4, 0),
    ("feature.multi.tags", "slots", 5, 3),
    ("feature.product.hour.item", "slots", 8, 1),
    ("feature.numeric.price", "numeric", 0, 0),
    ("feature.rate.item.click", "numeric", 1, 0),
    ("feature.rate.item.click.weight", "numeric", 2, 0),
    ("feature.numeric.price.2", "numeric", 3, 0),
    ("feature.categorical.external.stock.brand", "slots", 9, 0),
    ("feature.multi.external.stock.kinds", "slots", 10, 2),
    ("feature.custom.export_halves", "slots", 12, 2),
    ("feature.custom.export_length", "numeric", 4, 0),
    ("feature.quantile.counter.item.click", "numeric", 5, 0),
    ("feature.quantile.external.stock.left", "numeric", 6, 0),
    ("feature.recency.item.last:click", "numeric", 7, 0),
    ("feature.mean.item.sum:order.value", "numeric", 8, 0),
)
"""Column, where its values lie, the first of them, and how many a list takes (0: one value)."""


def impression_rows(rng: Random, project: Project, count: int, *, first: int, span_ms: int) -> list[dict[str, Any]]:
    """Return samples of `count` impressions: what the join might have emitted for their tasks, in any order."""
    found: list[dict[str, Any]] = []
    fields = project.impression.fields
    for number in range(first, first + count):
        shown: dict[str, Any] = {
            "cookie": f"hmac:{rng.randrange(5):032x}",
            "item": rng.choice([None, 1, 2, 2**62]),
            "price": rng.choice([None, 0.0, 2.5, -1.0]),
            "paid": rng.choice([None, True, False]),
            "tags": rng.choice([None, [], ["a"], ["b", "a", "b"], ["a", None]]),
            "sizes": rng.choice([None, [], [1, 2]]),
            "colour": rng.choice([None, "red", "é"]),
            "gone": rng.choice([None, "old"]),
            "external.stock.brand": rng.choice([None, "", "blå"]),
            "external.stock.left": rng.choice([None, 0.0, 3.5]),
            "external.stock.kinds": rng.choice([None, [], ["new"], ["a", "b", "c"]]),
            "external.stock.crawl_time_ms": rng.choice([0, DAY_MS - 1]),
        }
        known = {*fields, *external_columns(project.crawls)}
        row: dict[str, Any] = {name: value for name, value in shown.items() if name in known}
        row |= {name: rng.choice([None, float(rng.randrange(5))]) for name in project.features.counter_columns()}
        # Several have one time, and some are nearly neighbours otherwise.
        at_ms = DAY_MS + rng.randrange(span_ms) // 7 * 7
        row |= {"event_id": f"e{number}", "request_id": f"r{number // 2}", "place": number % 2, "key": row["cookie"]}
        row |= {"partition": rng.randrange(2), "event_time_ms": at_ms, "impression_offset": number // 3}
        row |= {"impression_row": number % 3, "version": rng.choice([None, "run-1"]), "spec": project.features.digest()}
        batch = pa.RecordBatch.from_pylist([row], schema=_inputs(project))
        slots_NF, numeric_ND = featurize(batch, project.features)
        row |= {"slots": slots_NF[0].tolist(), "numeric": numeric_ND[0].tolist()}
        for task in project.tasks:
            found += [row | label for label in _labels(rng, task, number, at_ms)]
    rng.shuffle(found)
    return found


def _inputs(project: Project) -> pa.Schema:
    fields = [(name, ARROW_TYPES[kind]) for name, kind in project.impression.fields.items()]
    counters = [(name, pa.float32()) for name in project.features.counter_columns()]
    external = [(name, ARROW_TYPES[kind]) for name, kind in external_columns(project.crawls).items()]
    return pa.schema([*fields, *counters, *external, ("event_time_ms", pa.int64())])


def _labels(rng: Random, task: Task, number: int, at_ms: int) -> list[dict[str, Any]]:
    """Return what a task's samples of one impression say: none yet, one, or a negative and its correction."""
    no = {"task": task.name, "label": 0.0, "weight": 1.0, "feedback_id": None, "feedback_time_ms": None}
    no |= {"correction": False, "value": None}
    yes = no | {"label": 1.0, "feedback_id": f"f{number}", "feedback_time_ms": at_ms + rng.randrange(900)}
    yes |= {"value": rng.choice([None, 9.5])}
    late = yes | {"correction": True, "weight": task.correction_weight}
    first = no if task.policy == "eager" else rng.choice([no, yes])
    corrects = first is no and (task.policy == "eager" or task.correct_ms)
    return rng.choice([[], [first], [first], [first, late] if corrects else [first]])


def store(lake: DeltaLake, project: Project, rows: Sequence[dict[str, Any]], commits: int, offset: int) -> int:
    """Append the samples in so many commits, with positions from `offset` on; return the next offset."""
    schema = sample_schema(project)
    for part in range(commits):
        some = [dict(row) for row in rows[part::commits]]
        at: dict[int, int] = {0: 0, 1: 0}
        for row in some:
            row["offset"], row["rank"] = offset, at[row["partition"]]
            at[row["partition"]] += 1
        last = {p: Position(offset, max(0, count - 1)) for p, count in at.items()}
        lake.append([pa.RecordBatch.from_pylist(some, schema=schema)], {0: offset + 1, 1: offset + 1}, last)
        offset += 1
    return offset


def oracle(rows: Sequence[dict[str, Any]], project: Project, begin_ms: int, end_ms: int, tasks: Sequence[str]) -> Any:
    """Return the impressions that an export of these samples must have, in order, as dictionaries."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    won: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    digest = project.features.digest()
    for row in rows:
        if not begin_ms <= row["event_time_ms"] < end_ms or row["task"] not in tasks:
            continue
        at = [row[name] for name in ("event_time_ms", "partition", "impression_offset", "impression_row", "event_id")]
        out = found.setdefault(tuple(at), _shown(row, project, digest, tasks))
        rank = (bool(row["correction"]), row["offset"], row["rank"])
        which = (*at, row["task"])
        if which in won and won[which] > rank:
            continue
        won[which] = rank
        out[f"label.{row['task']}"], out[f"value.{row['task']}"] = row["label"], row["value"]
        out[f"weight.{row['task']}"], out[f"corrected.{row['task']}"] = row["weight"], bool(row["correction"])
        out[f"feedback_id.{row['task']}"] = row["feedback_id"]
        out[f"feedback_timestamp.{row['task']}"] = _time(row["feedback_time_ms"])
    return [found[at] for at in sorted(found)]


def _time(at_ms: int | None) -> datetime | None:
    return (
        None
        if at_ms is None
        else datetime.fromtimestamp(at_ms // 1_000, UTC).replace(microsecond=at_ms % 1_000 * 1_000)
    )


def _shown(row: dict[str, Any], project: Project, digest: str, tasks: Sequence[str]) -> dict[str, Any]:
    out = {"event_timestamp": _time(row["event_time_ms"])}
    out |= {name: row[name] for name in ("event_id", "request_id", "place", "key", "version", "spec")}
    out |= {name: row.get(name) for name in (*project.impression.fields, "gone")}
    out |= {name: row.get(name) for name in project.features.counter_columns()}
    out |= {name: row.get(name) for name in external_columns(project.crawls)}
    kept = {"slots": row["slots"], "numeric": row["numeric"]}
    if row["spec"] != digest:
        schema = _inputs(project)
        batch = pa.RecordBatch.from_pylist([{name: row.get(name) for name in schema.names}], schema=schema)
        slots_NF, numeric_ND = featurize(batch, project.features)
        kept = {"slots": slots_NF[0].tolist(), "numeric": numeric_ND[0].tolist()}
    for name, where, first, width in FEATURES:
        some = kept[where][first : first + max(1, width)]
        out[name] = [slot for slot in some if slot != PAD] if width else some[0]
    labels = ("label", "value", "weight", "corrected", "feedback_id", "feedback_timestamp")
    return out | {f"{kind}.{task}": None for task in tasks for kind in labels}


def stored_rows(lake: DeltaLake, version: int | None = None) -> list[dict[str, Any]]:
    """Return the lake's samples one by one."""
    rows: list[dict[str, Any]] = lake.read(version).to_pylist()
    return rows


def filled_lake(folder: Path | str, rng: Random, *, older: int, newer: int, span_ms: int = 3 * HOUR_MS) -> DeltaLake:
    """Return a lake with samples of `older` impressions of the older project and `newer` of the project."""
    lake, offset = DeltaLake(str(folder), partitions=2), 0
    for project, count, first in ((OLDER, older, 0), (PROJECT, newer, older)):
        rows = impression_rows(rng, project, count, first=first, span_ms=span_ms)
        if rows:
            offset = store(lake, project, rows, rng.choice([1, 2, 3]), offset)
    return lake
