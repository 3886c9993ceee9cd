"""Positions: which events an effect contains, exactly.

A sample's position is (partition, offset of the `events` record that resolved it, rank within that record).
Positions grow strictly along a partition; the samples of events-partition i lie in samples-partition i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt


class Position(NamedTuple):
    """A place within one partition; tuples compare in log order. `START` precedes every sample."""

    offset: int
    rank: int


START = Position(-1, -1)

IMPORTED_FROM, IMPORTED_TO = -(1 << 38), -2
"""Offsets of imported history, which no log has: the first of all, and the last that there may be. They precede
`START`, so every effect that says up to where it goes says that they lie before it."""

RANK_BITS = 24
RANKS_MAX = 1 << RANK_BITS
"""Most samples that one record can resolve: 16.8 million, so that a position fits in one number (`order_of`)."""


def order_of(position: Position | tuple[int, int]) -> int:
    """Return one number that sorts as positions do; an offset is below 2^39, and -2^38 at least.

    >>> order_of(Position(IMPORTED_FROM, 0)) < order_of(Position(IMPORTED_TO, 5)) < order_of(START)
    True
    >>> order_of(START) < order_of(Position(0, 0)) < order_of(Position(0, 9)) < order_of(Position(1, 0))
    True
    """
    return (position[0] << RANK_BITS) + position[1]


def position_of(order: int) -> Position:
    """Return the position, not `START`, that `order_of` made into one number.

    >>> position_of(order_of(Position(7, 3)))
    Position(offset=7, rank=3)
    """
    return Position(order >> RANK_BITS, order & (RANKS_MAX - 1))


def orders(offset_N: npt.NDArray[np.int64], rank_N: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return `order_of` each position: int64 [N]."""
    order_N: npt.NDArray[np.int64] = (offset_N << RANK_BITS) + rank_N
    return order_N


def imported(offset_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which samples, by their offsets, are of imported history: bool [N]."""
    imported_N: npt.NDArray[np.bool_] = offset_N <= IMPORTED_TO
    return imported_N


class Positions(msgspec.Struct, frozen=True):
    """One position a partition: everything at or below it is contained, nothing above it is."""

    generation: int
    by_partition: dict[int, Position] = {}

    def at(self, partition: int) -> Position:
        """Return the partition's position, `START` where nothing was taken yet."""
        return self.by_partition.get(partition, START)

    def advanced(self, moves: Mapping[int, Position]) -> Positions:
        """Return new positions with `moves` applied; a move backwards is ignored."""
        merged = dict(self.by_partition)
        for partition, position in moves.items():
            merged[partition] = max(merged.get(partition, START), position)
        return Positions(self.generation, dict(sorted(merged.items())))

    def covers(self, partition: int, position: Position) -> bool:
        """Say whether an effect with these positions contains the sample at `position`."""
        return self.at(partition) >= position

    def to_json(self) -> dict[str, list[int]]:
        """Return the form that manifests, commits and `/v1/model` show: {"0": [offset, rank], ...}."""
        return {str(p): [o, r] for p, (o, r) in sorted(self.by_partition.items())}

    @classmethod
    def from_json(cls, generation: int, data: Mapping[str, Iterable[int]]) -> Positions:
        """Read what `to_json` wrote."""
        return cls(generation, {int(p): Position(*(int(x) for x in v)) for p, v in data.items()})


class Mixed(msgspec.Struct, frozen=True):
    """What a model has learnt while it has not learnt all of the lake: then its positions claim nothing."""

    stored_left: int = 0
    """How many rows of the lake's version are not learnt, of all tasks; 0 once it is learnt."""
    live: dict[str, list[int]] = {}
    """As `Positions.to_json`: up to where the topic was learnt, of what lies beyond the version's positions."""


class Cursor(msgspec.Struct, frozen=True):
    """Where a training run has got to; it travels in the checkpoint."""

    positions: dict[str, list[int]] = {}
    """As `Positions.to_json`: what the model contains. Nothing while the lake is being learnt."""
    next_offsets: dict[str, int] = {}
    """The `samples` record to read on from, by partition."""
    lake_version: int = -1
    """The version whose rows are being learnt; -1: the run began without a lake, or is done with it."""
    lake_taken: int = 0
    """How many of that version's rows, in total order, are learnt."""
    lake_from_ms: int = 0
    """An event time: of the version's rows, all that come before it in total order are learnt. 0: none is meant."""
    lake_before: int = 0
    """How many of `lake_taken` come before `lake_from_ms`, so that a reader can begin there."""
    live_from: dict[str, list[int]] | None = None
    """As `Positions.to_json`: the positions that `lake_version` holds, behind which samples of the topic are learnt
    beside its rows. It stays as it was when the run began. None: the lake is learnt alone."""
    live: dict[str, list[int]] = {}
    """As `Positions.to_json`: of what lies behind `live_from`, up to where it is learnt; the partitions with some."""


def least(several: Iterable[Positions]) -> Positions:
    """Return, partition by partition, the lowest of several positions: what all of them contain."""
    items = list(several)
    if not items:
        return Positions(0, {})
    partitions = set().union(*(set(p.by_partition) for p in items))
    return Positions(items[0].generation, {p: min(x.at(p) for x in items) for p in sorted(partitions)})
