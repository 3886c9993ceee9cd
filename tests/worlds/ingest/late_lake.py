"""A lake as the look-up of late events asks it: with the ids that a test gives it, or away."""

from __future__ import annotations

from collections.abc import Collection

from letters_world import P

from headrace.contract.errors import Unavailable
from headrace.contract.formats.positions import Position, Positions
from headrace.contract.interfaces.lake import LakeState


class State:
    """One version of a lake that holds everything up to an offset."""

    def __init__(self, offset: int, retained_before_ms: int = 0, following: int = 0) -> None:
        self.version, self.retained_before_ms = 1, retained_before_ms
        self.next_offsets = dict.fromkeys(range(P), following)
        self.positions = Positions(1, {partition: Position(offset, 0) for partition in range(P)})


class Ids:
    """A lake that has these ids, or is away."""

    def __init__(self, ids: set[str], state: State | None, *, away: bool = False) -> None:
        self.ids, self.newest, self.away = ids, state, away
        self.asked: list[tuple[str, int, int]] = []

    def state(self, version: int | None = None) -> LakeState | None:
        if self.away:
            raise Unavailable("away")
        return self.newest

    def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
        self.asked.append((column, begin_ms, end_ms))
        return frozenset(ids) & self.ids
