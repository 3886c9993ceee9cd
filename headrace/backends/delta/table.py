"""A Delta table of one topic's rows, on a POSIX path (local disk, CephFS) or hdfs://host:port/path.

What the lake and the archive have in common: they are opened at a version, leased, committed to by several writers, put
on the disk, and are of one topic, whose offsets they know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from deltalake import DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from headrace.backends.delta.fsync import OnDisk
from headrace.backends.delta.leases import Leases
from headrace.backends.delta.properties import number_of
from headrace.contract.config import LakeConfig
from headrace.contract.errors import InvariantBroken, Unavailable, disk_remedy

logger = logging.getLogger("headrace.lake")

# Others' commits that one commit steps over: a compaction makes one an hour of event time, so far fewer come between.
STEPS_MAX = 15


class TopicTable:
    """One table. Safe for several writers: the second of two that move one partition is refused."""

    what = "table"
    """What it is called in errors."""
    topic_kind = ""
    """The topic that its rows are of."""

    def __init__(
        self, uri: str, *, generation: int, partitions: int, config: LakeConfig | None, leases: Leases | None, of: str
    ) -> None:
        """Open nothing yet.

        Args:
            partitions: how many `state` asks for: each question reads the Delta log again, slow on HDFS.
            of: the id of the topic that is read; "" asks nothing of it.
        """
        self.uri, self.generation, self.partitions = uri, generation, partitions
        self.config, self.leases = config or LakeConfig(), leases
        self._topic_id = of
        self._writer: Any = None
        self._disk = OnDisk()

    def open(self, version: int | datetime | None = None) -> Any:
        """Return the Delta table, at a version or at a time; None while there is none. Raises `Unavailable`."""
        try:
            if isinstance(version, datetime):
                table = DeltaTable(self.uri)
                table.load_as_version(version)
                return table
            return DeltaTable(self.uri, version=version)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            at = "" if version is None else f" at {version}"
            raise Unavailable(
                f"the {self.what} at {self.uri} can't be opened{at}: {error}. Is the store up? `headrace status` says "
                "so."
            ) from error

    def opened(self, version: int | datetime | None = None) -> Any:
        """Return the Delta table as `open`. Raises `Unavailable`, also while there is none."""
        table = self.open(version)
        if table is None:
            raise Unavailable(f"there is no {self.what} at {self.uri} yet; the sink makes it with its first commit.")
        return table

    def let_go(self, holder: str) -> None:
        """Give the holder's lease back; where the store is away, it ends by itself."""
        if self.leases is None:
            return
        try:
            self.leases.give_back(holder)
        except Unavailable as error:
            logger.warning(
                "the lease of %s on the %s was not given back and ends by itself: %s", holder, self.what, error
            )

    def put_on_disk(self, before: int, version: int) -> None:
        """Return when the versions behind `before` up to this one are on the disk. Raises `OSError`."""
        self._disk.put(self.uri, before, version)

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """Commit in the block. What fails forgets the open table; what the store refuses is `Unavailable`."""
        try:
            yield
        except (DeltaError, CommitFailedError, OSError) as error:
            self._writer = None
            raise Unavailable(
                f"the {self.what} at {self.uri} did not take a commit: {error}; {disk_remedy(error)}."
            ) from error
        except BaseException:
            self._writer = None
            raise

    def _newest_for_writing(self) -> Any:
        """Return the table at its newest version; one that is open reads on in the log instead of all of it again."""
        if self._writer is None:
            self._writer = self.open()
        else:
            self._writer.update_incremental()
        return self._writer

    def _topic_mark(self) -> list[Transaction]:
        """Return what says which topic the offsets are of, where that is known."""
        return [Transaction(f"topic-g{self.generation}", number_of(self._topic_id))] if self._topic_id else []

    def _check_topic(self, table: Any) -> None:
        """Raise `InvariantBroken` where the table's offsets are of a topic that is no more."""
        stored = table.transaction_version(f"topic-g{self.generation}") if self._topic_id else None
        if stored is not None and stored != number_of(self._topic_id):
            raise InvariantBroken(
                f"the {self.what} at {self.uri} goes on from offsets of another `{self.topic_kind}` topic than the one "
                f"that is there, of id {self._topic_id}: it was deleted and made anew, and its offsets begin at 0. "
                "What comes would be taken for what is stored already. Raise log.generation to begin anew beside what "
                "is stored."
            )
