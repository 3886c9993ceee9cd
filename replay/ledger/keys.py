"""Sample keys: what identifies a sample, and where it lies. Pure.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position, Positions, imported, order_of, orders, position_of
from headrace.contract.formats.samples_topic.sample_order import SampleOrder
from headrace.contract.formats.samples_topic.sample_record import Unreadable, read_samples
from headrace.contract.interfaces.log import Record

KEYS = pa.schema(
    [
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("rank", pa.int32()),
        pa.field("event_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("correction", pa.bool_()),
    ]
)
"""What identifies a sample and says where it lies. An impression and a task can have two samples: a negative, and the
positive that corrects it."""
TIMED_KEYS = KEYS.append(pa.field("event_time_ms", pa.int64()))
"""The same with its impression's event time, by which the lake orders, parts and drops rows."""
JOINED = TIMED_KEYS.append(pa.field("label", pa.float32()))
"""The same with its label, by which a recipe may leave samples out."""


def sample_keys(records: Iterable[Record], schema: pa.Schema = KEYS) -> tuple[pa.Table, dict[int, Position]]:
    """Return KEYS of the samples (or the columns of `schema`), by partition, as `SampleOrder` takes them; and the
    position after which each partition begins whose first records retention took.

    A record that is foreign or damaged is left out: samples that were in it are missing.
    """
    partitions: dict[int, SampleOrder] = {}
    begins: dict[int, Position] = {}
    whole: set[int] = set()
    taken: dict[int, list[pa.RecordBatch]] = {}
    for record in records:
        if record.offset == 0:
            whole.add(record.partition)
        found = read_samples(record, schema)
        if isinstance(found, Unreadable):
            continue
        if record.partition not in partitions:
            if record.offset > 0 and found.after > START and record.partition not in whole:
                begins[record.partition] = found.after
            partitions[record.partition] = SampleOrder(begins.get(record.partition, START))
        for each in partitions[record.partition].offer(record) or ():
            rows = found.rows if each.record is record else decode_batch(each.record.value or b"", schema)
            taken.setdefault(record.partition, []).append(each.new_rows(rows))
    tables = [pa.Table.from_batches(batches) for batches in taken.values()]
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table(), begins


def sample_ids(keys: pa.Table) -> pa.Array:
    """Return one string a row that identifies the sample: event id, task, and whether it corrects another sample."""
    kind = pc.if_else(pc.fill_null(keys["correction"], False), "correction", "")
    joined = pc.binary_join_element_wise(
        keys["event_id"].cast(pa.string()), keys["task"].cast(pa.string()), kind, "\x00"
    )
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def order(keys: pa.Table) -> npt.NDArray[np.int64]:
    """Return one number a row that sorts as (offset, rank) does."""
    return orders(keys["offset"].to_numpy(), keys["rank"].to_numpy())


def in_order(keys: pa.Table) -> pa.Table:
    """Return the rows by partition and position."""
    return keys.sort_by([("partition", "ascending"), ("offset", "ascending"), ("rank", "ascending")])


def is_imported(keys: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which rows are of imported history: no log has them."""
    return imported(keys["offset"].to_numpy())


def covers(keys: pa.Table, positions: Positions) -> npt.NDArray[np.bool_]:
    """Return which rows lie at or below `positions`."""
    partition_N = keys["partition"].to_numpy()
    bound_P = np.full(int(partition_N.max(initial=-1)) + 1, order_of(START), np.int64)
    for partition, position in positions.by_partition.items():
        if partition < len(bound_P):
            bound_P[partition] = order_of(position)
    result: npt.NDArray[np.bool_] = order(keys) <= bound_P[partition_N]
    return result


def highest(keys: pa.Table) -> Positions:
    """Return the last position of each partition."""
    partition_N, order_N = keys["partition"].to_numpy(), order(keys)
    last = {int(p): int(order_N[partition_N == p].max()) for p in np.unique(partition_N)}
    return Positions(1, {p: position_of(o) for p, o in last.items()})


def compare(samples: pa.Table, ids_N: pa.Array, there: pa.Array, positions: Positions) -> tuple[int, int]:
    """Return (lost, twice): how often `there` lacks an id at or below `positions`, and how often it has one too much.

    An id that should not be there at all counts as twice: something made it up.
    """
    due = _counts_in(there, ids_N.filter(pa.array(covers(samples, positions))))
    right = _counts_in(ids_N, there)
    return int(due.clip(min=0).sum()), int(right.clip(min=0).sum())


def _counts_in(known: pa.Array, ids: pa.Array) -> npt.NDArray[np.int64]:
    """Return, for each distinct one of `ids`, how many more times it is there than in `known`."""
    counted, have = ids.value_counts(), known.value_counts()
    places = pc.index_in(counted.field("values"), value_set=have.field("values"))
    return np.asarray(
        counted.field("counts").to_numpy() - pc.fill_null(have.field("counts").take(places), 0).to_numpy()
    )
