"""The feature specification: what becomes of an event's fields, under one digest.

One frozen structure is used by the stream, the trainer, serving and replay. Its digest is stamped on samples and
snapshots; a row of another digest is featurized again from its raw fields.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(gt=0)]


class Counter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Windowed counts of events per key, as of an impression's event time.

    Gives one float32 column for each entry of `counts`, named `counter.<name>.<entry>`. A counter whose key is the
    partition key is kept by the join itself, exactly; any other comes from the aggregator, on its grid.
    """

    name: str
    key: str
    """Raw field that counts are kept for; impressions and feedback must both carry it."""
    counts: tuple[str, ...] = ("impression", "click")
    """What is counted: `impression`, or the name of a feedback event type."""
    window_ms: Positive = 3_600_000
    """How far back counts reach. One hour."""
    buckets: Annotated[int, Meta(gt=0, le=64)] = 12
    """The window moves in steps of window_ms / buckets."""

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns that this counter fills."""
        return tuple(f"counter.{self.name}.{entry}" for entry in self.counts)


class Categorical(msgspec.Struct, frozen=True, tag="categorical", forbid_unknown_fields=True, kw_only=True):
    """One slot: the hash of a field's value; a missing value has a slot of its own."""

    field: str


class Numeric(msgspec.Struct, frozen=True, tag="numeric", forbid_unknown_fields=True, kw_only=True):
    """One dense number: `identity`, or `log1p` of the value clipped at 0; missing is 0."""

    field: str
    transform: Literal["identity", "log1p"] = "log1p"
    scale: float = 1.0
    """Multiplied with the transformed value."""


class Bucket(msgspec.Struct, frozen=True, tag="bucket", forbid_unknown_fields=True, kw_only=True):
    """One slot: which interval between ascending `edges` the value lies in (edge included on the left)."""

    field: str
    edges: tuple[float, ...]


class Cross(msgspec.Struct, frozen=True, tag="cross", forbid_unknown_fields=True, kw_only=True):
    """One slot: the hash of several fields' values together."""

    fields: Annotated[tuple[str, ...], Meta(min_length=2)]


class Rate(msgspec.Struct, frozen=True, tag="rate", forbid_unknown_fields=True, kw_only=True):
    """Two dense numbers: (of + prior * strength) / (over + strength) and log1p(over), from two counter columns."""

    of: str
    over: str
    prior: Annotated[float, Meta(ge=0, le=1)] = 0.5
    strength: Annotated[float, Meta(gt=0)] = 10.0


Feature = Categorical | Numeric | Bucket | Cross | Rate


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All features in order: slots are numbered by their order here, dense numbers by theirs."""

    counters: tuple[Counter, ...] = ()
    features: tuple[Feature, ...] = ()

    def counter_columns(self) -> tuple[str, ...]:
        """Return every counter column, in declared order."""
        return tuple(column for counter in self.counters for column in counter.columns())

    @property
    def slots(self) -> int:
        """F: how many slot ids a row has."""
        return sum(isinstance(f, Categorical | Bucket | Cross) for f in self.features)

    @property
    def numerics(self) -> int:
        """D: how many dense numbers a row has."""
        return sum(1 if isinstance(f, Numeric) else 2 for f in self.features if isinstance(f, Numeric | Rate))

    def digest(self) -> str:
        """Return 16 hex digits of SHA-256 over the canonical JSON of this specification."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]
