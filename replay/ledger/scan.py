"""The samples topic as a reader takes it: repeats dropped, records that were written out of turn held. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.interfaces.log import Record
from headrace.replay.ledger.ledger import KEYS


def sample_keys(records: Iterable[Record]) -> pa.Table:
    """Return KEYS of the samples by the reader's rule.

    A row at or below the partition's last taken position is a repeat and dropped. A record that begins after a
    position not reached yet was written out of turn and waits until what lies between has come.
    """
    parts: dict[int, _Part] = {}
    for record in records:
        if record.value is not None:
            after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
            parts.setdefault(record.partition, _Part()).take(after, last, record.value)
    tables = [pa.Table.from_batches([batch]) for part in parts.values() for batch in part.taken]
    return pa.concat_tables(tables).combine_chunks() if tables else KEYS.empty_table()


@dataclass
class _Part:
    """One partition of `samples` as a reader takes it."""

    reached: Position = START
    taken: list[pa.RecordBatch] = field(default_factory=list)
    held: list[tuple[Position, Position, bytes]] = field(default_factory=list)

    def take(self, after: Position, last: Position, value: bytes) -> None:
        self.held.append((after, last, value))
        while (fitting := next((h for h in self.held if h[0] <= self.reached), None)) is not None:
            self.held.remove(fitting)
            if fitting[1] > self.reached:
                batch = decode_batch(fitting[2], KEYS)
                offset_N, rank_N = batch["offset"].to_numpy(), batch["rank"].to_numpy()
                fresh_N = offset_N > self.reached.offset
                fresh_N |= (offset_N == self.reached.offset) & (rank_N > self.reached.rank)
                self.taken.append(batch.filter(pa.array(fresh_N)))
                self.reached = fitting[1]


def in_order(keys: pa.Table) -> pa.Table:
    """Return the rows by partition and position."""
    return keys.sort_by([("partition", "ascending"), ("offset", "ascending"), ("rank", "ascending")])
