"""Reads a topic from its first record to where it ended when asked, columnar; the shell around `ledger`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from headrace.contract.errors import Unavailable
from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.interfaces.log import Reader, Record
from headrace.replay.ledger.ledger import KEYS

POLL_RECORDS = 2_000
# 10 s without a record before the end: a broker that restarts takes 2 to 5 s.
SILENT_S = 10.0
# 1 s: a local broker hands out what it has within milliseconds.
MARKED_SILENT_S = 1.0
POLL_S = 0.5


def read_all(
    reader: Reader, topic: str, ends: dict[int, int] | None = None, *, marked: bool = False
) -> Iterator[Record]:
    """Yield every record below `ends` (where the topic ends now), in order within a partition.

    `marked`: the topic is written in transactions, so its last offsets may be markers that no reader sees; silence of
    `MARKED_SILENT_S` then is the end. Otherwise raises `Unavailable` when records stay away for `SILENT_S`.
    """
    ends = reader.end_offsets(topic) if ends is None else ends
    begins = reader.begin_offsets(topic)
    left = {p for p, end in ends.items() if begins.get(p, 0) < end}
    if not left:
        return
    reader.assign({(topic, p): begins.get(p, 0) for p in left})
    silent = 0.0
    while left:
        records = reader.poll(POLL_RECORDS, POLL_S)
        silent = 0.0 if records else silent + POLL_S
        if marked and silent >= MARKED_SILENT_S:
            return
        if silent >= SILENT_S:
            raise Unavailable(f"{topic}: no record for {SILENT_S:g} s, partitions {sorted(left)} are unread. Is it up?")
        for record in records:
            if record.offset < ends[record.partition]:
                yield record
            if record.offset >= ends[record.partition] - 1:
                left.discard(record.partition)


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
