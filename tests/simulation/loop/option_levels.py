"""The factors of the matrix of options and their levels: what each declares, what it sends, and what must be seen."""

from __future__ import annotations

import json
from collections import Counter as Tally
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from option_draft import SHOWN_TAG, Draft, heads

from headrace.contract.crawl import Crawl, Extract
from headrace.contract.functions import ModelShape, feature_function, model_function
from headrace.contract.mapping import AccessLog, Route
from headrace.contract.project import Recipe, Task
from headrace.contract.spec import (
    Bucket,
    Categorical,
    Counter,
    Custom,
    Mean,
    MultiValued,
    Numeric,
    Pairs,
    Product,
    Quantile,
    Rate,
    Recency,
    Text,
    TimePart,
)
from headrace.trainer.recipes import dcn, deepfm, fm, late_positives, logistic_ftrl, module_of

if TYPE_CHECKING:
    from option_world import Outcome

Level = Callable[[Draft], None]


def nothing(draft: Draft) -> None:
    """Declare nothing."""


# -- the partition key, and what is private


def int_key(draft: Draft) -> None:
    draft.fields["user"] = draft.told["user"] = "int64"


def hashed_key(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        assert "person-" not in out.loop.stored_text()
        known = {out.loop.privacy.hash(f"person-{n}") for n in range(5)}
        assert {row["user"] for row in out.rows()} <= known and {row["key"] for row in out.rows()} <= known

    draft.private["user"] = "hash"
    draft.checks.append(check)


def hashed_field(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        assert "@mail" not in out.loop.stored_text()
        assert len({row["mail"] for row in out.rows()}) == 4

    draft.private["mail"] = "hash"
    draft.fields["mail"] = "string"
    draft.features.append(Categorical(field="mail"))
    draft.shown.append(lambda number, record: record.update(mail=f"a{number % 4}@mail"))
    draft.checks.append(check)


def dropped_field(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        assert "+43-" not in out.loop.stored_text() and "phone" not in out.samples.column_names

    draft.private["phone"] = "drop"
    draft.shown.append(lambda number, record: record.update(phone=f"+43-{number}"))
    draft.checks.append(check)


# -- fields that nobody declared


def surprise(draft: Draft) -> None:
    """Send a field that is not declared."""
    draft.shown.append(lambda number, record: record.update(surprise=f"news-{number}"))


def unknown_dropped(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        assert "news-" not in str(out.samples.to_pylist())

    surprise(draft)
    draft.checks.append(check)


def unknown_kept(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        kept = [json.loads(row["extra"])["surprise"] for row in out.rows()]
        assert sorted(kept) == sorted(record["surprise"] for record in out.shown.values())

    surprise(draft)
    draft.unknown = "keep"
    draft.checks.append(check)


def unknown_refused(draft: Draft) -> None:
    """The events of the row have none; one that has is a dead letter, and a question with one is answered 422."""

    def check(out: Outcome) -> None:
        status, answer = out.loop.ask({"request_id": "r", "context": {"surprise": 1}, "candidates": [{"item": 1}]})
        assert status == 422 and "surprise" in answer["error"]
        refused = [letter for letter in out.loop.letters() if letter.reason == "unknown_field"]
        assert [letter.event_id for letter in refused] == ["strange"] and "surprise" in refused[0].detail

    draft.unknown = "refuse"
    draft.refused["unknown_field"] = 1
    draft.before.append((SHOWN_TAG, {"event_id": "strange", "request_id": "strange", "surprise": 1, "item": 1}))
    draft.checks.append(check)


# -- tasks


def eager(draft: Draft) -> None:
    draft.tasks = (Task(name="click", feedback="click", window_ms=draft.window_ms, policy="eager"),)


def corrected(draft: Draft) -> None:
    draft.tasks = (
        Task(
            name="click",
            feedback="click",
            window_ms=draft.window_ms,
            correct_ms=draft.correct_ms,
            correction_weight=2.0,
        ),
    )


def two_tasks(draft: Draft) -> None:
    draft.tasks = (*draft.tasks, Task(name="order", feedback="order", window_ms=2 * draft.window_ms))


def mixed_tasks(draft: Draft) -> None:
    corrected(draft)
    soon = Task(name="soon", feedback="order", window_ms=3 * draft.window_ms // 4, policy="eager")
    draft.tasks = (*draft.tasks, soon, Task(name="same", feedback="click", window_ms=draft.window_ms))


# -- features


def plain_features(draft: Draft) -> None:
    draft.features += [
        Bucket(field="price", edges=(2.0, 3.0)),
        Numeric(field="price", transform="identity", scale=0.5),
        Numeric(field="price", transform="log1p"),
        Pairs(fields=("user", "item", "page"), space=1_000),
    ]


def list_features(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        for row in out.rows():
            sent = out.shown[row["event_id"]]
            assert (row["tags"], row["sizes"]) == (sent["tags"], sent["sizes"])

    def tags(number: int, record: dict[str, Any]) -> None:
        record["tags"] = [f"t{n}" for n in range(number % 4)]
        record["sizes"] = [number % 3, 7] if number % 5 else None
        record["genres"] = "drama|comedy" if number % 2 else "drama"

    draft.fields |= {"tags": "list[string]", "sizes": "list[int64]", "genres": "string"}
    draft.told |= {"tags": "list[string]", "sizes": "list[int64]"}
    words = MultiValued(field="tags", values_max=3)
    draft.features += [
        words,
        MultiValued(field="sizes"),
        MultiValued(field="genres", separator="|", values_max=2),
        Product(parts=(TimePart(part="hour"), words), values_max=4),
    ]
    draft.shown.append(tags)
    draft.checks.append(check)


def text_features(draft: Draft) -> None:
    def texts(number: int, record: dict[str, Any]) -> None:
        record |= {"title": f"Red shoes {number % 6}", "is_new": number % 3 == 0, "made_ms": 86_400_000 * (number % 9)}

    draft.fields |= {"title": "string", "is_new": "bool", "made_ms": "int64"}
    draft.told |= {"is_new": "bool", "price": "float64"}
    draft.features += [
        Text(field="title", unit="word", ngram_max=2, values_max=6),
        Text(field="title", unit="char", ngram_min=2, ngram_max=3),
        Categorical(field="is_new"),
        TimePart(part="hour", utc_offset_minutes=120),
        TimePart(part="day_of_week", field="made_ms"),
        TimePart(part="hour_of_week"),
        TimePart(part="minute_of_day"),
    ]
    draft.shown.append(texts)


def number_features(draft: Draft) -> None:
    entries = ("impression", "click", "sum:order.value", "last:click")
    draft.counters.append(Counter(name="stock", key="item", counts=entries))
    draft.features += [
        Quantile(field="price", edges=(0.0, 2.0, 5.0)),
        Rate(of="counter.stock.click", over="counter.stock.impression", prior=0.2, strength=4.0, log_odds=True),
        Mean(of="counter.stock.sum:order.value", over="counter.stock.click", prior=1.0, strength=2.0, scale=0.5),
        Recency(of="counter.stock.last:click", half_life_ms=5_000),
    ]


@feature_function("matrix_length", version=2)
def matrix_length(page: pa.Array) -> pa.Array:
    """Return the length of a text."""
    return pc.cast(pc.utf8_length(page), pa.float32())


@feature_function("matrix_halves", version=1)
def matrix_halves(item: pa.Array, price: pa.Array) -> Any:
    """Return two ids a row."""
    return np.stack([item.to_numpy(zero_copy_only=False) % 2, 10 + (price.to_numpy() > 2)], axis=1).astype(np.int64)


def own_features(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        assert {row["numeric"][-1] for row in out.rows()} == {2.0}

    draft.features.append(Custom(function="matrix_halves", version=1, fields=("item", "price"), gives="slots", width=2))
    draft.last.append(Custom(function="matrix_length", version=2, fields=("page",), gives="numbers"))
    draft.checks.append(check)


# -- counters


def _counted(name: str, key: Callable[[dict[str, Any]], Any], *, is_exact: bool) -> Callable[[Outcome], None]:
    """Return a check of how many impressions of its key each impression had before it: no more than the log had, and
    exactly so many where the join itself counts."""

    def check(out: Outcome) -> None:
        seen, column = Tally[Any](), f"counter.{name}.impression"
        rows = out.rows()
        for row in rows:
            whole = seen[key(row)] if is_exact else 10**6
            if row["version"] is None:
                assert row[column] == whole if is_exact else 0 <= row[column] <= whole
            seen[key(row)] += 1
        assert max(row[column] for row in rows) > 3

    return check


def local_counter(draft: Draft) -> None:
    entries = ("impression", "click", "sum:impression.price", "last:impression")
    draft.counters += [
        Counter(name="user", key="user", counts=entries),
        Counter(name="fading", key="user", counts=("click",), window_ms=8_000, buckets=16, half_life_ms=2_000),
    ]
    draft.features += [Numeric(field="counter.user.impression"), Numeric(field="counter.fading.click")]
    draft.checks.append(_counted("user", lambda row: row["key"], is_exact=True))


def shared_counter(draft: Draft) -> None:
    draft.counters += [
        Counter(name="item", key="item", counts=("impression", "order"), window_ms=600_000),
        Counter(name="trend", key="item", counts=("impression",), window_ms=8_000, buckets=8, half_life_ms=2_000),
    ]
    draft.features += [Rate(of="counter.item.order", over="counter.item.impression")]
    draft.features += [Numeric(field="counter.trend.impression")]
    draft.checks.append(_counted("item", lambda row: row["item"], is_exact=False))


def local_pair_counter(draft: Draft) -> None:
    draft.counters.append(Counter(name="pair", key=("user", "page"), counts=("impression", "click")))
    draft.features.append(Rate(of="counter.pair.click", over="counter.pair.impression"))
    draft.checks.append(_counted("pair", lambda row: (row["key"], row["page"]), is_exact=True))


def shared_pair_counter(draft: Draft) -> None:
    draft.counters.append(Counter(name="spot", key=("item", "page"), counts=("impression", "click")))
    draft.features.append(Bucket(field="counter.spot.impression", edges=(1.0, 2.0)))
    draft.checks.append(_counted("spot", lambda row: (row["item"], row["page"]), is_exact=False))


# -- what comes from elsewhere


def _crawl(draft: Draft, kind: Any, body: bytes, content_type: str, **how: Any) -> None:
    def check(out: Outcome) -> None:
        rows = [row for row in out.rows() if row["external.shelf.crawl_time_ms"]]
        assert len(rows) > 20 and {row["external.shelf.brand"] for row in rows} == {"b0", "b1", "b2", "b3"}
        assert all(row["external.shelf.brand"] == f"b{row['item']}" for row in rows)

    draft.crawls.append(Crawl(name="shelf", kind=kind, joins="item", start=("https://shelf.example/",), **how))
    draft.page = body, content_type
    draft.features.append(Categorical(field="external.shelf.brand"))
    draft.checks.append(check)


def json_crawl(draft: Draft) -> None:
    def check(out: Outcome) -> None:
        row = next(row for row in out.rows() if row["external.shelf.brand"] == "b2")
        assert [row[f"external.shelf.{name}"] for name in fields] == ["b2", 4.5, ["x", "y"], True, 9]

    at = {"brand": "string", "price": "float64", "tags": "list[string]", "fresh": "bool", "stock": "int64"}
    fields = {name: Extract(at=name, type=kind) for name, kind in at.items()}  # type: ignore[arg-type]
    items = [
        {"id": n, "brand": f"b{n}", "price": 2.5 + n, "tags": ["x", "y"], "fresh": True, "stock": 9} for n in range(4)
    ]
    body = json.dumps({"items": items}).encode()
    _crawl(draft, "json", body, "application/json", rows="items", key=Extract(at="id", type="int64"), fields=fields)
    draft.features += [
        MultiValued(field="external.shelf.tags", values_max=2),
        Numeric(field="external.shelf.price", transform="identity"),
    ]
    draft.checks.append(check)


def html_crawl(draft: Draft) -> None:
    items = "".join(f'<p class=item><a href="/i/{n}">x</a><b>made by b{n}</b></p>' for n in range(4))
    key = Extract(at="a::attr(href)", pattern=r"/i/(\d+)")
    fields = {"brand": Extract(at="b::text", pattern=r"by (\w+)")}
    _crawl(draft, "html", f"<body>{items}</body>".encode(), "text/html", rows=".item", key=key, fields=fields)


def feed_crawl(draft: Draft) -> None:
    items = "".join(f"<item><guid>{n}</guid><title>b{n}</title></item>" for n in range(4))
    body = f'<rss version="2.0"><channel>{items}</channel></rss>'.encode()
    fields = {"brand": Extract(at="title::text")}
    _crawl(draft, "feed", body, "application/rss+xml", key=Extract(at="guid::text"), fields=fields)


def access_log(draft: Draft) -> None:
    query = ("user", "item", "request_id", "event_id", "place", "event_time_ms", *draft.private)
    route = Route(
        path="/click/{page}",
        event="matrix.click",
        method="POST",
        status=(200, 302),
        fields={name: f"query:{name}" for name in query if draft.private.get(name) != "drop"},
        skip_without=("user",),
    )
    draft.mappings.append(
        AccessLog(tag="matrix.access", format="common", field="message", escaped=False, routes=(route,))
    )


# -- recipes


def _learns(draft: Draft, made: Callable[[Draft], Recipe]) -> None:
    draft.recipe = made


def ftrl(draft: Draft) -> None:
    def made(draft: Draft) -> Recipe:
        several = len(draft.tasks) > 1
        how: dict[str, Any] = {**heads(draft), "updates": "batch" if several else "sample"}
        return logistic_ftrl(l1_table=0.0001, l2_table=0.001, adam_beta1=0.8, adam_beta2=0.99, **how)

    _learns(draft, made)


def machine(draft: Draft) -> None:
    def made(draft: Draft) -> Recipe:
        how = {"task": draft.tasks[0].name, "squares_half_life_ms": 60_000, "negative_share": 0.7, "seed": 11}
        return fm(dim=4, calibrate=True, optimizer="adagrad", **how)

    _learns(draft, made)


def layered(draft: Draft) -> None:
    def made(draft: Draft) -> Recipe:
        return deepfm(
            hidden=(8, 4),
            dense_average=0.9,
            recent_base=True,
            ordered_from_ms=1_000,
            provisional=False,
            slot_dims={"item": 4},
            slot_optimizers={"item": "adam", "user*page": "ftrl"},
            admit_after=2,
            admit_by="sketch",
            expire_after_ms=60_000,
            init_scale=0.02,
            batch_rows=64,
            **heads(draft),
        )

    _learns(draft, made)


def crossed(draft: Draft) -> None:
    def made(draft: Draft) -> Recipe:
        how = {"cross_layers": 3, "optimizer": "adagrad_row", "admit_by": "exact", "hidden": (8,)}
        made = dcn(dim=4, slot_optimizers={"item": "adagrad"}, **how, **heads(draft))
        return msgspec.structs.replace(made, cross_rank=4, delayed="none", stored_order="event_time", squares_init=0.1)

    _learns(draft, made)


@model_function("matrix_tower", version=2)
def matrix_tower(shape: ModelShape) -> Any:
    """Return a plain tower over everything."""
    import torch

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(shape.slots * shape.dim + shape.numerics, shape.tasks)

        def forward(self, embedding: Any, linear: Any, numeric: Any) -> Any:
            return self.out(torch.cat([embedding.flatten(1), numeric], 1)) + linear.sum(1, keepdim=True)

    return Tower()


def own_module(draft: Draft) -> None:
    def made(draft: Draft) -> Recipe:
        kinds: dict[str, Any] = {"optimizer": "adam", "slot_optimizers": {"item": "adagrad_row"}}
        return module_of("matrix_tower", version=2, dim=4, lr_table=0.03, **kinds, **heads(draft))

    _learns(draft, made)


def valued(draft: Draft) -> None:
    """Tasks that learn what an order's value is, each in its own way, beside those that are there."""
    kinds: dict[str, Any] = {f"{kind}_value": kind for kind in ("weighted", "squared", "huber", "tweedie")}
    draft.tasks += tuple(Task(name=name, feedback="order", window_ms=draft.window_ms) for name in kinds)

    def made(draft: Draft) -> Recipe:
        objectives = {draft.tasks[0].name: "log_loss", **kinds}
        return deepfm(dim=4, hidden=(8,), objectives=objectives, tweedie_power=1.3, huber_delta=2.0, **heads(draft))

    _learns(draft, made)


def weighted_late(draft: Draft) -> None:
    _learns(draft, lambda draft: late_positives(deepfm(dim=4, hidden=(8,), lr_dense=0.002, **heads(draft))))


def calibrated_late(draft: Draft) -> None:
    _learns(draft, lambda draft: late_positives(fm(dim=4, task=draft.tasks[0].name), weighted=False))


FACTORS: dict[str, tuple[Level, ...]] = {
    "key": (nothing, int_key, hashed_key),
    "private": (nothing, hashed_field, dropped_field),
    "unknown": (unknown_dropped, unknown_kept, unknown_refused),
    "tasks": (nothing, eager, corrected, two_tasks, mixed_tasks),
    "features": (plain_features, list_features, text_features, number_features, own_features),
    "counters": (nothing, local_counter, shared_counter, local_pair_counter, shared_pair_counter),
    "crawl": (nothing, json_crawl, html_crawl, feed_crawl),
    "source": (nothing, access_log),
    "recipe": (ftrl, machine, layered, crossed, own_module, valued, weighted_late, calibrated_late),
}
"""In the order in which a row's levels change its draft."""

DELAYED = (weighted_late, calibrated_late)
Row = dict[str, Level]


def is_possible(row: Row) -> bool:
    """Say whether the levels go together, as the contract says itself."""
    return row.get("recipe") not in DELAYED or row.get("tasks") in (eager, None)


def drafted(row: Row, pace: int = 1) -> Draft:
    """Return the draft that a row's levels make."""
    draft = Draft(pace)
    for factor in FACTORS:
        row[factor](draft)
    return draft
