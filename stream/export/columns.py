"""The columns of an export: their names, types and order, from a project and the lake's own columns. Pure.

| column | what |
|---|---|
| `event_timestamp`, `event_id`, `request_id`, `place`, `key` | the impression: when, which, for whom |
| `version`, `spec` | the model version that scored it; digest of the feature specification that it was read by |
| a field's name | the raw field as stored; `raw.<name>` where an export's own column is called so |
| `counter.*`, `external.*` | counters and crawled values as they were served, or as known at the event's time |
| `feature.<kind>.<input>` | what the model saw: slot ids (int64; a list where there may be several), dense numbers |
| `label.<task>` and others | what is known of the task: see `LABELS` |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pyarrow as pa

from headrace.contract.crawl import external_columns
from headrace.contract.errors import ConfigRejected, listed, meant
from headrace.contract.formats.events import ARROW_TYPES
from headrace.contract.formats.sample import LAKE_HOURS, LEAD, TAIL
from headrace.contract.project import Project
from headrace.contract.spec import (
    EVENT_TIME,
    Custom,
    Feature,
    FeatureSpec,
    Mean,
    MultiValued,
    Pairs,
    Product,
    Rate,
    Recency,
    Text,
    TimePart,
)

TIMESTAMP = pa.timestamp("ms", tz="UTC")
EVENT_TIMESTAMP = "event_timestamp"
IMPRESSION = ("event_id", "request_id", "place", "key", "version", "spec")
LABELS: dict[str, tuple[str, pa.DataType]] = {
    "label": ("label", pa.float32()),
    "value": ("value", pa.float64()),
    "weight": ("weight", pa.float32()),
    "corrected": ("correction", pa.bool_()),
    "feedback_id": ("feedback_id", pa.string()),
    "feedback_timestamp": ("feedback_time_ms", TIMESTAMP),
}
"""First part of a label's column -> the sample's column and the type; the second part is the task."""
_OURS = {field.name: field.type for field in (*LEAD, *TAIL)}


@dataclass(frozen=True)
class FeatureColumn:
    """One column of a feature, and where its values lie among a row's slots or numbers."""

    name: str
    is_slots: bool
    first: int
    width: int = 1
    is_list: bool = False
    """Slots without their pads."""

    @property
    def type(self) -> pa.DataType:
        """The column's type."""
        if not self.is_slots:
            return pa.float32()
        return pa.list_(pa.int64()) if self.is_list else pa.int64()


@dataclass(frozen=True)
class ExportColumns:
    """What is exported, in order, and what must be read for it."""

    tasks: tuple[str, ...]
    raw: dict[str, tuple[str, pa.DataType]]
    """Column -> the sample's column and its type: raw fields, counters, crawled values."""
    features: tuple[FeatureColumn, ...]
    names: tuple[str, ...]
    """All columns that are asked for, in the export's order."""

    def field(self, name: str) -> pa.Field:
        """Return a column's name and type."""
        if name == EVENT_TIMESTAMP:
            return pa.field(name, TIMESTAMP, nullable=False)
        if name in IMPRESSION:
            return pa.field(name, _OURS[name])
        if name in self.raw:
            return pa.field(name, self.raw[name][1])
        kind, _, task = name.partition(".")
        if task in self.tasks and kind in LABELS:
            return pa.field(name, LABELS[kind][1])
        return pa.field(name, next(one.type for one in self.features if one.name == name))

    @property
    def schema(self) -> pa.Schema:
        """The export's columns."""
        return pa.schema([self.field(name) for name in self.names])

    @property
    def wanted_features(self) -> tuple[FeatureColumn, ...]:
        """The features' columns that are asked for."""
        names = frozenset(self.names)
        return tuple(one for one in self.features if one.name in names)


def plan_columns(
    project: Project, stored: pa.Schema, *, tasks: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> ExportColumns:
    """Return what an export of this project has.

    Args:
        stored: the lake's columns: a field that the project no longer declares is exported too.
        tasks: labels of these alone; all declared ones by default.
        only: these columns alone, by name or pattern (`feature.*`), in the export's order.

    Raises `ConfigRejected` for a task or a column that there is not.
    """
    declared = [task.name for task in project.tasks]
    for name in tasks or ():
        if name not in declared:
            raise ConfigRejected(f"--tasks: {name!r} is no task; there are {listed(declared)}.{meant(name, declared)}")
    chosen = tuple(name for name in declared if tasks is None or name in tasks)
    features = tuple(feature_columns(project.features))
    labels = [f"{kind}.{task}" for task in chosen for kind in LABELS]
    ours = {name.lower() for name in (EVENT_TIMESTAMP, *IMPRESSION, *(f.name for f in features), *labels)}
    raw = {
        (f"raw.{name}" if name.lower() in ours else name): (name, kind)
        for name, kind in _raw_columns(project, stored).items()
    }
    everything = (EVENT_TIMESTAMP, *IMPRESSION, *raw, *(f.name for f in features), *labels)
    return ExportColumns(chosen, raw, features, _selected(everything, only))


def sample_columns(plan: ExportColumns, spec: FeatureSpec, types: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    """Return which columns of samples an export reads, and as which types.

    Args:
        types: those of everything that a feature may read.
    """
    names = ["event_time_ms", "partition", "offset", "rank", "impression_offset", "impression_row", "event_id", "task"]
    names += ["correction", *(name for name in IMPRESSION if name in plan.names)]
    names += sorted({source for kind, (source, _) in LABELS.items() for t in plan.tasks if f"{kind}.{t}" in plan.names})
    found = {name: _OURS[name] for name in names}
    if plan.wanted_features:
        found |= {name: _OURS[name] for name in ("spec", "slots", "numeric")}
        inputs = {name for feature in spec.features for name in feature.inputs()} - {EVENT_TIME}
        found |= {name: types[name] for name in sorted(inputs)}
    return found | {source: kind for name, (source, kind) in plan.raw.items() if name in plan.names}


def input_types(project: Project) -> dict[str, pa.DataType]:
    """Return the types of raw fields, counters and crawled values as the project declares them."""
    found = {name: ARROW_TYPES[kind] for name, kind in project.impression.fields.items()}
    found |= dict.fromkeys(project.features.counter_columns(), pa.float32())
    return found | {name: ARROW_TYPES[kind] for name, kind in external_columns(project.crawls).items()}


def feature_columns(spec: FeatureSpec) -> Iterator[FeatureColumn]:
    """Yield the columns of all features, in the specification's order; a name that comes again gets a number.

    >>> from headrace.contract.spec import Categorical, Cross, Rate
    >>> rate = Rate(of="counter.item.click", over="counter.item.impression")
    >>> spec = FeatureSpec(features=(Categorical(field="item"), Cross(fields=("user", "item")), rate, rate))
    >>> [column.name for column in feature_columns(spec)][:3]
    ['feature.categorical.item', 'feature.cross.user.item', 'feature.rate.item.click']
    >>> [column.name for column in feature_columns(spec)][3:]
    ['feature.rate.item.click.weight', 'feature.rate.item.click.2', 'feature.rate.item.click.weight.2']
    """
    seen: dict[str, int] = {}

    def named(base: str) -> str:
        name = f"feature.{base}"
        seen[name] = seen.get(name, 0) + 1
        return name if seen[name] == 1 else f"{name}.{seen[name]}"

    slot = dense = 0
    for feature in spec.features:
        base = _base(feature)
        if isinstance(feature, Pairs):
            for one, two in itertools.combinations(feature.fields, 2):
                yield FeatureColumn(named(f"pairs.{one}.{two}"), True, slot)
                slot += 1
        elif feature.slots:
            several = feature.slots > 1 or isinstance(feature, MultiValued | Text | Product)
            yield FeatureColumn(named(base), True, slot, feature.slots, is_list=several)
            slot += feature.slots
        else:
            ends = ["", ".weight"] if isinstance(feature, Rate) else _numbered(feature.numerics)
            for end in ends:
                yield FeatureColumn(named(base + end), False, dense)
                dense += 1


def _base(feature: Feature) -> str:
    """Return the kind and what tells one of a kind from another.

    >>> _base(TimePart(part="hour")), _base(Recency(of="counter.user.last:click"))
    ('time.hour', 'recency.user.last:click')
    """
    kind = feature.__struct_config__.tag
    if isinstance(feature, TimePart):
        return f"{kind}.{feature.part}" + ("" if feature.field == EVENT_TIME else f".{feature.field}")
    if isinstance(feature, Rate | Mean | Recency):
        return f"{kind}.{feature.of.removeprefix('counter.')}"
    if isinstance(feature, Product):
        return f"{kind}." + ".".join(_base(part).partition(".")[2] for part in feature.parts)
    if isinstance(feature, Custom):
        return f"{kind}.{feature.function}"
    return f"{kind}." + ".".join(feature.inputs())


def _numbered(width: int) -> list[str]:
    return [""] if width == 1 else [f".{i}" for i in range(width)]


def _raw_columns(project: Project, stored: pa.Schema) -> dict[str, pa.DataType]:
    """Return raw fields, those that only the lake still has, counters and crawled values, each with its type."""
    declared = input_types(project)
    known = {*_OURS, *(field.name for field in LAKE_HOURS), *declared}
    fields = {name: declared.pop(name) for name in project.impression.fields}
    gone = {field.name: plain_type(field.type) for field in stored if field.name not in known}
    prefixed = {name: kind for name, kind in gone.items() if name.startswith(("counter.", "external."))}
    return {**fields, **{n: k for n, k in gone.items() if n not in prefixed}, **declared, **prefixed}


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type of the lake as the project's types are written: lists name their items alike."""
    return pa.list_(kind.value_type) if pa.types.is_list(kind) else kind


def _selected(everything: Iterable[str], only: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(everything)
    if only is None:
        return names
    chosen: set[str] = set()
    for wanted in only:
        found = [name for name in names if fnmatchcase(name, wanted)]
        if not found:
            raise ConfigRejected(
                f"--columns: an export has no {wanted!r}.{meant(wanted, names)} It has {listed(names)}; patterns such "
                "as 'feature.*' are taken too."
            )
        chosen.update(found)
    return tuple(name for name in names if name in chosen)
