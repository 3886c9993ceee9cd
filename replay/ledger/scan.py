"""The samples topic as a reader takes it: repeats dropped, records that were written out of turn held. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.sample_order import SampleOrder
from headrace.contract.interfaces.log import Record
from headrace.replay.ledger.keys import KEYS


def sample_keys(records: Iterable[Record]) -> pa.Table:
    """Return KEYS of the samples, by partition; `SampleOrder` tells which a reader takes."""
    orders: dict[int, SampleOrder] = {}
    taken: dict[int, list[pa.RecordBatch]] = {}
    for record in records:
        if record.value is not None:
            for each in orders.setdefault(record.partition, SampleOrder()).offer(record) or ():
                rows = each.new_rows(decode_batch(each.record.value or b"", KEYS))
                taken.setdefault(record.partition, []).append(rows)
    tables = [pa.Table.from_batches(batches) for batches in taken.values()]
    return pa.concat_tables(tables).combine_chunks() if tables else KEYS.empty_table()
