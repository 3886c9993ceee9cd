"""What a user declares in one Python file: events, tasks, feature spec and recipe. Data only; no I/O.

PROJECT = Project(
    impression=ImpressionType(tag="shop.impression", key="user_id", fields={"user_id": "int64", ...}),
    feedback=(FeedbackType(name="click", tag="shop.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(...),
    recipe=Recipe(...),
)
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from headrace.contract.crawl import Crawl, check_crawls, external_columns
from headrace.contract.errors import ConfigRejected, listed, meant, wanted
from headrace.contract.functions import function_of
from headrace.contract.mapping import AccessLog, check_mappings
from headrace.contract.names import check_names
from headrace.contract.recipe import Recipe as Recipe
from headrace.contract.spec import (
    EVENT_TIME,
    Bucket,
    Counter,
    Custom,
    Feature,
    FeatureSpec,
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

FieldType = Literal["int64", "float64", "string", "bool", "list[string]", "list[int64]"]
LISTS = frozenset({"list[string]", "list[int64]"})
_NUMBERS = frozenset({"int64", "float64", "bool", "float32"})
_SCALARS = _NUMBERS | {"string"}

Unknown = Literal["drop", "refuse", "keep"]
"""What happens to fields that a type does not declare. `keep`: as JSON in the declared string field `extra`."""
Private = Literal["drop", "hash"]
"""What happens to a personal field at the gateway. `drop`: it is stored nowhere, and not declared among the fields;
`hash`: a declared string field holds its keyed hash; see `headrace.contract.privacy`."""
EXTRA = "extra"

LANES_MAX = 8
"""The join keeps a byte of an impression's tasks: a task takes a bit, one that corrects late feedback a second one."""
COMBINATIONS_MAX = 1_024
"""Most combinations that a `Product` may form of one row before it keeps `values_max` of them."""


class ImpressionType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The event that says what was shown. Every raw field is nullable.

    Fields that every impression record carries besides the raw ones: `event_id` (else derived), `request_id`
    (required), `place` (0-based place in the answer, default 0), `event_time_ms` (else the shipper's time),
    `version` (the model version that scored it), `counter.*` (counters as they were served).
    """

    tag: str
    key: str
    """Raw field that is the partition key; rendered as a string."""
    fields: dict[str, FieldType]
    unknown: Unknown = "drop"
    private: dict[str, Private] = {}


class FeedbackType(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An event that answers an impression, found by (`request_id`, `place`).

    Declare its tag and the key fields of every counter that counts it. The partition key is there without being
    declared; the service must log it. `value` (float, optional) is the dwell or price.
    """

    name: str
    tag: str
    fields: dict[str, FieldType] = {}
    unknown: Unknown = "drop"
    private: dict[str, Private] = {}


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One label: positive (1.0) if `feedback` comes within the window after the impression, else negative (0.0)."""

    name: str
    feedback: str
    window_ms: Annotated[int, Meta(gt=0)]
    policy: Literal["window", "eager"] = "window"
    """`window`: one sample, when the label is known. `eager`: a negative at once, and a positive that corrects it if
    feedback comes within the window. A model then learns b = w q / (1 + w q) of a true rate q and the correction's
    weight w; it ranks the same, and b / (w (1 - b)) is q. Source: fake negative calibration, Ktena et al. 2019."""
    correction_weight: Annotated[float, Meta(gt=0)] = 1.0
    """Weight of the positive that corrects a negative: an eager one, or one that late feedback proved wrong."""
    correct_ms: Annotated[int, Meta(ge=0)] = 0
    """Policy `window`: how long after the window late feedback still makes a positive that corrects the negative. The
    impression is kept for that long. 0: late feedback is counted and stays in `events` alone."""


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """All that the stages need to know about a user's service."""

    impression: ImpressionType
    feedback: tuple[FeedbackType, ...]
    tasks: tuple[Task, ...]
    features: FeatureSpec
    recipe: Recipe = Recipe()
    name: str = "default"
    """Of the model: a-z, 0-9, `_` and `-`. It is part of the names of its blobs, and of its records' keys."""
    mappings: tuple[AccessLog, ...] = ()
    """Access logs whose lines are events; see `headrace.contract.mapping`."""
    crawls: tuple[Crawl, ...] = ()
    """What the crawler brings from the web; see `headrace.contract.crawl`."""

    def checked(self) -> Project:
        """Return self, its spec's numbers of the declared types, or raise `ConfigRejected` naming the first declaration
        that contradicts its type or another declaration."""
        typed = _of_declared_types(self)
        check_names(self)
        raw, columns = set(self.impression.fields), set(self.features.counter_columns())
        kinds = {f.name for f in self.feedback}
        if self.impression.key not in raw:
            raise ConfigRejected(
                f"impression.key {self.impression.key!r} is not one of its fields, which are {listed(raw)}."
                f"{meant(self.impression.key, raw)} Declare it among them, or name another one.",
                at="impression.key",
            )
        events: tuple[ImpressionType | FeedbackType, ...] = (self.impression, *self.feedback)
        for one in events:
            _check_fields(one)
        fields_by_tag = {self.impression.tag: self.impression.fields, **{f.tag: f.fields for f in self.feedback}}
        check_mappings(self.mappings, fields_by_tag, self.impression.key)
        check_crawls(self.crawls, self.impression.fields)
        self._check_tasks(kinds)
        lanes = sum(2 if task.correct_ms else 1 for task in self.tasks)
        if lanes > LANES_MAX:
            raise ConfigRejected(
                f"{len(self.tasks)} tasks take {lanes} of {LANES_MAX} lanes (a task takes one, a task with correct_ms "
                "two): drop some."
            )
        self._check_recipe()
        types: dict[str, str] = {**self.impression.fields, EVENT_TIME: "int64", **dict.fromkeys(columns, "float32")}
        types |= external_columns(self.crawls)
        if self.impression.fields[self.impression.key] in LISTS:
            raise ConfigRejected(
                f"impression.key {self.impression.key!r} is a list; the partition key is one value: name another.",
                at="impression.key",
            )
        for number, counter in enumerate(self.features.counters):
            try:
                self._check_counter(counter, kinds)
            except ConfigRejected as error:
                raise ConfigRejected(str(error), at=f"features.counters[{number}]") from error
        lasts = {
            column
            for counter in self.features.counters
            for column, entry in zip(counter.columns(), counter.entries(), strict=True)
            if entry.kind == "last"
        }
        for number, feature in enumerate(self.features.features):
            at = f"features.features[{number}]"
            for name in feature.inputs():
                if name not in types:
                    raise ConfigRejected(
                        f"feature {feature!r} reads {name!r}, which no field and no counter gives; there are: "
                        f"{listed(types)}.{meant(name, types)} Declare it in the impression's fields, or read another.",
                        at=at,
                    )
            try:
                _check_feature(feature, types, lasts)
            except ConfigRejected as error:
                raise ConfigRejected(str(error), at=at) from error
        # As it comes back from JSON: 1 for 1.0 would give the log's rules another digest than the file's.
        is_plain = typed.features.digest() == self.features.digest()
        # Nor is a list in a tuple's place, which says the same: specifications are looked up by their hash.
        try:
            hash(self.features)
        except TypeError:
            is_plain = False
        return self if is_plain else msgspec.structs.replace(self, features=typed.features)

    def _check_tasks(self, kinds: set[str]) -> None:
        for number, task in enumerate(self.tasks):
            if task.feedback not in kinds:
                raise ConfigRejected(
                    f"task {task.name!r} names feedback {task.feedback!r}, and no FeedbackType has that name; there "
                    f"are: {listed(kinds)}.{meant(task.feedback, kinds)} Add a FeedbackType(name={task.feedback!r}, "
                    "tag=...) to `feedback`, or name another one.",
                    at=f"tasks[{number}].feedback",
                )
            if task.correct_ms and task.policy == "eager":
                raise ConfigRejected(
                    f"task {task.name!r} is eager and corrects until its window ends: raise window_ms and leave "
                    "correct_ms out.",
                    at=f"tasks[{number}].correct_ms",
                )

    def _check_recipe(self) -> None:
        try:
            recipe, declared = self.recipe.checked(self.features), {t.name: t for t in self.tasks}
        except ConfigRejected as error:
            raise ConfigRejected(str(error), at="recipe") from error
        for name in recipe.heads:
            if name not in declared:
                named = min(declared, default="click")
                raise ConfigRejected(
                    f"recipe.task {name!r} is not a declared task; there are: {listed(declared)}. Name the one that "
                    f"the model learns where the project is made: Project(..., recipe=deepfm(task={named!r})).",
                    at="recipe",
                )
            task = declared[name]
            if recipe.delayed.startswith("fake_negative") and (task.policy != "eager" or task.correction_weight != 1.0):
                raise ConfigRejected(
                    f"recipe.delayed is {recipe.delayed!r} and task {name!r} has policy {task.policy!r} and "
                    f"correction_weight {task.correction_weight}: it takes eager tasks whose corrections weigh 1.",
                    at="recipe",
                )

    def _check_counter(self, counter: Counter, kinds: set[str]) -> None:
        entries, fields = counter.entries(), counter.key_fields
        if len(set(fields)) < len(fields):
            raise ConfigRejected(f"counter {counter.name!r} is kept over {counter.key!r}: a tuple names each once.")
        events = {entry.event for entry in entries}
        if unknown := events - kinds - {"impression"}:
            raise ConfigRejected(
                f"counter {counter.name!r} counts {listed(unknown)}, and no event has that name; there are "
                f"{listed(['impression', *kinds])}.{meant(min(unknown), ['impression', *kinds])}"
            )
        # The impression must have them too: its counts are looked up by its own key.
        carriers = [name for name in ("impression", *sorted(kinds)) if name in {"impression", *events}]
        for field in fields:
            missing = [name for name in carriers if field not in self._fields(name)]
            if missing:
                raise ConfigRejected(
                    f"counter {counter.name!r} over {counter.key!r}: {field!r} is not a field of {listed(missing)}. "
                    "Declare the field there, or count something else."
                )
        for entry in entries:
            kind = self._fields(entry.event).get(entry.field, "missing")
            if entry.kind == "sum" and kind not in _NUMBERS:
                raise ConfigRejected(
                    f"counter {counter.name!r} sums {entry.field!r} of {entry.event!r}, which is {kind}; numbers of "
                    f"that event: {listed(n for n, k in self._fields(entry.event).items() if k in _NUMBERS)}."
                )
        lists = [field for field in fields if self._fields("impression")[field] in LISTS]
        if lists:
            raise ConfigRejected(f"counter {counter.name!r} is kept over {lists[0]!r}, a list; a key is one value.")

    def _fields(self, name: str) -> dict[str, FieldType]:
        if name == "impression":
            return self.impression.fields
        key = self.impression.key
        own: dict[str, FieldType] = {key: self.impression.fields[key], "value": "float64"}
        return own | next(f.fields for f in self.feedback if f.name == name)


def _of_declared_types(project: Project) -> Project:
    """Return the project as it comes back from JSON; a struct's constructor does not look at types and ranges."""
    try:
        return msgspec.convert(msgspec.to_builtins(project), Project)
    except (msgspec.ValidationError, TypeError) as error:
        if odd := next(_odd_values(project, ""), None):
            path, value = odd
            hint = f"call it: {value.__name__}(...)" if callable(value) else "write what is wanted there"
            raise ConfigRejected(
                f"{path} is a {type(value).__name__}, which is no declaration: {hint}.", at=path
            ) from None
        said, path = _AT.sub("", str(error)), "".join(_AT.findall(str(error))).lstrip(".")
        path, owner, value = _followed(project, path, said)
        name = path.rpartition(".")[2].partition("[")[0]
        known = _choices(owner, name)
        if said.startswith("Invalid enum value"):
            said = f"one of {', '.join(map(repr, known))} is wanted.{meant(str(value), known)}"
        else:
            said = f"{wanted(said)}."
        hint = _TUPLE_HINT if isinstance(value, str) and "tuple" in said else ""
        hint = hint or (_KEY_HINT if name == "key" and isinstance(value, tuple | list) else "")
        named = getattr(owner, "name", None)
        whose = f" of {type(owner).__name__} {named!r}" if isinstance(named, str) else ""
        raise ConfigRejected(f"{path}{whose} is {_short(value)}: {said}{hint}", at=path) from None


_AT = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_TUPLE_HINT = ' A tuple of one ends in a comma: ("click",).'
_KEY_HINT = ' A tuple names two fields or more; one field is a text, key="user_id".'


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _choices(owner: object, name: str) -> tuple[str, ...]:
    """Return the texts that a field of a declaration may be, () where it may be any."""
    hint = get_type_hints(type(owner)).get(name)
    found, waiting = [], [hint]
    while waiting:
        one = waiting.pop()
        found += [value for value in get_args(one) if isinstance(value, str)]
        waiting += [value for value in get_args(one) if not isinstance(value, str)]
    return tuple(found)


def _followed(project: Project, path: str, said: str) -> tuple[str, object, object]:
    """Return a decoder's path with the key that it leaves out, the declaration that holds the value, and the value."""
    owner: object = project
    here: Any = project
    done = ""
    for name, index in re.findall(r"(\w+)|\[(\d+|\.\.\.)\]", path):
        if name:
            owner = here
            here = getattr(here, name, None)
            done += f".{name}"
        elif index == "...":
            wrong = [key for key, value in here.items() if not isinstance(value, str) or repr(value) in said]
            key = wrong[0] if wrong else next(iter(here))
            here, done = here[key], f"{done}[{key!r}]"
        else:
            here, done = here[int(index)], f"{done}[{index}]"
    return done.lstrip("."), owner, here


def _odd_values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Give what is neither a declaration nor plain data: a function that was not called, a class, a set."""
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _odd_values(getattr(value, name), f"{path}.{name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for index, one in enumerate(value):
            yield from _odd_values(one, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _odd_values(one, f"{path}[{name!r}]")
    elif value is not None and value is not msgspec.UNSET and not isinstance(value, str | int | float | bool):
        yield path, value


def _check_fields(kind: ImpressionType | FeedbackType) -> None:
    if kind.unknown == "keep" and kind.fields.get(EXTRA) != "string":
        raise ConfigRejected(f'{kind.tag!r} keeps unknown fields and needs a field for them: add "{EXTRA}": "string".')
    for name, how in kind.private.items():
        declared = kind.fields.get(name)
        if how == "drop" and declared is not None:
            raise ConfigRejected(f"{kind.tag!r} drops {name!r} and declares it as a field: choose one.")
        if how == "hash" and declared != "string":
            raise ConfigRejected(
                f'{kind.tag!r} hashes {name!r}, which is {declared or "not among its fields"}: declare it as "string".'
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
        if types[name] not in allowed:
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
