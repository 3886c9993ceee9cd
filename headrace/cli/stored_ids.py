"""The ids that the lake has, for looking late events up; the lake's library is loaded when the first is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from headrace.contract.interfaces.lake import LakeState, StoredIds

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
