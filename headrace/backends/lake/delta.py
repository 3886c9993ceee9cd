"""The lake as a Delta table, on a POSIX path (local disk, CephFS) or hdfs://host:port/path.

One commit holds the files, and, as Delta application transactions, where each partition has got to:

| application id | version |
|---|---|
| `samples-g<generation>-p<partition>` | the `samples` offset to go on from |
| `order-g<generation>-p<partition>` | the last position in the lake, as one number (`order_of`) |
| `position-g<generation>-p<partition>` | the same in lakes of before: offset * 2**22 + rank |
| `topic-g<generation>` | which `samples` topic the offsets are of: 63 bits of a hash of its id, where known |
| `retained` | hours since 1970 before which retention has dropped rows |
| `sealed-...` | how many rows a partition has and the sum of their ids' hashes: `headrace.backends.lake.lake_seals` |
| `imported-...` | history that was not logged here: `headrace.backends.lake.imports` |

Transactions survive compaction and the checkpoints of Delta's own log, so a writer that restarts asks the table alone.

A commit:

1. Read the newest version.
2. Refuse rows and offsets that it already holds: another writer has stored them. An offset goes back only with rows
   that are new: the topic has lost its end since, and got it back from its writer.
3. Write the files, one or more for each hour of event time, side by side; of many hours, few files at a time.
4. Write the log's entry, which only one writer of a version can. Where another one was first, delta-rs looks at what it
   did: it steps over a compaction, a vacuum or another partition's commit. A commit that moved one of our partitions
   ends ours with nothing done.
5. On a POSIX path, wait until files and entry are on the disk.

A table that this module makes is partitioned by `event_date` (UTC) and `event_hour`. A table that was made without them
stays as it is: it is read and written, and retention leaves it alone, since its hours do not lie apart. A new
`log.generation` beside a new store begins a partitioned one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from deltalake import CommitProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from headrace.backends.delta.leases import Leases
from headrace.backends.delta.properties import properties
from headrace.backends.delta.table import STEPS_MAX, TopicTable
from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, hours_in, with_hours, write_hours
from headrace.backends.lake.lake_seals import HashIds, next_seals, stored_seals, transactions
from headrace.backends.lake.lake_state import LakeState, imported_seals, imported_upto, state_of_lease
from headrace.backends.lake.listing import count_rows, least_positions, partition_columns, span_of
from headrace.backends.lake.spans import cut_hours
from headrace.backends.lake.version_files import PLACE, VersionFiles
from headrace.contract.config import LakeConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.positions import START, Position, Positions, order_of, position_of
from headrace.contract.formats.seals import PartitionSeal, Seal
from headrace.contract.interfaces.lake import LakeLayout, SpanMs, StoredSpan

logger = logging.getLogger("headrace.lake")
Found = TypeVar("Found")

# Lakes of before keep 22 bits for a rank, under another id.
OLD_RANK_BITS = 22
PARTITIONS_MAX = 256
RETAINED_ID = "retained"
# delta-rs holds half a megabyte for each hour of a commit until its end: 32 MB for so many. Of more, few files are
# written at a time; the samples of a minute are of two hours, those of a back-fill or of wrong clocks of thousands.
HOURS_AT_ONCE = 64


class DeltaLake(TopicTable):
    """One table of samples. Safe for several writers: the second of two that move one partition is refused."""

    what, topic_kind = "lake", "samples"

    def __init__(
        self,
        uri: str,
        *,
        generation: int = 1,
        partitions: int = PARTITIONS_MAX,
        config: LakeConfig | None = None,
        leases: Leases | None = None,
        samples_id: str = "",
        hash_ids: HashIds | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            samples_id: the id of the `samples` topic that is read; "" asks nothing of it.
            hash_ids: by which commits are sealed; without it they are not.
        """
        super().__init__(uri, generation=generation, partitions=partitions, config=config, leases=leases, of=samples_id)
        self._hash_ids = hash_ids
        self._reading: VersionFiles | None = None
        """The version that was read last."""
        self._instead: tuple[int, VersionFiles] | None = None
        """A version whose files are gone, and what is read in its place."""
        self._sealed: dict[int, PartitionSeal] = {}
        """What this writer stored last."""

    def append(
        self, batches: Sequence[pa.RecordBatch], next_offsets: Mapping[int, int], positions: Mapping[int, Position]
    ) -> int:
        """Commit rows, offsets and positions, all or nothing; return the new version.

        Raises `Unavailable` when the store does not answer or another writer was first: ask `state` and go on from
        there, since the commit may have happened all the same.
        """
        rows, sealed = pa.Table.from_batches(batches), dict[int, PartitionSeal]()

        def marks_of(table: Any) -> list[Transaction]:
            self._refuse_repeats(table, rows, next_offsets, positions)
            of = partial(next_seals, table, rows, positions, stood=partial(self._position_of, table))
            sealed.update(of(mine=self._sealed, hash_ids=self._hash_ids, generation=self.generation))
            return [*self._transactions(next_offsets, positions), *transactions(sealed, self.generation)]

        version = self.commit(rows, marks_of)
        self._sealed |= sealed
        return version

    def commit(self, rows: pa.Table, marks_of: Callable[[Any], list[Transaction]]) -> int:
        """Commit rows, and with them what `marks_of` says of the newest table (None: there is none), all or nothing;
        return the new version. Raises as `append`, and what `marks_of` raises: nothing is committed then."""
        with self._committing():
            if "://" not in self.uri:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
            table = self._newest_for_writing()
            before = -1 if table is None else int(table.version())
            self._disk.settle(self.uri, before)
            commit = CommitProperties(app_transactions=marks_of(table), max_commit_retries=STEPS_MAX)
            parted = "event_time_ms" in rows.column_names if table is None else bool(partition_columns(table))
            stored = with_hours(rows) if parted else rows
            if parted and hours_in(stored) > HOURS_AT_ONCE:
                table = self._append_hours(table, stored, commit)
            else:
                self._write(table, stored, parted, commit)
                table = self._newest_for_writing() if table is None else table
            if table is not None:
                self.put_on_disk(before, int(table.version()))
        if table is None:
            raise InvariantBroken(f"the lake at {self.uri} is gone right after a commit; nothing may delete it.")
        return int(table.version())

    def state(self, version: int | None = None) -> LakeState | None:
        """Return the newest version's state (or that version's); None while there is no lake.

        Raises `Unavailable` when the store does not answer, or neither log nor lease knows the version any more.
        """
        try:
            table = self.open(version)
        except Unavailable:
            lease = self.leases.of_version(version, self.generation) if self.leases and version is not None else None
            if lease is None:
                raise
            return state_of_lease(lease)
        if table is None:
            return None
        self._check_topic(table)
        return self._state_of(table)

    def seals(self) -> tuple[dict[int, PartitionSeal], int]:
        """Return the newest version's seal of each partition that has one, and how many rows the version holds.

        Raises `Unavailable` when the store does not answer.
        """
        table = self.open()
        if table is None:
            return {}, 0
        return stored_seals(table, self.generation, self.partitions), count_rows(table)

    def imported(self, tasks: Iterable[str], version: int | None = None) -> tuple[dict[str, Seal], int]:
        """Return the seals of a version's imported rows of these tasks, and how many of all. Raises `Unavailable`."""
        table = self.open(version)
        return ({}, 0) if table is None else imported_seals(table, tasks, self.generation)

    def read(
        self,
        version: int | None = None,
        columns: Sequence[str] | None = None,
        *,
        day: date | None = None,
        span_ms: SpanMs | None = None,
    ) -> pa.Table:
        """Return that version's rows (the newest one's by default), of event times in one UTC day or in `span_ms` where
        told, in any order.

        Where its files were vacuumed, its rows are found in the newest version by the positions that it holds. Raises
        `InvariantBroken` where retention has dropped rows of it or a file is damaged, `Unavailable` where it can't be
        read, `ConfigRejected` for a column that it does not have.
        """
        span_ms = span_of(day) if day is not None else span_ms

        def rows_in(found: VersionFiles) -> pa.Table:
            rows = found.read(columns, span_ms)
            if found.up_to is None or span_ms is not None or version is None:
                return rows
            if rows.num_rows != (counted := self._count_of(version)):
                raise InvariantBroken(
                    f"version {version} of the lake held {counted} rows and {rows.num_rows} are left: retention "
                    "dropped the others. Keep lake.retention_ms longer than what is to be replayed."
                )
            return rows

        return self._asked(version, rows_in)

    def layout(self, version: int) -> LakeLayout:
        """Return that version's columns and hours. Raises as `read`."""
        return self._asked(version, lambda found: LakeLayout(tuple(found.columns), found.hours))

    def spans(self, version: int, rows_max: int, *, within_ms: SpanMs | None = None) -> list[StoredSpan]:
        """Return spans of at most `rows_max` rows, as `headrace.backends.lake.spans.cut_hours`. Raises as `read`."""
        hours = self.layout(version).hours
        return self._asked(version, lambda found: cut_hours(hours, rows_max, found.times_in, within_ms))

    def files_of(self, version: int | datetime | None = None) -> VersionFiles:
        """Return the files of the newest version, or of one that was or is read: that stays listed, for no version
        changes. Raises `Unavailable`, also while there is no lake."""
        reading = self._reading
        if isinstance(version, int) and reading is not None and reading.version == version:
            return reading
        found = VersionFiles(self.opened(version))
        if isinstance(version, int):
            self._reading = found
        return found

    def hold(self, version: int, holder: str) -> None:
        """Lease a version, before it is read: vacuum leaves its files in place. Raises `Unavailable`."""
        if self.leases is None:
            return
        state = self.state(version)
        if state is None:
            raise Unavailable(f"there is no lake at {self.uri} to lease version {version} of.")
        self.leases.take(
            holder,
            state.version,
            generation=self.generation,
            rows=self._count_of(version),
            positions=state.positions.to_json(),
            next_offsets={str(p): offset for p, offset in state.next_offsets.items()},
            imported_upto=state.imported_upto,
        )

    @contextmanager
    def leased(self, version: int, holder: str) -> Iterator[None]:
        """Hold a version's lease while the block runs. Raises `Unavailable`."""
        self.hold(version, holder)
        try:
            yield
        finally:
            self.let_go(holder)

    def settle(self) -> bool:
        """Give an existing table the settings of `[lake]`; True when it changed.

        A writer that commits at this moment is refused once and goes on, so this is called at a start.
        """
        table = self.open()
        wanted = properties(self.config)
        if table is None or wanted.items() <= dict(table.metadata().configuration).items():
            return False
        try:
            table.alter.set_table_properties(wanted)
        except (DeltaError, CommitFailedError, OSError) as error:
            raise Unavailable(f"the lake at {self.uri} did not take its settings: {error}") from error
        return True

    def _write(self, table: Any, rows: pa.Table, parted: bool, commit: CommitProperties | None) -> None:
        """Let delta-rs write and commit; it makes the table and adds columns where they are missing."""
        write_deltalake(
            self.uri if table is None else table,
            rows,
            mode="append",
            schema_mode="merge",
            partition_by=[DATE, HOUR] if parted else None,
            configuration=properties(self.config) if table is None else None,
            commit_properties=commit,
        )

    def _append_hours(self, table: Any, rows: pa.Table, commit: CommitProperties) -> Any:
        """Commit rows of very many hours in bounded memory; return the table with them."""
        if table is None or not set(rows.column_names) <= {field.name for field in table.schema().fields}:
            # No row and no position: a writer that dies after it has only made room for the columns.
            self._write(table, rows.slice(0, 0), True, None)
            table = self._newest_for_writing()
        files = list(write_hours(table, rows))
        # What Delta's own writer tells of a commit.
        told = {"rows_added": str(rows.num_rows), "files_added": str(len(files))}
        commit.custom_metadata = {**(commit.custom_metadata or {}), **told}
        table.create_write_transaction(
            files,
            mode="append",
            schema=table.schema(),
            partition_by=[DATE, HOUR],
            commit_properties=commit,
        )
        table.update_incremental()
        return table

    def _refuse_repeats(
        self, table: Any, rows: pa.Table, next_offsets: Mapping[int, int], positions: Mapping[int, Position]
    ) -> None:
        """Raise `Unavailable` when the table is past where this writer begins: its rows would be in it twice."""
        if table is None:
            return
        self._check_topic(table)
        least = least_positions(rows)
        for partition in sorted({*next_offsets, *positions, *least}):
            offset = table.transaction_version(self._offset_id(partition))
            stored = self._position_of(table, partition)
            moved_back = offset is not None and partition in next_offsets and next_offsets[partition] < offset
            moved_back &= positions.get(partition, START) <= stored
            if moved_back or (partition in least and least[partition] <= stored):
                raise Unavailable(
                    f"partition {partition} of the lake is at {tuple(stored)}, offset {offset}; this writer came with "
                    f"rows from {tuple(least.get(partition, START))} and offset {next_offsets.get(partition)}. Another "
                    "one has stored them: ask the lake where to go on."
                )

    def _transactions(self, next_offsets: Mapping[int, int], positions: Mapping[int, Position]) -> list[Transaction]:
        found = [Transaction(self._offset_id(partition), offset) for partition, offset in sorted(next_offsets.items())]
        for partition, position in sorted(positions.items()):
            if position.offset >= 0:
                found.append(Transaction(self._position_id(partition), order_of(position)))
        return [*found, *self._topic_mark()]

    def _state_of(self, table: Any) -> LakeState:
        offsets: dict[int, int] = {}
        positions: dict[int, Position] = {}
        for partition in range(self.partitions):
            offset = table.transaction_version(self._offset_id(partition))
            if offset is not None:
                offsets[partition] = offset
            position = self._position_of(table, partition)
            if position > START:
                positions[partition] = position
        retained_ms = (table.transaction_version(RETAINED_ID) or 0) * HOUR_MS
        upto = imported_upto(table, self.generation)
        return LakeState(table.version(), Positions(self.generation, positions), offsets, retained_ms, upto)

    def _position_of(self, table: Any, partition: int) -> Position:
        order = table.transaction_version(self._position_id(partition))
        if order is not None:
            return position_of(order)
        old = table.transaction_version(self._old_position_id(partition))
        return START if old is None else Position(old >> OLD_RANK_BITS, old & ((1 << OLD_RANK_BITS) - 1))

    def _asked(self, version: int | None, act: Callable[[VersionFiles], Found]) -> Found:
        """Return what `act` finds in the version's files or, where they were vacuumed, in those of the newest version
        among the rows that the version holds. Raises as `read`."""
        found: VersionFiles | None = None
        try:
            try:
                found = self.files_of(version)
                return act(found)
            except (DeltaError, OSError, Unavailable) as error:
                is_lost = found is None and isinstance(error, Unavailable) and self.leases is None
                if version is None or is_lost:
                    raise _unreadable(self.uri, error) from error
                return self._asked_by_positions(version, act, error)
        except pa.ArrowInvalid as error:
            raise InvariantBroken(
                f"the lake at {self.uri} has a damaged file: {error}. After a power cut in the middle of a commit, "
                "delete the newest entry of its _delta_log: the sink stores its rows again."
            ) from error

    def _asked_by_positions(self, version: int, act: Callable[[VersionFiles], Found], cause: Exception) -> Found:
        """Ask the newest version, which stays listed until its files are gone too."""
        kept = self._instead
        if kept is not None and kept[0] == version:
            try:
                return act(kept[1])
            except (DeltaError, OSError):
                self._instead = None
        state, newest = self.state(version), self.open()
        if state is None or newest is None:
            raise _unreadable(self.uri, cause) from cause
        found = VersionFiles(newest, state.positions, state.imported_upto)
        if not set(PLACE) <= set(found.columns):
            raise _unreadable(self.uri, cause) from cause
        try:
            done = act(found)
        except (DeltaError, OSError) as error:
            raise _unreadable(self.uri, error) from error
        self._instead = version, found
        return done

    def _count_of(self, version: int) -> int:
        try:
            return count_rows(self.open(version))
        except Unavailable:
            lease = self.leases.of_version(version, self.generation) if self.leases is not None else None
            if lease is None:
                raise
            return lease.rows

    def _offset_id(self, partition: int) -> str:
        return f"samples-g{self.generation}-p{partition}"

    def _position_id(self, partition: int) -> str:
        return f"order-g{self.generation}-p{partition}"

    def _old_position_id(self, partition: int) -> str:
        return f"position-g{self.generation}-p{partition}"


def _unreadable(uri: str, error: Exception) -> Unavailable:
    return error if isinstance(error, Unavailable) else Unavailable(f"the lake at {uri} can't be read: {error}")
