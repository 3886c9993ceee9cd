"""What a partition knows of counters over other keys: the aggregator's rows, looked up by event time. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from headrace.contract.spec import Counter

KEEP = 4
"""Values kept of a key: an impression may be some grid ticks older than the newest value."""

Values = list[tuple[int, tuple[float, ...]]]
"""(as_of_ms, counts), ascending."""


class Aggregates:
    """Newest values of each (counter, key); a key leaves when its value is zero and the watermark has passed that."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self.counters = {counter.name: counter for counter in counters}
        self.epoch = -1
        self.values: dict[tuple[str, str], Values] = {}
        self._zeros: list[tuple[int, str, str]] = []

    def take(self, batch: pa.RecordBatch) -> None:
        """Apply rows in order. Rows of an epoch below the highest seen are a ghost's and ignored."""
        rows = zip(*(batch.column(i).to_pylist() for i in range(5)), strict=True)
        for counter, key, as_of_ms, epoch, counts in rows:
            if counter not in self.counters or epoch < self.epoch:
                continue
            self.epoch = epoch
            known = self.values.setdefault((counter, key), [])
            while known and known[-1][0] >= as_of_ms:
                # A restarted aggregator says this and what follows again, under its new epoch.
                known.pop()
            known.append((as_of_ms, tuple(counts)))
            del known[:-KEEP]
            if not any(counts):
                heapq.heappush(self._zeros, (as_of_ms, counter, key))

    def value(self, counter: str, key: str, as_of_ms: int) -> tuple[float, ...]:
        """Return the newest counts whose time is not after `as_of_ms`; zeros where there are none."""
        for known_ms, counts in reversed(self.values.get((counter, key), ())):
            if known_ms <= as_of_ms:
                return counts
        return (0.0,) * len(self.counters[counter].counts)

    def advance(self, watermark_ms: int) -> None:
        """Forget keys whose newest value is zero, as of a time that the watermark has passed."""
        while self._zeros and self._zeros[0][0] <= watermark_ms:
            as_of_ms, counter, key = heapq.heappop(self._zeros)
            known = self.values.get((counter, key))
            if known and known[-1][0] == as_of_ms and not any(known[-1][1]):
                del self.values[counter, key]

    def to_plain(self) -> list[Any]:
        """Return the state as lists, numbers and texts."""
        rows = [[c, k, [[t, list(v)] for t, v in known]] for (c, k), known in sorted(self.values.items())]
        return [self.epoch, rows, [list(zero) for zero in sorted(self._zeros)]]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        self.epoch = plain[0]
        self.values = {(c, k): [(t, tuple(v)) for t, v in known] for c, k, known in plain[1]}
        self._zeros = [(t, c, k) for t, c, k in plain[2]]
