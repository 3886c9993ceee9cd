"""Declarations of a project that contradict each other, all of them at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

from headrace.contract.checks.names import name_faults
from headrace.contract.crawl import crawl_faults, external_columns
from headrace.contract.errors import ConfigRejected, listed, meant
from headrace.contract.functions import function_of
from headrace.contract.mapping import mapping_faults
from headrace.contract.spec import (
    EVENT_TIME,
    LISTS,
    Bucket,
    Counter,
    Custom,
    Feature,
    FieldType,
    Mean,
    MultiValued,
    Numeric,
    Product,
    Quantile,
    Rate,
    Recency,
    Text,
    TimePart,
)

if TYPE_CHECKING:
    from headrace.contract.project import FeedbackType, ImpressionType, Project
    from headrace.contract.recipe import Recipe

EXTRA = "extra"
"""Field that keeps what is not declared, where a type says `unknown="keep"`."""
LANES_MAX = 8
"""The join keeps a byte of an impression's tasks: a task takes a bit, one that corrects late feedback a second one."""
COMBINATIONS_MAX = 1_024
"""Most combinations that a `Product` may form of one row before it keeps `values_max` of them."""
_NUMBERS = frozenset({"int64", "float64", "bool", "float32"})
_SCALARS = _NUMBERS | {"string"}
_KNOWN = frozenset(get_args(FieldType)) | {"float32"}


def contradictions(project: Project) -> Iterator[ConfigRejected]:
    """Give a fault for each declaration that contradicts another one. Types and ranges are taken to be as declared;
    where one is not, a fault that follows from it is left out where it can be told."""
    checks: tuple[Callable[[Project], Iterator[ConfigRejected]], ...] = (
        name_faults,
        _of_events,
        _of_tasks,
        _of_recipes,
        _of_counters,
        _of_features,
    )
    for check in checks:
        yield from check(project)


def _of_events(project: Project) -> Iterator[ConfigRejected]:
    shown, raw = project.impression, set(project.impression.fields)
    if shown.key not in raw:
        yield ConfigRejected(
            f"impression.key {shown.key!r} is not one of its fields, which are {listed(raw)}."
            f"{meant(shown.key, raw)} Declare it among them, or name another one.",
            at="impression.key",
        )
    elif shown.fields[shown.key] in LISTS:
        yield ConfigRejected(
            f"impression.key {shown.key!r} is a list; the partition key is one value: name another.",
            at="impression.key",
        )
    events: tuple[ImpressionType | FeedbackType, ...] = (shown, *project.feedback)
    for number, one in enumerate(events):
        yield from _field_faults(one, f"feedback[{number - 1}]" if number else "impression")
    yield from _key_faults(project)
    fields_by_tag = {each.tag: each.fields for each in events}
    yield from mapping_faults(project.mappings, fields_by_tag, shown.key)
    yield from crawl_faults(project.crawls, shown.fields)


def _key_faults(project: Project) -> Iterator[ConfigRejected]:
    """Feedback finds its impression in the partition of its key, so both keep it plain or both hash it."""
    key, how = project.impression.key, project.impression.private.get(project.impression.key)
    for number, each in enumerate(project.feedback):
        if (own := each.private.get(key)) != how and "drop" not in (own, how):
            does, not_does = (project.impression.tag, each.tag) if how else (each.tag, project.impression.tag)
            yield ConfigRejected(
                f"{does!r} hashes the partition key {key!r} and {not_does!r} does not: they would never meet. Declare "
                f'"{key}": "string" among the fields of both, and private={{"{key}": "hash"}} of both.',
                at=f"feedback[{number}]",
            )


def _of_tasks(project: Project) -> Iterator[ConfigRejected]:
    kinds = {each.name for each in project.feedback}
    for number, task in enumerate(project.tasks):
        if task.feedback not in kinds:
            yield ConfigRejected(
                f"task {task.name!r} names feedback {task.feedback!r}, and no FeedbackType has that name; there "
                f"are: {listed(kinds)}.{meant(task.feedback, kinds)} Add a FeedbackType(name={task.feedback!r}, "
                "tag=...) to `feedback`, or name another one.",
                at=f"tasks[{number}].feedback",
            )
        if task.correct_ms and task.policy == "eager":
            yield ConfigRejected(
                f"task {task.name!r} is eager and corrects until its window ends: raise window_ms and leave "
                "correct_ms out.",
                at=f"tasks[{number}].correct_ms",
            )
    lanes = sum(2 if task.correct_ms else 1 for task in project.tasks)
    if lanes > LANES_MAX:
        yield ConfigRejected(
            f"{len(project.tasks)} tasks take {lanes} of {LANES_MAX} lanes (a task takes one, a task with correct_ms "
            "two): drop some.",
            at="tasks",
        )


def _of_recipes(project: Project) -> Iterator[ConfigRejected]:
    yield from _recipe_faults(project, project.recipe, "recipe")
    for name, recipe in project.variants.items():
        at = f"variants[{name!r}]"
        if recipe == project.recipe:
            yield ConfigRejected(
                f"{at} is the project's own recipe, which is learnt already: drop it from `variants`. A variant that "
                "was promoted and moved to recipe= goes on with the run that it has.",
                at=at,
            )
        for fault in _recipe_faults(project, recipe, at):
            yield ConfigRejected(f"variant {name!r}: {fault}", at=at)


def _recipe_faults(project: Project, recipe: Recipe, at: str) -> Iterator[ConfigRejected]:
    declared = {task.name: task for task in project.tasks}
    try:
        recipe.checked(project.features)
    except ConfigRejected as error:
        yield ConfigRejected(str(error), at=at)
    if unknown := [name for name in recipe.heads if name not in declared]:
        named = next(iter(declared), "click")
        way = f"multitask({tuple(declared)!r})" if len(recipe.heads) > 1 < len(declared) else f"deepfm(task={named!r})"
        verb = "is not a declared task" if len(unknown) == 1 else "are no declared tasks"
        yield ConfigRejected(
            f"recipe.task {', '.join(map(repr, unknown))} {verb}; there are: {listed(declared)}. Name what the model "
            f"learns where the project is made: Project(..., recipe={way}).",
            at=at,
        )
    for name in set(recipe.heads) & set(declared):
        task = declared[name]
        if recipe.delayed.startswith("fake_negative") and (task.policy != "eager" or task.correction_weight != 1.0):
            yield ConfigRejected(
                f"recipe.delayed is {recipe.delayed!r} and task {name!r} has policy {task.policy!r} and "
                f"correction_weight {task.correction_weight}: it takes eager tasks whose corrections weigh 1.",
                at=at,
            )


def _of_counters(project: Project) -> Iterator[ConfigRejected]:
    for number, counter in enumerate(project.features.counters):
        for said in _counter_faults(project, counter):
            yield ConfigRejected(said, at=f"features.counters[{number}]")


def _counter_faults(project: Project, counter: Counter) -> Iterator[str]:
    kinds = {each.name for each in project.feedback}
    entries, fields = counter.entries(), counter.key_fields
    if len(set(fields)) < len(fields):
        yield f"counter {counter.name!r} is kept over {counter.key!r}: a tuple names each once."
    events = {entry.event for entry in entries}
    if unknown := events - kinds - {"impression"}:
        yield (
            f"counter {counter.name!r} counts {listed(unknown)}, and no event has that name; there are "
            f"{listed(['impression', *kinds])}.{meant(min(unknown), ['impression', *kinds])}"
        )
    # The impression must have them too: its counts are looked up by its own key.
    known = {"impression", *events} & {"impression", *kinds}
    for field in dict.fromkeys(fields):
        missing = [
            name for name in ("impression", *sorted(known - {"impression"})) if field not in _fields(project, name)
        ]
        if _fields(project, "impression").get(field) in LISTS:
            yield f"counter {counter.name!r} is kept over {field!r}, a list; a key is one value: name another field."
        elif missing:
            yield (
                f"counter {counter.name!r} over {counter.key!r}: {field!r} is not a field of {listed(missing)}."
                f"{meant(field, _fields(project, missing[0]))} Declare the field there, or count something else."
            )
    for entry in entries:
        if entry.kind != "sum" or entry.event not in known:
            continue
        own = _fields(project, entry.event)
        kind = own.get(entry.field, "no field of it")
        if kind not in _NUMBERS and kind in {"no field of it", *_KNOWN}:
            yield (
                f"counter {counter.name!r} sums {entry.field!r} of {entry.event!r}, which is {kind}; numbers of "
                f"that event: {listed(n for n, k in own.items() if k in _NUMBERS)}."
            )


def _fields(project: Project, name: str) -> dict[str, FieldType]:
    """Return the fields of a declared event that a counter may read."""
    shown = project.impression
    if name == "impression":
        return shown.fields
    own: dict[str, FieldType] = {shown.key: shown.fields.get(shown.key, "string"), "value": "float64"}
    return own | next(each.fields for each in project.feedback if each.name == name)


def _of_features(project: Project) -> Iterator[ConfigRejected]:
    columns = project.features.counter_columns()
    types: dict[str, str] = {**project.impression.fields, EVENT_TIME: "int64", **dict.fromkeys(columns, "float32")}
    types |= external_columns(project.crawls)
    lasts = {
        column
        for counter in project.features.counters
        for column, entry in zip(counter.columns(), counter.entries(), strict=True)
        if entry.kind == "last"
    }
    for number, feature in enumerate(project.features.features):
        at = f"features.features[{number}]"
        unknown = [name for name in dict.fromkeys(feature.inputs()) if name not in types]
        for name in unknown:
            yield ConfigRejected(
                f"feature {feature!r} reads {name!r}, which no field and no counter gives; there are: "
                f"{listed(types)}.{meant(name, types)} Declare it in the impression's fields, or read another.",
                at=at,
            )
        if unknown:
            continue
        try:
            _check_feature(feature, types, lasts)
        except ConfigRejected as error:
            yield ConfigRejected(str(error), at=at)


def _field_faults(kind: ImpressionType | FeedbackType, at: str) -> Iterator[ConfigRejected]:
    if kind.unknown == "keep" and kind.fields.get(EXTRA) != "string":
        yield ConfigRejected(
            f'{kind.tag!r} keeps unknown fields and needs a field for them: add "{EXTRA}": "string".', at=f"{at}.fields"
        )
    for name, how in kind.private.items():
        declared = kind.fields.get(name)
        if how == "drop" and declared is not None:
            yield ConfigRejected(
                f"{kind.tag!r} drops {name!r} and declares it as a field: choose one.", at=f"{at}.private"
            )
        if how == "hash" and declared != "string":
            yield ConfigRejected(
                f'{kind.tag!r} hashes {name!r}, which is {declared or "not among its fields"}: declare it as "string".',
                at=f"{at}.private",
            )


def _check_feature(feature: Feature, types: dict[str, str], lasts: set[str]) -> None:
    if isinstance(feature, Custom):
        function_of(feature.function, feature.version)
        return
    if isinstance(feature, Product):
        for part in feature.parts:
            _check_feature(part, types, lasts)
        if feature.combinations > COMBINATIONS_MAX:
            raise ConfigRejected(
                f"feature {feature!r} would form {feature.combinations} combinations a row, at most {COMBINATIONS_MAX} "
                "are allowed: lower values_max of its parts."
            )
        return
    allowed = _SCALARS
    if isinstance(feature, Numeric | Bucket | Quantile | Rate | Mean | Recency):
        allowed = _NUMBERS
    elif isinstance(feature, TimePart):
        allowed = frozenset({"int64"})
    elif isinstance(feature, Text) or (isinstance(feature, MultiValued) and feature.separator):
        allowed = frozenset({"string"})
    elif isinstance(feature, MultiValued):
        allowed = LISTS
    for name in feature.inputs():
        if types[name] in _KNOWN and types[name] not in allowed:
            raise ConfigRejected(f"feature {feature!r} reads {name!r}, a {types[name]}; it takes {listed(allowed)}.")
    edges = feature.edges if isinstance(feature, Bucket | Quantile) else ()
    if not all(low < high for low, high in itertools.pairwise(edges)):
        raise ConfigRejected(f"feature {feature!r}: each edge must be above the one before.")
    if isinstance(feature, Quantile) and not all(map(math.isfinite, edges)):
        raise ConfigRejected(f"feature {feature!r}: edges must be finite numbers.")
    if isinstance(feature, Text) and feature.ngram_min > feature.ngram_max:
        raise ConfigRejected(f"feature {feature!r}: ngram_min is above ngram_max.")
    if isinstance(feature, Recency) and feature.of not in lasts:
        raise ConfigRejected(f"feature {feature!r} needs a counter's `last:` column; there are: {listed(lasts)}.")
