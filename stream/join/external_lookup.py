"""Crawled entities as a partition knows them: their versions, looked up as of an impression. Pure.

Known is what lies earlier in the partition's log and was crawled no later than the impression. Of one entity the
newest `KEEP` versions are remembered: an impression may be that many versions older than the newest, not more.

1. A row of an epoch below the highest seen is ignored: a fenced-off crawler wrote it.
2. A row that repeats the entity's newest version, or was crawled no later than it, is ignored.
3. Any other row is the entity's newest version; one without values says that it is gone.

Legend: N rows of a call, U entities among them, K versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.crawl import CRAWL_TIME, PREFIX, Crawl
from headrace.contract.formats.events import ARROW_TYPES
from headrace.stream.features.external_values import values_of

KEEP = 8
_NEVER = np.iinfo(np.int64).max


class _Version:
    """One version: when it was crawled, its digest, its values as JSON, and what was read of them last."""

    __slots__ = ("at_ms", "digest", "read", "text")

    def __init__(self, at_ms: int, digest: str, text: str | None) -> None:
        self.at_ms, self.digest, self.text = at_ms, digest, text
        self.read: tuple[Any, ...] | None = None


class ExternalLookup:
    """Versions by (source, key), of every source in the log: one that is declared later finds what came before."""

    def __init__(self, crawls: Sequence[Crawl]) -> None:
        self.crawls = tuple(crawls)
        self.changes = 0
        """How many rows changed anything since the log began: the same number, the same state."""
        self._epoch = -1
        self._versions: dict[str, dict[str, list[_Version]]] = {}

    def take(self, batch: pa.RecordBatch) -> None:
        """Apply rows of `EXTERNAL_SCHEMA` in order."""
        rows = zip(*(batch.column(i).to_pylist() for i in range(6)), strict=True)
        for source, key, at_ms, epoch, digest, text in rows:
            if epoch < self._epoch:
                continue
            self._epoch = epoch
            known = self._versions.setdefault(source, {}).setdefault(key, [])
            if known and (known[-1].digest == digest or at_ms <= known[-1].at_ms):
                continue
            known.append(_Version(at_ms, digest, text))
            del known[:-KEEP]
            self.changes += 1

    def lookup(self, crawl: Crawl, keys: pa.Array, times_N: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
        """Return the source's columns of N rows, as of `times_N`: null, and crawl time 0, where nothing is known."""
        texts = keys if pa.types.is_string(keys.type) else keys.cast(pa.string())
        coded = texts.dictionary_encode()
        known = self._versions.get(crawl.name, {})
        # A null key has no code: it reads the last row, which has no version.
        several = [*(known.get(key, ()) for key in coded.dictionary.to_pylist()), ()]
        code_N = pc.fill_null(coded.indices, len(several) - 1).to_numpy().astype(np.int64)
        most = max(map(len, several))
        at_UK = np.full((len(several), most), _NEVER, np.int64)
        start_U = np.zeros(len(several), np.int64)
        flat: list[_Version] = []
        for entity, versions in enumerate(several):
            start_U[entity] = len(flat)
            at_UK[entity, : len(versions)] = [version.at_ms for version in versions]
            flat += versions
        # Crawl times of an entity grow: how many are not after the impression says which one was known.
        count_N = (at_UK[code_N] <= times_N[:, None]).sum(axis=1)
        index = pa.array(start_U[code_N] + count_N - 1, mask=count_N == 0)
        columns = {}
        read = [_read(version, crawl) for version in flat]
        for i, (name, kind) in enumerate(crawl.columns().items()):
            columns[name] = pa.array([values[i] for values in read], ARROW_TYPES[kind]).take(index)
        columns[name] = pc.fill_null(columns[name], 0)  # The last one is the crawl time.
        return columns

    def columns(self, batch: Mapping[str, pa.Array], times_N: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
        """Return every declared column of impressions: as they were served, or else as known here and now.

        An impression carries all of a source or nothing: its crawl time says that it does, 0 that nothing was known.
        """
        columns: dict[str, pa.Array] = {}
        for crawl in self.crawls:
            served = batch.get(f"{PREFIX}.{crawl.name}.{CRAWL_TIME}")
            unserved = len(times_N) if served is None else served.null_count
            if not unserved:
                columns |= {name: batch[name] for name in crawl.columns()}
                continue
            known = self.lookup(crawl, batch[crawl.joins], times_N)
            if served is not None and unserved < len(times_N):
                is_served = served.is_valid()
                known = {name: pc.if_else(is_served, batch[name], column) for name, column in known.items()}
            columns |= known
        return columns

    def to_plain(self) -> list[Any]:
        """Return the state as numbers and texts."""
        versions = [
            [source, key, [[v.at_ms, v.digest, v.text] for v in several]]
            for source, entities in self._versions.items()
            for key, several in entities.items()
        ]
        return [self._epoch, self.changes, versions]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        self._epoch, self.changes, versions = plain
        self._versions = {}
        for source, key, several in versions:
            self._versions.setdefault(source, {})[key] = [_Version(*version) for version in several]


def _read(version: _Version, crawl: Crawl) -> tuple[Any, ...]:
    if version.read is None:
        version.read = (*values_of(version.text, crawl).values(), version.at_ms)
    return version.read
