"""Windowed counters: how often a key was shown or answered, as of an event's time. Pure.

Bucket b of a counter holds the events with floor(event_time_ms / bucket_ms) == b. The value as of t is the sum over
buckets (b(t) - buckets, b(t)], so that it moves in steps of bucket_ms and needs no event to decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from headrace.contract.spec import Counter

Row = dict[int, list[int]]
"""Counts of one key: bucket to one count for each entry of `Counter.counts`."""


def bucket_ms(counter: Counter) -> int:
    """Return the width of a bucket, at least 1 ms."""
    return max(1, counter.window_ms // counter.buckets)


def value_as_of(buckets: Mapping[int, Sequence[int]], counter: Counter, as_of_ms: int) -> list[int]:
    """Return the counts within the window that ends at `as_of_ms`, one an entry of `counter.counts`.

    >>> clicks = Counter(name="item", key="item_id", window_ms=4000, buckets=4)
    >>> value_as_of({0: [2, 1], 3: [1, 0]}, clicks, 3999), value_as_of({0: [2, 1], 3: [1, 0]}, clicks, 4000)
    ([3, 1], [1, 0])
    """
    top = as_of_ms // bucket_ms(counter)
    bottom = top - counter.buckets
    total = [0] * len(counter.counts)
    for bucket, counts in buckets.items():
        if bottom < bucket <= top:
            for i, count in enumerate(counts):
                total[i] += count
    return total


def key_strings(column: pa.Array) -> list[str | None]:
    """Return a key field's values as the text under which they are counted; null stays null."""
    texts: list[str | None] = column.cast(pa.string()).to_pylist()
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

    def add(self, key: str, entry: int, event_time_ms: int, amount: int = 1) -> None:
        """Count one event of `counter.counts[entry]`; one below the floor is no longer counted."""
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
        counts[entry] += amount

    def value(self, key: str, as_of_ms: int) -> list[int]:
        """Return the counts of `key` as of a time; zeros where nothing is known."""
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
