"""The rule by which every reader takes the records of a `samples` partition. Pure.

1. A reader keeps one position a partition, that of the last sample it took.
2. It drops what is not greater: the rows of a repeated record, or of the part of one.
3. A record whose `after` is beyond its own position was written out of turn, or the one before it is still to come.
   The reader holds it back until it has reached `after`; or it leaves it out, where the record's writer sends it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from headrace.contract.formats.positions import START, Position, order_of, orders
from headrace.contract.formats.sample import parse_position
from headrace.contract.interfaces.log import Record


class Held(NamedTuple):
    """A record that waits for the samples before it."""

    after: Position
    last: Position
    record: Record


class Next(NamedTuple):
    """A record whose turn it is: its rows beyond `above` are new, `last` is the position of its last row."""

    record: Record
    above: Position
    last: Position

    def new_rows(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return those of the record's rows that are new."""
        new_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy()) > order_of(self.above)
        return rows if new_N.all() else rows.filter(pa.array(new_N))


@dataclass
class SampleOrder:
    """One partition of `samples` as a reader takes it; see the module for the rule."""

    position: Position = START
    """The last position that was taken."""
    hold: bool = True
    """False leaves out what is out of turn."""
    held: list[Held] = field(default_factory=list)
    """What waits, as it came. The caller bounds it."""

    def offer(self, record: Record) -> Sequence[Next] | None:
        """Return the records to take now, in order: none for a repeat, and behind a record those that waited for it.

        None says that the record is out of turn: it begins after a position that is not reached.
        """
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
        if last <= self.position:
            return ()
        if after > self.position:
            if self.hold:
                self.held.append(Held(after, last, record))
            return None
        following = [self._taken(record, last)]
        while (fitting := next((h for h in self.held if h.after <= self.position), None)) is not None:
            self.held.remove(fitting)
            if fitting.last > self.position:
                following.append(self._taken(fitting.record, fitting.last))
        return following

    def _taken(self, record: Record, last: Position) -> Next:
        taken = Next(record, self.position, last)
        self.position = last
        return taken
