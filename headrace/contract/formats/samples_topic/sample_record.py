"""Reads one record of the `samples` topic, or says that it is none of ours. Pure; every reader of the topic uses it.

A console producer, a mirror tool or another team may write into an internal topic. Such a record changes nothing:

1. **foreign**: it has not our headers. Nobody misses it; a reader counts it (`records_unreadable_total`) and goes on.
2. **damaged**: it has our headers, and its rows can't be read, or are not those that the headers promise. A reader
   counts it, leaves its position where it is, and goes on: where the samples were ours, the next record begins `after`
   them, which is a gap (`headrace.contract.formats.samples_topic.sample_order`); where they were not, or
   come again, nothing is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from headrace.contract.errors import EventRejected, InvariantBroken
from headrace.contract.formats.events import decode_batch, fit
from headrace.contract.formats.positions import START, Position, order_of, orders
from headrace.contract.formats.sample import IDENTITY, parse_position
from headrace.contract.interfaces.log import Record


@dataclass(frozen=True)
class SampleRecord:
    """A record of samples: rows in position order, all beyond `after`, the last at `last`."""

    after: Position
    last: Position
    rows: pa.RecordBatch


@dataclass(frozen=True)
class Unreadable:
    """A record that holds no samples; `detail` names nothing of its content."""

    kind: Literal["foreign", "damaged"]
    detail: str
    offset: int
    after: Position = START
    last: Position = START
    """What its headers promise; `START` for both where it is foreign."""

    def is_hole(self, position: Position, following: Position) -> bool:
        """Say whether its samples are all that is missing between a reader's position and the `after` of a later
        record."""
        return self.kind == "damaged" and self.after <= position < self.last == following


DAMAGED_MAX = 256
"""Most damaged records a partition that are remembered, the newest ones; a gap of an older one is a gap like others."""


class DamagedRecords:
    """The damaged records of one partition that a reader skipped, while their samples may be missing."""

    def __init__(self) -> None:
        self._records: deque[Unreadable] = deque(maxlen=DAMAGED_MAX)

    def __bool__(self) -> bool:
        return bool(self._records)

    def note(self, found: Unreadable, position: Position) -> None:
        """Remember a record that was skipped, where it promised samples beyond `position`."""
        if found.kind == "damaged" and found.last > position:
            self._records.append(found)

    def hole(self, position: Position, following: Iterable[Position]) -> Unreadable | None:
        """Return the damaged record whose samples are missing between `position` and the `after` of later records."""
        return next((d for after in following for d in self._records if d.is_hole(position, after)), None)

    def offsets(self, position: Position, following: Iterable[Position]) -> list[int]:
        """Return the offsets that a restart must not read on behind: what such a record held is missed by the record
        after it, which perhaps comes only after the restart."""
        hole = self.hole(position, following)
        return [each.offset for each in self._records if each.after == position or each is hole]


def samples_lost(topic: str, partition: int, hole: Unreadable) -> InvariantBroken:
    """Return what a reader raises when the samples of a damaged record did not come again before the topic's end."""
    return InvariantBroken(
        f"{topic}/{partition} offset {hole.offset} is damaged ({hole.detail}), and the samples after "
        f"{tuple(hole.after)} up to {tuple(hole.last)} are nowhere else in the topic. Restart `stream`: it writes "
        "again what its newest state does not hold. Else keep the topic and begin a new generation; `headrace ledger` "
        "shows what is missing. The trainer goes on without them after `headrace train repair`."
    )


def read_samples(record: Record, schema: pa.Schema | None = None) -> SampleRecord | Unreadable:
    """Return the samples of a record, fitted to `schema` by the growth rules when one is given, or why it has none.

    Raises nothing, whatever the bytes are.
    """
    try:
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
    except (KeyError, ValueError):
        return Unreadable("foreign", "it has no headers `after` and `last` as offset:rank", record.offset)
    if record.value is None:
        return Unreadable("damaged", "it has no value", record.offset, after, last)
    try:
        rows = decode_batch(record.value)
        rows.validate(full=True)
        rows = rows if schema is None else fit(rows, schema)
    except (EventRejected, pa.ArrowException, MemoryError) as error:
        return Unreadable("damaged", type(error).__name__, record.offset, after, last)
    detail = _contradiction(rows, record.partition, after, last)
    return Unreadable("damaged", detail, record.offset, after, last) if detail else SampleRecord(after, last, rows)


def _contradiction(rows: pa.RecordBatch, partition: int, after: Position, last: Position) -> str:
    """Say in what the rows are not what the headers promise, or ""."""
    for field in IDENTITY:
        index = rows.schema.get_field_index(field.name)
        if index < 0 or rows.schema.field(index).type != field.type or rows.column(index).null_count:
            return f"column {field.name!r} is missing, of another type, or has nulls"
    if len(set(rows.schema.names)) < len(rows.schema.names):
        return "a column is there twice"
    required = [
        f.name for f, column in zip(rows.schema, rows.columns, strict=True) if column.null_count and not f.nullable
    ]
    if required:
        return f"columns {required} have nulls"
    if not rows.num_rows or not (rows["partition"].to_numpy() == partition).all():
        return "it has no rows, or rows of another partition"
    order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
    if order_N[0] <= order_of(after) or order_N[-1] != order_of(last) or (np.diff(order_N) <= 0).any():
        return "its positions do not run from `after` to `last`"
    return ""
