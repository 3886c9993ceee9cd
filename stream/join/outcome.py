"""What the join makes of records: totals, labels that become samples next, samples. Pure.

Legend: L labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from headrace.contract.formats.positions import Position
from headrace.kernels.arrays import I64s
from headrace.stream.join.matching import CODE, ID, SEQ, SETTLED


@dataclass(slots=True)
class TaskCounts:
    """Totals of one task since the log began; impressions = positives + negatives + waiting."""

    impressions: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0


@dataclass(slots=True)
class Totals:
    """Rows by what became of them, since the log began."""

    impressions: int = 0
    feedback: int = 0
    repeated_in_log: int = 0
    bad_records: int = 0
    too_late: int = 0
    """Those of `repeated_in_log` that are dropped because nobody can tell whether they came before."""
    tasks: list[TaskCounts] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Emitted:
    """The samples that records resolved: positions > `after` and <= `last`."""

    batch: pa.RecordBatch
    after: Position
    last: Position


class Gathered:
    """What several records gave so far: rows to featurize and labels to emit, in order."""

    def __init__(self) -> None:
        self.impressions: list[pa.RecordBatch] = []
        self.labels: list[I64s] = []
        self.offsets: list[I64s] = []
        self.released: list[I64s] = []
        """Sequence numbers of impressions whose columns are dropped without a sample: no feedback came after an eager
        negative, or none came late."""
        self.ids: list[pa.Array] = []
        self.values: list[pa.Array] = []
        """Ids and values of feedback, row by row."""
        self.ids_rows = 0

    def label(self, labels_L5: I64s, offset: int, feedback: pa.RecordBatch | None) -> None:
        """Add the labels of one record, whose rows are `feedback` where it is feedback."""
        rows_L = labels_L5[:, ID]
        if feedback is not None:
            rows_L[rows_L >= 0] += self.ids_rows
            self.ids.append(feedback.column("event_id"))
            self.values.append(feedback.column("value"))
            self.ids_rows += feedback.num_rows
        settled_L = labels_L5[:, CODE] == SETTLED
        if settled_L.any():
            self.released.append(labels_L5[settled_L, SEQ])
        self.labels.append(labels_L5)
        self.offsets.append(np.full(len(labels_L5), offset, np.int64))
