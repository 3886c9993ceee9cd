"""Reads a topic from its first record to where it ended when asked, columnar; the shell around `ledger`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from headrace.contract.errors import Unavailable
from headrace.contract.events import decode_batch
from headrace.contract.log import Reader, Record
from headrace.contract.positions import START, Position
from headrace.contract.sample import parse_position
from headrace.replay.ledger import KEYS

POLL_RECORDS = 2_000
# 10 s without a record before the end: a broker that restarts takes 2 to 5 s.
SILENT_S = 10.0
POLL_S = 0.5


def read_all(reader: Reader, topic: str, ends: dict[int, int] | None = None) -> Iterator[Record]:
    """Yield every record below `ends` (where the topic ends now), in order within a partition.

    Raises `Unavailable` when records stay away for `SILENT_S`.
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
    position not reached yet was written out of turn and is dropped whole; its owner emits it again.
    """
    reached: dict[int, Position] = {}
    tables: list[pa.Table] = []
    for record in records:
        own = reached.get(record.partition, START)
        if record.value is None or parse_position(record.headers["after"]) > own:
            continue
        last = parse_position(record.headers["last"])
        if last <= own:
            continue
        batch = decode_batch(record.value, KEYS)
        offset_N, rank_N = batch["offset"].to_numpy(), batch["rank"].to_numpy()
        fresh_N = (offset_N > own.offset) | ((offset_N == own.offset) & (rank_N > own.rank))
        tables.append(pa.Table.from_batches([batch.filter(pa.array(np.asarray(fresh_N)))]))
        reached[record.partition] = last
    return pa.concat_tables(tables).combine_chunks() if tables else KEYS.empty_table()


def in_order(keys: pa.Table) -> pa.Table:
    """Return the rows by partition and position."""
    return keys.sort_by([("partition", "ascending"), ("offset", "ascending"), ("rank", "ascending")])
