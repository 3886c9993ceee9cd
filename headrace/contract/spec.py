"""The feature specification: which features an event's fields become, under one digest.

One frozen structure is used by the stream, the trainer, serving and replay. Its digest is stamped on samples and
snapshots; a row of another digest is featurized again from its raw fields.

Growth: a new kind of feature is a new tagged structure; a new field of an old kind is `UNSET` by default and so not
written, which keeps the JSON and with it the digest of every specification that does without it.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

Positive = Annotated[int, Meta(gt=0)]
ValuesMax = Annotated[int, Meta(gt=0, le=256)]
EVENT_TIME = "event_time_ms"
"""The one column of the envelope that features may read."""
FieldType = Literal["int64", "float64", "string", "bool", "list[string]", "list[int64]"]
"""Of a raw field."""
LISTS = frozenset({"list[string]", "list[int64]"})
PAD = -1
"""Slot id where a multi-valued feature has no value left: it has no row, weighs nothing and learns nothing."""


class Entry(NamedTuple):
    """What one entry of a counter holds of the events of one type."""

    kind: Literal["count", "sum", "last"]
    event: str
    field: str = ""


def entry_of(text: str) -> Entry:
    """Read an entry of `Counter.counts`.

    >>> entry_of("click"), entry_of("sum:order.value").field, entry_of("last:click").kind
    (Entry(kind='count', event='click', field=''), 'value', 'last')
    """
    kind, colon, rest = text.partition(":")
    if colon and kind == "sum" and "." in rest:
        event, _, field = rest.rpartition(".")
        return Entry("sum", event, field)
    if colon and kind == "last":
        return Entry("last", rest)
    return Entry("count", text)


class Counter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, cache_hash=True):
    """Windowed counts, sums and recencies of events per key, as of an impression's event time.

    Gives one float32 column for each entry of `counts`, named `counter.<name>.<entry>`. A counter whose key is the
    partition key, or has it among its fields, is kept by the join itself, exactly; any other comes from the aggregator,
    on its grid.

    | entry | its column holds, of the events in the window |
    |---|---|
    | `impression` or a feedback type | how many |
    | `sum:<event>.<field>` | the sum of a numeric field (of feedback also `value`), exact to a millionth |
    | `last:<event>` | 1 + milliseconds since the last one; 0 where there is none |
    """

    name: str
    key: str | Annotated[tuple[str, ...], Meta(min_length=2)]
    """Raw field that counts are kept for, or several: then for each combination of their values. Impressions and
    feedback must carry all of them; an event without one of them is not counted."""
    counts: tuple[str, ...] = ("impression", "click")
    """What is kept, see the table."""
    window_ms: Positive = 3_600_000
    """How far back counts reach. One hour."""
    buckets: Annotated[int, Meta(gt=0, le=64)] = 12
    """The window moves in steps of window_ms / buckets."""
    half_life_ms: Positive | UnsetType = UNSET
    """Counts and sums weigh 2 ** (-age / half_life_ms), age in whole buckets; unset, all in the window weigh 1."""

    @property
    def key_fields(self) -> tuple[str, ...]:
        """The raw fields that the key is made of, in declared order.

        >>> Counter(name="pair", key=("user_id", "tag")).key_fields, Counter(name="user", key="user_id").key_fields
        (('user_id', 'tag'), ('user_id',))
        """
        return (self.key,) if isinstance(self.key, str) else self.key

    def is_local(self, partition_key: str) -> bool:
        """Say whether all events of one key lie in one partition, so that the join there can count them itself."""
        return partition_key in self.key_fields

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns that this counter fills."""
        return tuple(f"counter.{self.name}.{entry}" for entry in self.counts)

    def entries(self) -> tuple[Entry, ...]:
        """Return the entries, read."""
        return tuple(map(entry_of, self.counts))


class Declared(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every kind of feature declares."""

    @property
    def slots(self) -> int:
        """How many slot ids a row gets; unused ones hold `PAD`."""
        return 0

    @property
    def numerics(self) -> int:
        """How many dense numbers a row gets."""
        return 0

    def inputs(self) -> tuple[str, ...]:
        """Return the raw fields and counter columns that are read."""
        return ()


class OfField(Declared, frozen=True, kw_only=True):
    """A feature of one column."""

    field: str

    def inputs(self) -> tuple[str, ...]:
        """Return the one column."""
        return (self.field,)


class Categorical(OfField, frozen=True, tag="categorical", kw_only=True):
    """One slot: the hash of a field's value; a missing value has a slot of its own."""

    @property
    def slots(self) -> int:
        """One."""
        return 1


class Numeric(OfField, frozen=True, tag="numeric", kw_only=True):
    """One dense number: `identity`, or `log1p` of the value clipped at 0; missing is 0."""

    transform: Literal["identity", "log1p"] = "log1p"
    scale: float = 1.0
    """Multiplied with the transformed value."""

    @property
    def numerics(self) -> int:
        """One."""
        return 1


class Bucket(OfField, frozen=True, tag="bucket", kw_only=True, cache_hash=True):
    """One slot: which interval between ascending `edges` the value lies in (edge included on the left)."""

    edges: tuple[float, ...]

    @property
    def slots(self) -> int:
        """One."""
        return 1


class Cross(Declared, frozen=True, tag="cross", kw_only=True):
    """One slot: the hash of several fields' values together."""

    fields: Annotated[tuple[str, ...], Meta(min_length=2)]

    @property
    def slots(self) -> int:
        """One."""
        return 1

    def inputs(self) -> tuple[str, ...]:
        """Return the crossed fields."""
        return self.fields


class Rate(Declared, frozen=True, tag="rate", kw_only=True, cache_hash=True):
    """Two dense numbers: (of + prior * strength) / (over + strength) and log1p(over), from two counter columns."""

    of: str
    over: str
    prior: Annotated[float, Meta(ge=0, le=1)] = 0.5
    strength: Annotated[float, Meta(gt=0)] = 10.0
    log_odds: bool | UnsetType = UNSET
    """Give log(rate / (1 - rate)), the rate clipped to 0.001 ... 0.999, and half of the weight: both are about as wide
    as what a model adds up, so that a few thousand samples suffice to learn from them."""

    @property
    def numerics(self) -> int:
        """The rate and its weight."""
        return 2

    def inputs(self) -> tuple[str, ...]:
        """Return the two columns."""
        return (self.of, self.over)


class MultiValued(OfField, frozen=True, tag="multi", kw_only=True):
    """`values_max` slots: the distinct values of a list field, first come first, the rest padded.

    One value has one slot, wherever in the list it is. A missing list has a slot of its own, an empty one none;
    missing values in a list are left out.
    """

    values_max: ValuesMax = 8
    separator: str = ""
    """Empty: the field is a list. Else it is text, cut there; spaces around a value and empty values do not count."""

    @property
    def slots(self) -> int:
        """As many as values are kept."""
        return self.values_max


class Text(OfField, frozen=True, tag="text", kw_only=True):
    """`values_max` slots: the distinct n-grams of a text, normalized (NFKC) and lower-cased, first come first.

    Words are runs of letters, digits and `_`; n-grams of `ngram_min` words come first, then longer ones. Of a text
    only the first 4,096 characters count. A missing text has a slot of its own, one without words none.
    """

    unit: Literal["word", "char"] = "word"
    """`char` cuts each word into n-grams of characters: for scripts without spaces, and against misspelling."""
    ngram_min: Annotated[int, Meta(gt=0, le=8)] = 1
    ngram_max: Annotated[int, Meta(gt=0, le=8)] = 1
    values_max: ValuesMax = 16

    @property
    def slots(self) -> int:
        """As many as n-grams are kept."""
        return self.values_max


class TimePart(Declared, frozen=True, tag="time", kw_only=True):
    """One slot: a part of a time in epoch milliseconds, at a fixed offset from UTC. Monday is the first day."""

    part: Literal["hour", "day_of_week", "hour_of_week", "minute_of_day"]
    utc_offset_minutes: Annotated[int, Meta(ge=-1_440, le=1_440)] = 0
    field: str = EVENT_TIME
    """An int64 field; the event's own time by default, in serving the time of the request."""

    @property
    def slots(self) -> int:
        """One."""
        return 1

    def inputs(self) -> tuple[str, ...]:
        """Return the column of the time."""
        return (self.field,)


Part = Categorical | Bucket | MultiValued | Text | TimePart


class Product(Declared, frozen=True, tag="product", kw_only=True):
    """`values_max` slots: every combination of one value of each part, the first part's first, bounded.

    Where `Cross` takes fields as they are, this takes what other features make of them: buckets, lists, words, hours.
    """

    parts: Annotated[tuple[Part, ...], Meta(min_length=2, max_length=4)]
    values_max: ValuesMax = 16

    @property
    def slots(self) -> int:
        """As many as combinations are kept, or there can be."""
        return min(self.values_max, self.combinations)

    @property
    def combinations(self) -> int:
        """How many a row can have."""
        count = 1
        for part in self.parts:
            count *= part.slots
        return count

    def inputs(self) -> tuple[str, ...]:
        """Return what the parts read."""
        return tuple(name for part in self.parts for name in part.inputs())


class Pairs(Declared, frozen=True, tag="pairs", kw_only=True):
    """One slot for every pair of the fields: the hash of both values, in one of `space` ids a pair."""

    fields: Annotated[tuple[str, ...], Meta(min_length=2, max_length=16)]
    space: Annotated[int, Meta(ge=0)] = 0
    """How many ids a pair of fields may have: bounds the table, at the price of collisions. 0: no bound."""

    @property
    def slots(self) -> int:
        """k * (k - 1) / 2 of k fields."""
        return len(self.fields) * (len(self.fields) - 1) // 2

    def inputs(self) -> tuple[str, ...]:
        """Return the fields."""
        return self.fields


class Quantile(OfField, frozen=True, tag="quantile", kw_only=True):
    """One dense number, 0 to 1: the share of values below this one, between `edges` in a straight line; missing is 0.

    Edges are the quantiles 0, 1/k, ... 1 as `headrace.stream.features.sketch` learnt them. They are pinned here, not
    learnt in mid-stream: the same value is the same number whenever it comes.
    """

    edges: Annotated[tuple[float, ...], Meta(min_length=2)]

    @property
    def numerics(self) -> int:
        """One."""
        return 1


class Recency(Declared, frozen=True, tag="recency", kw_only=True):
    """One dense number: 2 ** (-age / half_life_ms) of a counter's `last:` column; 0 where there was no event."""

    of: str
    half_life_ms: Positive = 3_600_000

    @property
    def numerics(self) -> int:
        """One."""
        return 1

    def inputs(self) -> tuple[str, ...]:
        """Return the column."""
        return (self.of,)


class Mean(Declared, frozen=True, tag="mean", kw_only=True):
    """One dense number: (of + prior * strength) / (over + strength) * scale, such as a sum over a count."""

    of: str
    over: str
    prior: float = 0.0
    strength: Annotated[float, Meta(gt=0)] = 1.0
    scale: float = 1.0

    @property
    def numerics(self) -> int:
        """One."""
        return 1

    def inputs(self) -> tuple[str, ...]:
        """Return the two columns."""
        return (self.of, self.over)


class Custom(Declared, frozen=True, tag="custom", kw_only=True):
    """`width` slots or dense numbers by a function of the user's project; see `headrace.contract.functions`.

    Its name and version enter the digest: a function that changes what it returns needs a new version.
    """

    function: str
    version: Positive
    fields: Annotated[tuple[str, ...], Meta(min_length=1)]
    gives: Literal["slots", "numbers"]
    width: ValuesMax = 1

    @property
    def slots(self) -> int:
        """`width`, if it gives slots."""
        return self.width if self.gives == "slots" else 0

    @property
    def numerics(self) -> int:
        """`width`, if it gives numbers."""
        return self.width if self.gives == "numbers" else 0

    def inputs(self) -> tuple[str, ...]:
        """Return the arguments."""
        return self.fields


Feature = (
    Categorical
    | Numeric
    | Bucket
    | Cross
    | Rate
    | MultiValued
    | Text
    | TimePart
    | Product
    | Pairs
    | Quantile
    | Recency
    | Mean
    | Custom
)


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, cache_hash=True):
    """All features in order: slots are numbered by their order here, dense numbers by theirs."""

    counters: tuple[Counter, ...] = ()
    features: tuple[Feature, ...] = ()

    def counter_columns(self) -> tuple[str, ...]:
        """Return every counter column, in declared order."""
        return tuple(column for counter in self.counters for column in counter.columns())

    @property
    def slots(self) -> int:
        """F: how many slot ids a row has."""
        return sum(feature.slots for feature in self.features)

    @property
    def numerics(self) -> int:
        """D: how many dense numbers a row has."""
        return sum(feature.numerics for feature in self.features)

    def digest(self) -> str:
        """Return 16 hex digits of SHA-256 over the canonical JSON of this specification."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]
