"""Windowed counters: how often, how much and how lately a key was shown or answered, as of an event's time. Pure.

Bucket b of a counter holds the events with floor(event_time_ms / bucket_ms) == b. The value as of t is made of the
buckets (b(t) - buckets, b(t)], so that it moves in steps of bucket_ms and needs no event to decay.

A bucket holds one integer an entry, and integers add up to the same in any order and any batches:

| entry | integer | value as of t |
|---|---|---|
| count | events | their sum |
| sum | millionths of the field, each clipped to +-1e9 units and rounded to even | their sum / 1e6 |
| last | 1 + the latest event's place in its bucket, in ms; joined by maximum | 1 + t - that event's time; 0: none |

A latest event of a bucket that is after t is passed over, and with it the earlier ones of that bucket, which are not
kept: a recency may be larger than it was, never smaller. With `half_life_ms` counts and sums are weighed by age in
whole buckets and added from the youngest bucket to the oldest, so that floats, too, meet in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import UNSET

from headrace.contract.spec import Counter
from headrace.stream.features.values import to_numbers

Row = dict[int, list[int]]
"""Counts of one key: bucket to one integer for each entry of `Counter.counts`."""

UNIT = 1_000_000
"""Sums are kept in millionths."""
_LARGEST = 1e9
"""Most that one event adds to a sum: 9,000 of them still fit into 64 bits."""


class Feed(NamedTuple):
    """An entry that events of one type change."""

    entry: int
    kind: str
    field: str = ""


def bucket_ms(counter: Counter) -> int:
    """Return the width of a bucket, at least 1 ms."""
    return max(1, counter.window_ms // counter.buckets)


@lru_cache(maxsize=256)
def feeds(counter: Counter, name: str) -> tuple[Feed, ...]:
    """Return the entries that an event of type `name` (`impression` or a feedback type) changes.

    >>> feeds(Counter(name="user", key="user_id", counts=("click", "impression", "sum:click.value")), "click")
    (Feed(entry=0, kind='count', field=''), Feed(entry=2, kind='sum', field='value'))
    """
    return tuple(Feed(i, e.kind, e.field) for i, e in enumerate(counter.entries()) if e.event == name)


def amounts(feed: Feed, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Return what each row adds to the entry: int64 [N]. A sum takes millionths; null and NaN add nothing."""
    if feed.kind != "sum":
        return np.ones(batch.num_rows, np.int64)
    values_N = np.clip(to_numbers(batch.column(feed.field)), -_LARGEST, _LARGEST)
    out_N: npt.NDArray[np.int64] = np.rint(values_N * UNIT).astype(np.int64)
    return out_N


@lru_cache(maxsize=256)
def weights(counter: Counter) -> tuple[float, ...] | None:
    """Return the weight of each age in buckets, 0 first, to 12 digits; None where all weigh 1.

    >>> weights(Counter(name="user", key="user_id", window_ms=4000, buckets=4, half_life_ms=1000))
    (1.0, 0.5, 0.25, 0.125)
    """
    if counter.half_life_ms is UNSET:
        return None
    width_ms = bucket_ms(counter)
    return tuple(round(2.0 ** (-age * width_ms / counter.half_life_ms), 12) for age in range(counter.buckets))


def value_as_of(buckets: Mapping[int, Sequence[int]], counter: Counter, as_of_ms: int) -> list[float]:
    """Return the values of the window that ends at `as_of_ms`, one an entry of `counter.counts`.

    >>> clicks = Counter(name="item", key="item_id", window_ms=4000, buckets=4)
    >>> value_as_of({0: [2, 1], 3: [1, 0]}, clicks, 3999), value_as_of({0: [2, 1], 3: [1, 0]}, clicks, 4000)
    ([3, 1], [1, 0])
    >>> lately = Counter(name="item", key="item_id", counts=("last:click",), window_ms=4000, buckets=4)
    >>> value_as_of({3: [501]}, lately, 3600), value_as_of({3: [501]}, lately, 3499)
    ([101], [0])
    """
    plain, lasts, sums = _kinds(counter)
    top = as_of_ms // bucket_ms(counter)
    oldest = top - counter.buckets + 1
    total: list[float] = [0] * len(counter.counts)
    if plain:
        for bucket, counts in buckets.items():
            if oldest <= bucket <= top:
                for i, count in enumerate(counts):
                    total[i] += count
        return total
    weight_of = weights(counter)
    for bucket in sorted((b for b in buckets if oldest <= b <= top), reverse=True):
        counts, age = buckets[bucket], top - bucket
        for i, count in enumerate(counts):
            if i not in lasts:
                total[i] += count if weight_of is None else float(count) * weight_of[age]
            elif count and not total[i]:
                last_ms = bucket * bucket_ms(counter) + count - 1
                if last_ms <= as_of_ms:
                    total[i] = 1 + as_of_ms - last_ms
    for i in sums:
        total[i] /= UNIT
    return total


def aged(counter: Counter, values: tuple[float, ...], known_ms: int, as_of_ms: int) -> tuple[float, ...]:
    """Return values known as of `known_ms` as they are at `as_of_ms`, if nothing happened between.

    Plain counts and sums stay: the aggregator, which has the buckets, writes a new value when one leaves the window.
    Decayed ones shrink, and recencies grow until they leave the window.

    >>> lately = Counter(name="item", key="item_id", counts=("last:click",), window_ms=4000, buckets=4)
    >>> aged(lately, (101.0,), 3600, 4100), aged(lately, (101.0,), 3600, 9000)
    ((601.0,), (0.0,))
    """
    plain, lasts, _ = _kinds(counter)
    weight_of = weights(counter)
    if (plain and weight_of is None) or as_of_ms <= known_ms:
        return values
    width_ms, top = bucket_ms(counter), as_of_ms // bucket_ms(counter)
    age = top - known_ms // width_ms
    weight = 1.0 if weight_of is None else weight_of[age] if age < counter.buckets else 0.0
    older: list[float] = []
    for i, value in enumerate(values):
        if i not in lasts:
            older.append(value * weight)
        elif value and (known_ms + 1 - value) // width_ms > top - counter.buckets:
            older.append(value + as_of_ms - known_ms)
        else:
            older.append(0.0)
    return tuple(older)


@lru_cache(maxsize=256)
def _kinds(counter: Counter) -> tuple[bool, frozenset[int], tuple[int, ...]]:
    """Return whether all entries are plain counts, and which entries are recencies and which are sums."""
    kinds = [entry.kind for entry in counter.entries()]
    lasts = frozenset(i for i, kind in enumerate(kinds) if kind == "last")
    sums = tuple(i for i, kind in enumerate(kinds) if kind == "sum")
    return not lasts and not sums and counter.half_life_ms is UNSET, lasts, sums


def moves_within_bucket(counter: Counter) -> bool:
    """Return whether a value can change while no bucket begins: recencies grow with every millisecond."""
    return bool(_kinds(counter)[1])


def key_texts(parts: Sequence[pa.Array]) -> pa.Array:
    """Return the text under which each row is counted: of one field its value, of several their values between colons.

    Colons and backslashes within a value are escaped, so that different values never make one text. Null where any
    part is null: such a row has no key.

    >>> key_texts([pa.array([7, 7, None])]).to_pylist()
    ['7', '7', None]
    >>> key_texts([pa.array([7, 7, None]), pa.array(["a:b", "", "c"])]).to_pylist()
    ['7:a\\\\:b', '7:', None]
    """
    texts = [part if pa.types.is_string(part.type) else part.cast(pa.string()) for part in parts]
    if len(texts) == 1:
        return texts[0]
    safe = [_escaped(text) if pa.types.is_string(part.type) else text for part, text in zip(parts, texts, strict=True)]
    return pc.binary_join_element_wise(*safe, ":")


def key_text(parts: Sequence[Any]) -> str | None:
    """Return what `key_texts` does, of one row's values.

    >>> key_text([7, "a:b"]), key_text([None]), key_text([True])
    ('7:a\\\\:b', None, 'true')
    """
    if any(part is None for part in parts):
        return None
    # As Arrow writes them.
    texts = [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
    if len(texts) == 1:
        return texts[0]
    pairs = zip(parts, texts, strict=True)
    return ":".join(t.replace("\\", "\\\\").replace(":", "\\:") if isinstance(part, str) else t for part, t in pairs)


def _escaped(texts: pa.Array) -> pa.Array:
    return pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), ":", "\\:")


def key_strings(parts: Sequence[pa.Array]) -> list[str | None]:
    """Return what `key_texts` does, as Python's texts."""
    texts: list[str | None] = key_texts(parts).to_pylist()
    return texts


class CounterState:
    """All keys of one counter, bounded by time: buckets that no value can reach any more are dropped.

    What was dropped depends on `advance`'s argument alone, never on when it is called: buckets below the floor are
    neither summed nor added to.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.width_ms = bucket_ms(counter)
        self.floor = -(2**62)
        self.rows: dict[str, Row] = {}
        self._keys_of: dict[int, set[str]] = {}
        self._lasts = _kinds(counter)[1]

    def add(self, key: str, entry: int, event_time_ms: int, amount: int = 1) -> None:
        """Take one event into `counter.counts[entry]`; one below the floor no longer counts.

        Args:
            amount: as `amounts` gives it; of no matter where the entry is a recency.
        """
        bucket = event_time_ms // self.width_ms
        if bucket < self.floor:
            return
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = {}
        counts = row.get(bucket)
        if counts is None:
            counts = row[bucket] = [0] * len(self.counter.counts)
            self._keys_of.setdefault(bucket, set()).add(key)
        if entry in self._lasts:
            counts[entry] = max(counts[entry], event_time_ms - bucket * self.width_ms + 1)
        else:
            counts[entry] += amount

    def value(self, key: str, as_of_ms: int) -> list[float]:
        """Return the values of `key` as of a time; zeros where nothing is known."""
        row = self.rows.get(key)
        return [0] * len(self.counter.counts) if row is None else value_as_of(row, self.counter, as_of_ms)

    def advance(self, watermark_ms: int) -> None:
        """Drop what lies a whole window further back than the window that ends at the watermark."""
        floor = watermark_ms // self.width_ms - 2 * self.counter.buckets + 1
        if floor <= self.floor:
            return
        self.floor = floor
        for bucket in [b for b in self._keys_of if b < floor]:
            for key in self._keys_of.pop(bucket):
                row = self.rows[key]
                del row[bucket]
                if not row:
                    del self.rows[key]

    def keys_of(self, bucket: int) -> set[str]:
        """Return the keys that have counts in a bucket: those whose value changes when it leaves the window."""
        return self._keys_of.get(bucket, set())

    def to_plain(self) -> list[Any]:
        """Return the state as lists, numbers and texts, keys in order."""
        rows = [[key, [[b, *row[b]] for b in sorted(row)]] for key, row in sorted(self.rows.items())]
        return [self.floor, rows]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        self.floor = plain[0]
        self.rows, self._keys_of = {}, {}
        for key, buckets in plain[1]:
            self.rows[key] = {b: list(counts) for b, *counts in buckets}
            for b in self.rows[key]:
                self._keys_of.setdefault(b, set()).add(key)
