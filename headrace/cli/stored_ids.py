"""What the lake has and how far the join got, for looking late events up; both are opened with the first question."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.lake import JoinedState, LakeState, StoredIds

if TYPE_CHECKING:
    from headrace.backends.lake.delta import DeltaLake


class IdsOfLake:
    """`LakeIds` of a lake that is opened with the first question."""

    def __init__(self, open_lake: Callable[[], DeltaLake]) -> None:
        self._open_lake = open_lake
        self._ids: StoredIds | None = None

    def _opened(self) -> StoredIds:
        if self._ids is None:
            # Half a second to load, and most gateways never need it.
            from headrace.backends.lake.stored_ids import LakeIds

            self._ids = LakeIds(self._open_lake())
        return self._ids

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state; None while there is no lake."""
        return self._opened().state(version)

    def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
        """Return which of `ids` are in `column`, as `LakeIds` does."""
        return self._opened().stored(ids, column, begin_ms, end_ms)


class _Joined(NamedTuple):
    watermark_ms: int


class JoinedInStore:
    """What the join stored of each partition of a generation."""

    def __init__(self, open_blobs: Callable[[], Blobs], generation: int) -> None:
        self._open_blobs, self._generation = open_blobs, generation
        self._blobs: Blobs | None = None

    def joined(self, partition: int) -> JoinedState | None:
        """Return the partition's newest stored state; None where there is none, or this release cannot read it."""
        # The join is loaded with the first question: most gateways never ask.
        from headrace.stream.join.state import VERSION, Damaged, read_manifest

        if self._blobs is None:
            self._blobs = self._open_blobs()
        folder = f"state/stream/g{self._generation}/{partition}"
        for name in sorted((name.rsplit("/", 1)[-1] for name in self._blobs.list(folder)), key=int, reverse=True):
            data = self._blobs.get(f"{folder}/{name}")
            with suppress(Damaged):
                if data is not None:
                    plain = read_manifest(data)
                    return _Joined(int(plain["watermark"][0])) if plain.get("v") == VERSION else None
        return None
