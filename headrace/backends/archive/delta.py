"""The archive of `events` as a Delta table beside the lake's, on a POSIX path or hdfs://host:port/path.

One row is one record of the topic, as it lay there: offset, the broker's time and its kind, key, value and headers,
nulls and repeats too. The table is partitioned by generation, partition and the hour of the broker's time. One commit
holds the files and, as Delta application transactions, the offsets:

| application id | version |
|---|---|
| `events-g<generation>-p<partition>` | the offset of `events` to go on from: all below it, down to `begin`, are here |
| `begin-g<generation>-p<partition>` | the first offset from which all are here; nothing is 0 |
| `lost-from-...`, `lost-to-...` | the newest offsets that the topic forgot before they were archived |
| `topic-g<generation>` | which `events` topic the offsets are of: 63 bits of a hash of its id, where known |

A commit reads the newest version, refuses offsets at which it does not end, writes the files, and then the log's entry,
which only one writer of a version can. Where another one moved the same partition, delta-rs refuses it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction

from headrace.backends.archive.files import (
    PLACES,
    TABLE,
    ArchiveFile,
    Place,
    hour_of,
    listed,
    records_of,
    store_at,
    to_rows,
    write_file,
)
from headrace.backends.delta.leases import Leases
from headrace.backends.delta.properties import properties
from headrace.backends.delta.table import STEPS_MAX, TopicTable
from headrace.backends.lake.hour_files import WRITERS
from headrace.contract.config import LakeConfig
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.archive import ArchiveState, Offsets
from headrace.contract.interfaces.log import Record, VerbatimRecord

logger = logging.getLogger("headrace.archive")


class DeltaArchive(TopicTable):
    """One table of records. Safe for several writers: the second of two that move one partition is refused."""

    what, topic_kind = "archive", "events"

    def __init__(
        self,
        uri: str,
        topic: str,
        *,
        generation: int = 1,
        partitions: int = 256,
        config: LakeConfig | None = None,
        leases: Leases | None = None,
        events_id: str = "",
    ) -> None:
        """Open nothing yet.

        Args:
            topic: name of the topic that records are of when they are read.
            partitions: how many partitions `state` asks for.
            config: settings of the table; its retention is the archive's own.
            events_id: the id of the `events` topic that is read; "" asks nothing of it.
        """
        super().__init__(uri, generation=generation, partitions=partitions, config=config, leases=leases, of=events_id)
        self.topic = topic
        self._reading: tuple[int, list[ArchiveFile], Any] | None = None
        """The version that was read last, its files, and the file system below them."""

    # -- what is there

    def state(self, version: int | None = None) -> ArchiveState | None:
        """Return how far the archive has got, as `ArchiveWriter.state`."""
        table = self.open(version)
        if table is None:
            return None
        self._check_topic(table)
        whole, lost = {}, {}
        for partition in range(self.partitions):
            end = self._mark(table, "events", partition)
            if end is None:
                continue
            begin = self._mark(table, "begin", partition) or 0
            whole[partition] = Offsets(begin, end)
            # Before anything is lost, or dropped, the archive begins with the topic's first record.
            since = self._mark(table, "lost-from", partition) if begin else None
            if since is not None:
                lost[partition] = Offsets(since, self._mark(table, "lost-to", partition) or since)
        return ArchiveState(int(table.version()), whole, lost)

    def last(self, partition: int) -> Record | None:
        """Return the newest record of a partition, None where none is left."""
        table = self.opened()
        found = self._of(listed(table), partition)
        if not found:
            return None
        top = max(file.last for file in found)
        return next(self._read(found, store_at(table), partition, Offsets(top, top + 1)), None)

    def read(self, version: int, partition: int, offsets: Offsets) -> Iterator[VerbatimRecord]:
        """Yield the records of these offsets, as `ArchiveReader.read`."""
        found, store = self._files(version)
        return self._read(self._of(found, partition), store, partition, offsets)

    def offset_at(self, version: int, partition: int, time_ms: int) -> int | None:
        """Return the first offset of this time or later, as `ArchiveReader.offset_at`."""
        found, store = self._files(version)
        ours = self._of(found, partition)
        first = next((file for file in ours if file.last_ms >= time_ms), None)
        if first is None:
            return None
        # Another file may have offsets between those of this one.
        records = self._read(ours, store, partition, Offsets(first.first, first.last + 1))
        return next((record.offset for record in records if record.timestamp_ms >= time_ms), None)

    def hold(self, version: int, holder: str) -> None:
        """Lease a version, before it is read: vacuum leaves its files in place. Raises `Unavailable`."""
        if self.leases is None:
            return
        state = self.state(version)
        if state is None:
            raise Unavailable(f"there is no archive at {self.uri} to lease version {version} of.")
        found, _ = self._files(version)
        ends = {str(p): span.end for p, span in state.whole.items()}
        rows = sum(file.rows for file in found)
        self.leases.take(holder, version, generation=self.generation, rows=rows, positions={}, next_offsets=ends)

    # -- what is written

    def append(
        self, records: Sequence[VerbatimRecord], taken: Mapping[int, Offsets], lost: Mapping[int, Offsets]
    ) -> int:
        """Commit all or nothing, as `ArchiveWriter.append`."""
        with self._committing():
            table = self._newest_for_writing()
            before = int(table.version())
            self._disk.settle(self.uri, before)
            self._check_topic(table)
            marks = [mark for p, span in sorted(taken.items()) for mark in self._moved(table, p, span, lost.get(p))]
            marks += self._topic_mark()
            table.create_write_transaction(
                self._written(table, records),
                mode="append",
                schema=table.schema(),
                partition_by=list(PLACES),
                commit_properties=CommitProperties(app_transactions=marks, max_commit_retries=STEPS_MAX),
            )
            table.update_incremental()
            self.put_on_disk(before, int(table.version()))
        return int(table.version())

    def _newest_for_writing(self) -> Any:
        if super()._newest_for_writing() is None:
            if "://" not in self.uri:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
            self._writer = DeltaTable.create(
                self.uri, Schema.from_arrow(TABLE), partition_by=list(PLACES), configuration=properties(self.config)
            )
            self.put_on_disk(-1, int(self._writer.version()))
        return self._writer

    def _moved(self, table: Any, partition: int, span: Offsets, lost: Offsets | None) -> Iterator[Transaction]:
        """Yield what moves a partition. Raises `Unavailable` where the table does not end where the writer thinks."""
        stored = self._mark(table, "events", partition)
        end = span.begin if lost is None else lost.begin
        if stored is not None and stored != end:
            raise Unavailable(
                f"partition {partition} of the archive ends at offset {stored}; this writer came with what follows "
                f"{end}. Another one has stored it: ask the archive where to go on."
            )
        if stored is None or lost is not None:
            yield Transaction(self._id("begin", partition), span.begin)
        if lost is not None:
            yield Transaction(self._id("lost-from", partition), lost.begin)
            yield Transaction(self._id("lost-to", partition), lost.end)
        yield Transaction(self._id("events", partition), span.end)

    def _written(self, table: Any, records: Sequence[VerbatimRecord]) -> list[AddAction]:
        by_place: defaultdict[Place, list[VerbatimRecord]] = defaultdict(list)
        for record in records:
            by_place[Place(self.generation, record.partition, hour_of(record.timestamp_ms))].append(record)
        store = store_at(table)

        def write(place: Place) -> AddAction:
            return write_file(store, place, [to_rows(by_place[place])], data_change=True)

        if len(by_place) < 2 or "://" not in self.uri:
            return [write(place) for place in by_place]
        # On HDFS closing a file waits for DataNodes half a second.
        with ThreadPoolExecutor(WRITERS) as pool:
            return list(pool.map(write, by_place))

    # -- the table

    def _files(self, version: int) -> tuple[list[ArchiveFile], Any]:
        if self._reading is None or self._reading[0] != version:
            table = self.opened(version)
            self._reading = version, listed(table), store_at(table)
        return self._reading[1], self._reading[2]

    def _of(self, found: Sequence[ArchiveFile], partition: int) -> list[ArchiveFile]:
        wanted = self.generation, partition
        return [file for file in found if (file.place.generation, file.place.partition) == wanted]

    def _read(
        self, found: Sequence[ArchiveFile], store: Any, partition: int, offsets: Offsets
    ) -> Iterator[VerbatimRecord]:
        try:
            yield from records_of(store, found, self.topic, offsets)
        except (DeltaError, OSError) as error:
            raise Unavailable(
                f"the archive at {self.uri} can't be read, partition {partition}: {error}. See whether the store "
                "answers; a file that is gone was vacuumed: read again, with a lease."
            ) from error

    def _mark(self, table: Any, name: str, partition: int) -> int | None:
        found: int | None = table.transaction_version(self._id(name, partition))
        return found

    def _id(self, name: str, partition: int) -> str:
        return f"{name}-g{self.generation}-p{partition}"
