"""What the pipeline needs of a lake: samples in versions, and with each version the positions that it holds.

The Delta table on files, CephFS, HDFS and S3 implements it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa

from headrace.contract.formats.positions import Position, Positions
from headrace.contract.formats.seals import PartitionSeal, Seal

SpanMs = tuple[int, int]
"""Event times from the first, which is in it, to the second, which is not. Unix ms."""


class StoredHour(NamedTuple):
    """An hour of event time that has rows."""

    begin_ms: int
    rows: int


class StoredSpan(NamedTuple):
    """Event times that are read together."""

    span_ms: SpanMs
    rows: int
    """How many rows of all tasks have them; -1 where that is not known."""


class LakeLayout(NamedTuple):
    """How one version of the lake lies."""

    columns: tuple[str, ...]
    hours: tuple[StoredHour, ...]
    """Oldest first."""


class LakeState(Protocol):
    """What one version of the lake holds."""

    @property
    def version(self) -> int:
        """The table's version."""

    @property
    def positions(self) -> Positions:
        """Everything at or below these was stored."""

    @property
    def next_offsets(self) -> Mapping[int, int]:
        """The `samples` offsets to go on from."""

    @property
    def retained_before_ms(self) -> int:
        """Rows of an earlier event time may have been dropped by retention; 0 where none was."""

    @property
    def imported_upto(self) -> int:
        """The order (`order_of`) of the last imported row; -2^62 - 1 where history was never imported."""


class LakeReader(Protocol):
    """The stored samples, as training, replay and the ledger read them."""

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state (or that version's); None while there is no lake."""

    def read(
        self, version: int | None = None, columns: Sequence[str] | None = None, *, span_ms: SpanMs | None = None
    ) -> pa.Table:
        """Return that version's rows, of event times in `span_ms` where told, in any order, all columns or these."""

    def layout(self, version: int) -> LakeLayout:
        """Return which columns that version has, and how many rows of which hours."""

    def spans(self, version: int, rows_max: int, *, within_ms: SpanMs | None = None) -> Sequence[StoredSpan]:
        """Return spans of event time, in order, that have all of that version's rows, or all within `within_ms`: of at
        most `rows_max` rows each, and of more only where one millisecond has more."""

    def seals(self) -> tuple[Mapping[int, PartitionSeal], int]:
        """Return the newest version's seal of each partition that has one, and how many rows the version holds."""

    def imported(self, tasks: Iterable[str], version: int | None = None) -> tuple[Mapping[str, Seal], int]:
        """Return how many imported rows a version (the newest by default) was given of each of these tasks that has
        some, with the sum of their ids' hashes, and how many rows of all tasks."""

    def hold(self, version: int, holder: str) -> None:
        """Lease the version: its files stay until the lease is given back or ends."""

    def let_go(self, holder: str) -> None:
        """Give the holder's lease back."""


class LakeWriter(Protocol):
    """Where samples are stored: rows, offsets and positions in one commit."""

    def append(
        self, batches: Sequence[pa.RecordBatch], next_offsets: Mapping[int, int], positions: Mapping[int, Position]
    ) -> int:
        """Commit all or nothing and return the version."""

    def state(self, version: int | None = None) -> LakeState | None:
        """Return where the lake has got to; None while there is none."""


class StoredIds(Protocol):
    """What the lake can say of single events, without reading all of it."""

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state; None while there is no lake."""

    def stored(self, ids: Collection[str], column: str, begin_ms: int, end_ms: int) -> frozenset[str]:
        """Return which of `ids` are in `column` (`event_id` or `feedback_id`) of the newest version's samples whose
        impressions have event times from `begin_ms` to before `end_ms`. Raises `Unavailable`."""


class JoinedState(Protocol):
    """What the join says of one partition of `events` in a state that it stored."""

    @property
    def watermark_ms(self) -> int:
        """The partition's watermark there."""


class JoinedUpTo(Protocol):
    """How far the join has got, for who asks whether the lake can hold all that the log no longer has."""

    def joined(self, partition: int) -> JoinedState | None:
        """Return the partition's newest stored state, None while there is none. All samples that it led to were
        delivered to `samples` before it was stored. Raises `Unavailable`."""
