"""Keeps the lake small and quick, beside writers and readers: compaction, retention and vacuum.

- **Compaction** writes the small files of one hour anew as one, in total order, in a commit of its own. Rows and
  positions stay as they are; a reader of an older version keeps its files.
- **Retention** drops whole hours of event time from the newest version, by their partition, without reading a row, and
  says up to where in the same commit (`RETAINED_ID`), so that an account can tell dropped rows from lost ones.
- **Vacuum** deletes files that neither the newest version nor a leased or pinned one needs: those that compaction and
  retention replaced, and those that a killed writer or compaction left before it committed. A file younger than
  `lake.vacuum_ms` always stays, since a writer may be about to commit it and a reader to open it.

None of these commits moves a partition's position, so a sink that commits at the same moment steps over it. Each
carries an application transaction of its own (`UPKEEP_ID`): of two upkeeps at once Delta refuses the second, and vacuum
finds what that one wrote. delta-rs's own `optimize` (1.6.6) is not used for this reason: it carries no such
transaction, and two of them at once replace the same files, whose rows are then in the table twice. An upkeep that is
killed leaves nothing half done: run it again.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import pyarrow as pa
from deltalake import CommitProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow import parquet

from headrace.backends.delta.leases import Leases
from headrace.backends.delta.table import STEPS_MAX
from headrace.backends.lake.delta import RETAINED_ID
from headrace.backends.lake.hour_files import DATE, HOUR, HOUR_MS, ORDER, EventHour, hour_ms, store_of, write_file
from headrace.backends.lake.listing import files, partition_columns
from headrace.contract.config import LakeConfig
from headrace.contract.errors import Unavailable, disk_remedy

# The local store of delta-rs writes NAME#1 and renames it; a killed writer leaves that, and Delta's vacuum skips it.
_STAGED = re.compile(r"#\d+$")
_COMMIT = CommitProperties(max_commit_retries=STEPS_MAX)
UPKEEP_ID = "upkeep"


class _File(NamedTuple):
    path: str
    size: int
    rows: int
    written_ms: int
    hour: EventHour


class Done(msgspec.Struct, kw_only=True):
    """What one upkeep did; counts of this call but for `files` and `bytes`, which the newest version has."""

    version: int = -1
    files: int = 0
    bytes: int = 0
    hours_compacted: int = 0
    files_compacted: int = 0
    """Files that compaction replaced."""
    hours_dropped: int = 0
    rows_dropped: int = 0
    files_vacuumed: int = 0
    """On HDFS those too that an earlier vacuum deleted and Delta's log still remembers."""
    kept_versions: list[int] = []
    """Versions that leases or checkpoints keep."""
    refused: int = 0
    """Commits that were refused, since another upkeep was first; the next call does their work."""
    archive: Done | None = None
    """The same of the archive of events, where there is one."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One commit, as Delta's log remembers it."""

    version: int
    time_ms: int
    operation: str
    """`compact` or `retain`, else Delta's own word, such as WRITE."""
    rows_added: int
    files_added: int
    files_removed: int


class KeptTable(Protocol):
    """What an upkeep needs of the table that it keeps."""

    uri: str
    config: LakeConfig
    leases: Leases | None

    def open(self, version: int | None = None) -> Any:
        """Return the Delta table, None while there is none. Raises `Unavailable`."""

    def opened(self, version: int | None = None) -> Any:
        """Return the Delta table. Raises `Unavailable`, also while there is none."""

    def put_on_disk(self, before: int, version: int) -> None:
        """Return when the versions behind `before` up to this one are on the disk. Raises `OSError`."""


class Upkeep:
    """Keeps one lake. Safe beside sinks, readers and other upkeeps."""

    def __init__(self, lake: KeptTable) -> None:
        self.lake, self.config = lake, lake.config

    def compact(self, done: Done, *, files_min: int | None = None) -> None:
        """Write hours that have at least `files_min` small files (`lake.compact_files`) anew. Raises `Unavailable`."""
        least = max(2, self.config.compact_files if files_min is None else files_min)
        table = self._open()
        for hour, sizes in sorted(_sizes(table).items(), key=lambda item: repr(item[0])):
            rewritten = 0
            # Files that a sink adds meanwhile are the next upkeep's.
            while rewritten < len(sizes) and len(chosen := self._small_files(table, hour)) >= least:
                actions: list[AddAction | RemoveAction] = [self._merged(table, hour, chosen)]
                actions += [removed(path, False) for path in chosen]
                if not self._commit(table, actions, "compact"):
                    done.refused += 1
                    break
                rewritten += len(chosen)
                table = self._open()
            table = self._open() if done.refused else table
            done.hours_compacted += 1 if rewritten else 0
            done.files_compacted += rewritten

    def retain(self, done: Done, now_ms: int) -> None:
        """Drop hours of event time that ended more than `lake.retention_ms` ago. Raises `Unavailable`.

        Versions that are leased or pinned keep their files until they are given back.
        """
        if not self.config.retention_ms:
            return
        table = self._open()
        if not partition_columns(table):
            return
        cutoff = (now_ms - self.config.retention_ms) // HOUR_MS
        gone = {hour for hour in _sizes(table) if hour is not None and hour_ms(*hour) // HOUR_MS < cutoff}
        if not gone:
            return
        found = [row for row in _rows(table) if row.hour in gone]
        # A late row of an hour that went long ago must not take the mark back.
        mark = max(table.transaction_version(RETAINED_ID) or 0, *(hour_ms(*hour) // HOUR_MS + 1 for hour in gone))
        marks = [Transaction(RETAINED_ID, mark)]
        if not self._commit(table, [removed(row.path, True) for row in found], "retain", marks):
            done.refused += 1
            return
        done.hours_dropped += len(gone)
        done.rows_dropped += sum(row.rows for row in found)

    def vacuum(self, done: Done, pinned: Iterable[int], *, dry_run: bool = False) -> list[str]:
        """Delete what no version needs that must stay; return the paths, within the table. Raises `Unavailable`.

        Args:
            done: counts go there.
            pinned: versions that checkpoints name; those that are leased are known.
            dry_run: only say which.
        """
        table = self._open()
        leased = [x.version for x in self.lake.leases.active()] if self.lake.leases is not None else []
        done.kept_versions = sorted(v for v in {*leased, *pinned} if self._is_known(v))
        try:
            listed = table.vacuum(
                dry_run=dry_run, full=True, keep_versions=done.kept_versions or None, commit_properties=_COMMIT
            )
            # What is there comes by its path within the table; whole addresses are those deleted before.
            found = [path for path in listed if not path.startswith("/") and "://" not in path]
        except CommitFailedError:
            # The files are gone; only the note of it in the log was refused.
            done.refused += 1
            found = []
        except (DeltaError, OSError) as error:
            raise self._away("vacuumed", error) from error
        found += self._staged(dry_run)
        done.files_vacuumed += 0 if dry_run else len(found)
        return found

    def look(self, done: Done) -> None:
        """Count the newest version's files and bytes."""
        table = self._open()
        sizes = [size for group in _sizes(table).values() for size in group]
        done.version, done.files, done.bytes = table.version(), len(sizes), sum(sizes)

    def history(self, limit: int | None = None) -> list[Version]:
        """Return the versions that the log knows, newest first. Raises `Unavailable`."""
        try:
            while True:
                # delta-rs reads what the log has by then, and counts back from the version that it opened.
                table = self._open()
                entries = table.history(limit)
                if self._open().version() == table.version():
                    return [_version(entry) for entry in entries]
        except (DeltaError, OSError) as error:
            raise self._away("asked for its history", error) from error

    def _open(self) -> Any:
        return self.lake.opened()

    def _small_files(self, table: Any, hour: EventHour) -> list[str]:
        """Return small files of an hour, the oldest first, that fit into one of the size aimed at."""
        target, taken = self.config.target_file_bytes, 0
        chosen: list[str] = []
        for row in sorted((r for r in _rows(table) if r.hour == hour), key=lambda r: (r.written_ms, r.path)):
            if row.size < target // 2 and (not chosen or taken + row.size <= target):
                chosen.append(row.path)
                taken += row.size
        return chosen

    def _merged(self, table: Any, hour: EventHour, paths: list[str]) -> AddAction:
        """Write the rows of these files as one file, in total order; nobody sees it before its commit."""
        store = store_of(table)
        try:
            parts = [parquet.read_table(store.open_input_file(path)) for path in paths]
            rows = pa.concat_tables(parts, promote_options="default")
            if order := [(name, "ascending") for name in ORDER if name in rows.column_names]:
                rows = rows.sort_by(order)
            return write_file(store, hour, rows, data_change=False)
        except (DeltaError, OSError) as error:
            raise self._away("compacted", error) from error

    def _commit(
        self, table: Any, actions: list[AddAction | RemoveAction], what: str, marks: Sequence[Transaction] = ()
    ) -> bool:
        """Commit, `marks` too; False where another upkeep was first. Raises `Unavailable`."""
        mark = Transaction(UPKEEP_ID, int(table.version()) + 1)
        added = sum(isinstance(action, AddAction) for action in actions)
        told = {"upkeep": what, "files_added": added, "files_removed": len(actions) - added}
        try:
            table.create_write_transaction(
                actions,
                mode="append",
                schema=table.schema(),
                partition_by=partition_columns(table),
                commit_properties=CommitProperties(told, STEPS_MAX, [mark, *marks]),
            )
            before = int(mark.version) - 1
            table.update_incremental()
            # Before vacuum deletes what it replaces.
            self.lake.put_on_disk(before, int(table.version()))
        except CommitFailedError:
            return False
        except (DeltaError, OSError) as error:
            raise self._away(f"changed ({what})", error) from error
        return True

    def _is_known(self, version: int) -> bool:
        """Say whether the log still has the version; of one that it has not, no file can be told to be kept."""
        try:
            return self.lake.open(version) is not None
        except Unavailable:
            return False

    def _staged(self, dry_run: bool) -> list[str]:
        """Delete what killed writers left half written on a POSIX path. On HDFS Delta's own vacuum finds it."""
        if "://" in self.lake.uri:
            return []
        root, found = Path(self.lake.uri), []
        oldest_s = time.time() - max(1, self.config.vacuum_ms // 1000)
        for path in root.rglob("*#*"):
            if _STAGED.search(path.name) and path.is_file() and path.stat().st_mtime < oldest_s:
                found.append(str(path.relative_to(root)))
                if not dry_run:
                    path.unlink(missing_ok=True)
        return found

    def _away(self, what: str, error: Exception) -> Unavailable:
        return Unavailable(f"the lake at {self.lake.uri} could not be {what}: {error}; {disk_remedy(error)}.")


def _version(entry: Mapping[str, Any]) -> Version:
    figures = entry.get("operationMetrics") or {}
    return Version(
        version=entry["version"],
        time_ms=entry["timestamp"],
        operation=entry.get("upkeep") or entry.get("operation", ""),
        rows_added=int(entry.get("rows_added") or figures.get("num_added_rows") or 0),
        files_added=int(entry.get("files_added") or figures.get("num_added_files") or 0),
        files_removed=int(entry.get("files_removed") or figures.get("num_removed_files") or 0),
    )


def _rows(table: Any) -> list[_File]:
    """Return the newest version's files."""
    found = files(table)
    names = ["path", "size_bytes", "num_records", "modification_time"]
    parted = f"partition.{DATE}" in found.column_names
    hours: list[EventHour] = [None] * found.num_rows
    if parted:
        hours = list(zip(found[f"partition.{DATE}"].to_pylist(), found[f"partition.{HOUR}"].to_pylist(), strict=True))
    columns = [found[name].to_pylist() for name in names]
    return [_File(*row) for row in zip(*columns, hours, strict=True)]


def _sizes(table: Any) -> dict[EventHour, list[int]]:
    """Return the sizes of the newest version's files by date and hour; all under None where there are no hours."""
    groups: dict[EventHour, list[int]] = defaultdict(list)
    for row in _rows(table):
        groups[row.hour].append(row.size)
    return groups


def removed(path: str, data_change: bool) -> RemoveAction:
    """Return what takes a file out of the newest version; `data_change` says that its rows go with it."""
    return RemoveAction(path, data_change, time.time_ns() // 1_000_000)
