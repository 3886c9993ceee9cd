"""What the pipeline needs of the archive of `events`: records as they lay in the topic, and up to which offset.

The Delta table on files, CephFS and HDFS implements it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from headrace.contract.interfaces.log import Record, VerbatimRecord


class Offsets(NamedTuple):
    """Offsets of a partition, from the first, which is among them, to the one that is not."""

    begin: int
    end: int


class ArchiveState(NamedTuple):
    """What one version of the archive holds of a generation of `events`."""

    version: int
    whole: Mapping[int, Offsets]
    """By partition: every record that lay in the topic at these offsets is in the archive, once."""
    lost: Mapping[int, Offsets] = {}
    """By partition: the newest offsets that the topic forgot before they were archived."""


class ArchiveWriter(Protocol):
    """Where the sink archives: records and offsets in one commit."""

    def state(self, version: int | None = None) -> ArchiveState | None:
        """Return how far the archive has got; None while there is none.

        Raises `Unavailable`, and `InvariantBroken` where it was made of another topic of this name.
        """

    def last(self, partition: int) -> Record | None:
        """Return the newest record of a partition that the newest version has, None for none. Raises `Unavailable`."""

    def append(
        self,
        records: Sequence[VerbatimRecord],
        taken: Mapping[int, Offsets],
        lost: Mapping[int, Offsets],
    ) -> int:
        """Commit all or nothing; return the version.

        Args:
            records: of partitions in `taken`, in order within a partition.
            taken: all offsets that the records are of: from where the archive ends, or what it `lost` ends.
            lost: offsets that the topic forgot between the archive's end and `taken`.

        Raises `Unavailable` where the store does not answer or another writer was first: ask `state`, since the commit
        may have happened all the same.
        """


class ArchiveReader(Protocol):
    """The archive as the readers of `events` read it."""

    def state(self, version: int | None = None) -> ArchiveState | None:
        """Return what the newest version holds (or that version); None while there is no archive."""

    def last(self, partition: int) -> Record | None:
        """Return the newest record of a partition that the newest version has, None for none. Raises `Unavailable`."""

    def read(self, version: int, partition: int, offsets: Offsets) -> Iterator[VerbatimRecord]:
        """Yield the records of these offsets, in order and a few at a time in memory.

        Raises `Unavailable` where they cannot be read, `InvariantBroken` where a file is damaged.
        """

    def offset_at(self, version: int, partition: int, time_ms: int) -> int | None:
        """Return the offset of the first record of this time or later, None where all are older. Times are the
        broker's, which grow along a partition."""

    def hold(self, version: int, holder: str) -> None:
        """Lease the version: its files stay until the lease is given back or ends."""

    def let_go(self, holder: str) -> None:
        """Give the holder's lease back."""


@runtime_checkable
class TimeSeeker(Protocol):
    """A reader that finds times without reading up to them."""

    def offset_at(self, topic: str, partition: int, time_ms: int) -> int | None:
        """Return an offset before which no record is of this time or later, None where it does not know."""
