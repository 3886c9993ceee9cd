"""Learns the quantiles of a field, to be pinned as edges of `Quantile` and `Bucket` features. Pure.

A sketch is counts of values: exact while there are few different ones, else by intervals whose ends have a ratio of
(1 + error) / (1 - error), so that every quantile is true to that relative error. Counts add up to the same in any order
and any split, and so do merged sketches. `headrace quantiles --field NAME` makes one of the lake.

Source: Masson, Rim, Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees", VLDB
2019.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from headrace.contract.errors import ConfigRejected
from headrace.stream.features.values import F64s, to_numbers

DISTINCT_MAX = 65_536
"""Most different values that are counted exactly."""
_LOG_MAX = math.log(np.finfo(np.float64).max)


class Sketch:
    """Counts of a field's values; null, NaN and infinity do not count.

    >>> prices = Sketch()
    >>> prices.add(pa.array([1.0, 2.0, 2.0, 3.0, None]))
    >>> prices.add(pa.array([10.0]))
    >>> prices.count, prices.quantile(0.5), prices.edges(2)
    (5, 2.0, (1.0, 2.0, 10.0))
    """

    def __init__(self, *, error: float = 0.002) -> None:
        if not 0 < error < 1:
            raise ConfigRejected(f"a sketch's relative error must lie between 0 and 1; got {error}.")
        self.error = error
        self.count = 0
        self.least, self.most = math.inf, -math.inf
        self._exact: dict[float, int] | None = {}
        self._coarse: dict[tuple[int, int], int] = {}

    def add(self, column: pa.Array | pa.ChunkedArray) -> None:
        """Count a column of numbers."""
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else (column,):
            values_N = to_numbers(chunk, missing=np.nan)
            # -0.0 + 0.0 is 0.0: both zeros are one value.
            values_K, counts_K = np.unique(values_N[np.isfinite(values_N)] + 0.0, return_counts=True)
            if len(values_K):
                self._count(values_K, counts_K.tolist())

    def merge(self, other: Sketch) -> None:
        """Take over the counts of a sketch of the same error."""
        if other.error != self.error:
            raise ConfigRejected(f"sketches of errors {self.error} and {other.error} can't be merged.")
        if other._exact is not None:
            self._count(np.array(sorted(other._exact)), [other._exact[v] for v in sorted(other._exact)])
            return
        self._coarsen()
        for key, count in other._coarse.items():
            self._coarse[key] = self._coarse.get(key, 0) + count
        self._widen(other.least, other.most, other.count)

    def quantile(self, share: float) -> float:
        """Return the value below which `share` of all lie, 0 <= share <= 1. Raises `ConfigRejected` without values."""
        return self._at([share])[0]

    def edges(self, bins: int) -> tuple[float, ...]:
        """Return the quantiles 0, 1/bins, ... 1, each once: as `Quantile.edges`, and without its ends `Bucket.edges`.

        Numbers that are common fill several bins; then there are fewer edges. Raises `ConfigRejected` where all values
        are equal.
        """
        found = sorted(set(self._at([i / bins for i in range(bins + 1)])))
        if len(found) < 2:
            raise ConfigRejected(f"all {self.count} values are {found[0]}: there is nothing to tell them apart by.")
        return tuple(found)

    def _count(self, values_K: F64s, counts: list[int]) -> None:
        if self._exact is not None:
            for value, count in zip(values_K.tolist(), counts, strict=True):
                self._exact[value] = self._exact.get(value, 0) + count
            if len(self._exact) > DISTINCT_MAX:
                self._coarsen()
        else:
            self._count_coarse(values_K, counts)
        if len(values_K):
            self._widen(float(values_K.min()), float(values_K.max()), sum(counts))

    def _count_coarse(self, values_K: F64s, counts: list[int]) -> None:
        ratio = (1 + self.error) / (1 - self.error)
        sizes_K = np.abs(values_K)
        # Below the smallest normal number all is 0.
        signs_K = np.where(sizes_K < np.finfo(np.float64).tiny, 0, np.sign(values_K)).astype(np.int64)
        places_K = np.ceil(np.log(np.where(signs_K == 0, 1.0, sizes_K)) / math.log(ratio)).astype(np.int64)
        for key, count in zip(zip(signs_K.tolist(), places_K.tolist(), strict=True), counts, strict=True):
            self._coarse[key] = self._coarse.get(key, 0) + count

    def _coarsen(self) -> None:
        if self._exact is None:
            return
        exact, self._exact = self._exact, None
        if exact:
            self._count_coarse(np.array(list(exact)), list(exact.values()))

    def _widen(self, least: float, most: float, count: int) -> None:
        self.least, self.most = min(self.least, least), max(self.most, most)
        self.count += count

    def _at(self, shares: list[float]) -> list[float]:
        if not self.count:
            raise ConfigRejected("the sketch has counted no value: the field is null in every row.")
        if self._exact is not None:
            ordered = sorted(self._exact.items())
        else:
            ratio = (1 + self.error) / (1 - self.error)
            middle = 2 / (ratio + 1)
            ordered = sorted(
                (sign * middle * math.exp(min(place * math.log(ratio), _LOG_MAX)) if sign else 0.0, count)
                for (sign, place), count in self._coarse.items()
            )
        upto_K = np.cumsum([count for _, count in ordered])
        out: list[float] = []
        for share in shares:
            # The smallest value that at least this share of all values does not exceed.
            place = int(np.searchsorted(upto_K, max(1, math.ceil(share * self.count))))
            value = ordered[min(place, len(ordered) - 1)][0]
            value = self.least if share <= 0 else self.most if share >= 1 else value
            out.append(float(min(max(value, self.least), self.most)))
        return out
