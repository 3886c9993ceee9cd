"""Positions: which events an effect contains, exactly.

A sample's position is (partition, offset of the `events` record that resolved it, rank within that record).
Positions grow strictly along a partition; the samples of events-partition i lie in samples-partition i.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec


class Position(NamedTuple):
    """A place within one partition; tuples compare in log order. `START` precedes every sample."""

    offset: int
    rank: int


START = Position(-1, -1)


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


def least(several: Iterable[Positions]) -> Positions:
    """Return, partition by partition, the lowest of several positions: what all of them contain."""
    items = list(several)
    if not items:
        return Positions(0, {})
    partitions = set().union(*(set(p.by_partition) for p in items))
    return Positions(items[0].generation, {p: min(x.at(p) for x in items) for p in sorted(partitions)})
