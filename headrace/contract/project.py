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

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.contract.errors import ConfigRejected
from headrace.contract.mapping import AccessLog, check_mappings
from headrace.contract.spec import Bucket, Categorical, Cross, FeatureSpec, Numeric, Rate

FieldType = Literal["int64", "float64", "string", "bool"]


Unknown = Literal["drop", "refuse", "keep"]
"""What becomes of fields that a type does not declare. `keep`: as JSON in the declared string field `extra`."""
Private = Literal["drop", "hash"]
"""What becomes of a personal field at the border. `drop`: it is stored nowhere, and not declared among the fields;
`hash`: a declared string field holds its keyed hash; see `headrace.contract.privacy`."""
EXTRA = "extra"


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
    """An event that answers an impression, found by (`request_id`, `place`). It carries the same partition key
    field, and every counter key field, as the impression; `value` (float, optional) is the dwell or price."""

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


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the model is built and trained. Every number is part of the run's digest."""

    task: str = "click"
    model: Literal["deepfm"] = "deepfm"
    dim: Annotated[int, Meta(gt=0, le=256)] = 8
    hidden: tuple[int, ...] = (64, 32)
    lr_table: Annotated[float, Meta(gt=0)] = 0.05
    lr_dense: Annotated[float, Meta(gt=0)] = 0.001
    l2_table: Annotated[float, Meta(ge=0)] = 0.0
    init_scale: Annotated[float, Meta(ge=0)] = 0.01
    batch_rows: Annotated[int, Meta(gt=0, le=65_536)] = 512
    """Most rows in one training step."""
    seed: int = 7


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """All that the stages need to know of a user's service."""

    impression: ImpressionType
    feedback: tuple[FeedbackType, ...]
    tasks: tuple[Task, ...]
    features: FeatureSpec
    recipe: Recipe = Recipe()
    name: str = "default"
    mappings: tuple[AccessLog, ...] = ()
    """Access logs whose lines are events; see `headrace.contract.mapping`."""

    def checked(self) -> Project:
        """Return self, or raise `ConfigRejected` naming the first declaration that contradicts another."""
        raw, columns = set(self.impression.fields), set(self.features.counter_columns())
        kinds = {f.name for f in self.feedback}
        if self.impression.key not in raw:
            raise ConfigRejected(f"impression.key {self.impression.key!r} is not one of its fields {sorted(raw)}.")
        for kind in (self.impression, *self.feedback):
            _check_fields(kind)
        fields_by_tag = {self.impression.tag: self.impression.fields, **{f.tag: f.fields for f in self.feedback}}
        check_mappings(self.mappings, fields_by_tag, self.impression.key)
        for task in self.tasks:
            if task.feedback not in kinds:
                raise ConfigRejected(f"task {task.name!r} names feedback {task.feedback!r}; declared: {sorted(kinds)}.")
        if self.recipe.task not in {t.name for t in self.tasks}:
            raise ConfigRejected(f"recipe.task {self.recipe.task!r} is not a declared task.")
        for counter in self.features.counters:
            missing = [n for n in ("impression", *kinds) if n in counter.counts and counter.key not in self._fields(n)]
            unknown = set(counter.counts) - kinds - {"impression"}
            if missing or unknown:
                raise ConfigRejected(
                    f"counter {counter.name!r} over {counter.key!r}: not a field of {missing}, unknown counts "
                    f"{sorted(unknown)}. Declare the field there, or count something else."
                )
        for feature in self.features.features:
            for name in _inputs(feature):
                if name not in raw and name not in columns:
                    raise ConfigRejected(f"feature {feature!r} reads {name!r}, which no field and no counter gives.")
        return self

    def _fields(self, name: str) -> set[str]:
        if name == "impression":
            return set(self.impression.fields)
        return {self.impression.key, *next(f.fields for f in self.feedback if f.name == name)}


def _check_fields(kind: ImpressionType | FeedbackType) -> None:
    if kind.unknown == "keep" and kind.fields.get(EXTRA) != "string":
        raise ConfigRejected(f'{kind.tag!r} keeps unknown fields and needs a field for them: add "{EXTRA}": "string".')
    for name, how in kind.private.items():
        declared = kind.fields.get(name)
        if how == "drop" and declared is not None:
            raise ConfigRejected(f"{kind.tag!r} drops {name!r} and declares it as a field: choose one.")
        if how == "hash" and declared != "string":
            raise ConfigRejected(f'{kind.tag!r} hashes {name!r}, which is {declared}: declare it as "string".')


def _inputs(feature: Categorical | Numeric | Bucket | Cross | Rate) -> tuple[str, ...]:
    if isinstance(feature, Cross):
        return feature.fields
    if isinstance(feature, Rate):
        return (feature.of, feature.over)
    return (feature.field,)
