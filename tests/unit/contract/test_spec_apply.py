"""Goal: `headrace spec apply` restarts what a change concerns and nothing else; a refusal has the old and new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from headrace.cli.tools.spec import concerned
from headrace.contract.errors import ConfigRejected
from headrace.contract.functions import feature_function
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.rules import check_growth, lanes_of, rules_of
from headrace.contract.spec import Categorical, Counter, Custom, FeatureSpec, Numeric, Rate

MINUTE_MS = 60_000


def rate(counter: str) -> Rate:
    return Rate(of=f"counter.{counter}.click", over=f"counter.{counter}.impression")


def counter(name: str, window_ms: int, *counts: str) -> Counter:
    return Counter(name=name, key="item", counts=("impression", "click", *counts), window_ms=window_ms)


BEFORE = Project(
    name="small",
    impression=ImpressionType(
        tag="t.impression", key="user", fields={"user": "int64", "item": "int64", "x": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="t.click", fields={"item": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=MINUTE_MS),),
    features=FeatureSpec(
        counters=(counter("item", MINUTE_MS),), features=(Categorical(field="item"), rate("item"))
    ),
).checked()  # fmt: skip


@feature_function("doubled_for_spec_apply", version=1)
def doubled(x: Any) -> Any:
    return x


def changed(**changes: Any) -> Project:
    return msgspec.structs.replace(BEFORE, **changes)


def with_features(*features: Any, counters: tuple[Counter, ...] = BEFORE.features.counters) -> Project:
    return changed(features=FeatureSpec(counters=counters, features=features))


def with_fields(**more: Any) -> Project:
    impression = msgspec.structs.replace(BEFORE.impression, fields={**BEFORE.impression.fields, **more})
    return changed(impression=impression)


ORDER = FeedbackType(name="order", tag="t.order", fields={"item": "int64"})


@pytest.mark.parametrize(
    ("after", "stages"),
    [
        (lambda: changed(tasks=(Task(name="click", feedback="click", window_ms=9 * MINUTE_MS),)), ["train"]),
        (lambda: with_features(rate("day"), counters=(counter("day", 9 * MINUTE_MS),)), ["train"]),
        (lambda: with_features(Categorical(field="item"), Numeric(field="x"), Categorical(field="user")), ["train"]),
        (lambda: with_features(Categorical(field="item"), counters=()), ["train"]),
        (lambda: with_fields(y="int64"), ["ingest", "serve", "train"]),
        (
            lambda: changed(
                feedback=(*BEFORE.feedback, ORDER),
                features=FeatureSpec(counters=(counter("more", MINUTE_MS, "order"),), features=(rate("more"),)),
            ),
            # Serving knows no order, and would refuse a model whose counters count it.
            ["ingest", "serve", "train"],
        ),
        (lambda: changed(feedback=(*BEFORE.feedback, ORDER)), ["ingest", "train"]),
        (
            lambda: with_features(Custom(function="doubled_for_spec_apply", version=1, fields=("x",), gives="numbers")),
            ["stream", "aggregate", "serve", "train"],
        ),
    ],
)
def test_a_change_restarts_what_reads_it_and_nothing_else(after: Callable[[], Project], stages: list[str]) -> None:
    assert concerned(rules_of(BEFORE), after().checked()) == stages


def test_a_changed_window_of_a_counter_is_refused_with_both_values() -> None:
    after = with_features(rate("item"), counters=(counter("item", 9 * MINUTE_MS),))
    with pytest.raises(ConfigRejected, match=r"counter 'item' .* \(window_ms 60000 -> 540000\), .* a new name"):
        check_growth(rules_of(BEFORE), rules_of(after), lanes_of(BEFORE.tasks))
