"""What keeps the lake small and quick: compaction, retention, vacuum; beside writers and readers, never in their way.

- **Compaction** writes the small files of one hour anew as one, in a commit of its own. Rows and positions stay as they
  are; a reader of an older version keeps its files.
- **Retention** drops whole hours of event time from the newest version, by their partition, without reading a row.
- **Vacuum** deletes files that neither the newest version nor a leased or pinned one needs: those that compaction and
  retention replaced, and those that a killed writer or compaction left before it committed. A file younger than
  `lake.vacuum_ms` always stays, since a writer may be about to commit it and a reader to open it.

Each commit of these moves no partition's position, so a sink that commits at the same moment steps over it; two of
them at once may refuse each other, and the one that lost leaves only files that vacuum finds. Killed anywhere, nothing
is half done: run it again.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
from deltalake import CommitProperties, WriterProperties
from deltalake.exceptions import CommitFailedError, DeltaError

from headrace.backends.lake_delta import DATE, HOUR, HOUR_MS, STEPS_MAX, DeltaLake, files, hour_ms, partition_columns
from headrace.contract.errors import Unavailable

# The local store of delta-rs writes NAME#1 and renames it; a killed writer leaves that, and Delta's vacuum skips it.
_STAGED = re.compile(r"#\d+$")
_COMMIT = CommitProperties(max_commit_retries=STEPS_MAX)


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
    kept_versions: list[int] = []
    """Versions that leases or checkpoints keep."""
    refused: int = 0
    """Commits that another upkeep was before; the next call does their work."""


class Upkeep:
    """Keeps one lake. Safe beside sinks, readers and other upkeeps."""

    def __init__(self, lake: DeltaLake) -> None:
        self.lake, self.config = lake, lake.config

    def compact(self, done: Done, *, files_min: int | None = None) -> None:
        """Write hours that have at least `files_min` small files (`lake.compact_files`) anew. Raises `Unavailable`."""
        table = self._open()
        least = self.config.compact_files if files_min is None else files_min
        for place, sizes in sorted(_sizes(table).items(), key=lambda item: repr(item[0])):
            small = [size for size in sizes if size < self.config.target_file_bytes // 2]
            if len(small) < max(2, least):
                continue
            filters = [(DATE, "=", place[0].isoformat()), (HOUR, "=", str(place[1]))] if place is not None else None
            try:
                figures = table.optimize.compact(
                    partition_filters=filters,
                    target_size=self.config.target_file_bytes,
                    # One thread: the sink's commits and the rest of the machine come first.
                    max_concurrent_tasks=1,
                    writer_properties=WriterProperties(compression="ZSTD"),
                    commit_properties=_COMMIT,
                )
            except CommitFailedError:
                done.refused += 1
                table = self._open()
                continue
            except (DeltaError, OSError) as error:
                raise self._away("compacted", error) from error
            done.hours_compacted += 1 if figures["numFilesRemoved"] else 0
            done.files_compacted += int(figures["numFilesRemoved"])

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
        gone = [place for place in _sizes(table) if place is not None and hour_ms(*place) // HOUR_MS < cutoff]
        if not gone:
            return
        day, hour = _utc_day(cutoff // 24), cutoff % 24
        try:
            figures = table.delete(
                f"{DATE} < DATE '{day}' OR ({DATE} = DATE '{day}' AND {HOUR} < {hour})", commit_properties=_COMMIT
            )
        except CommitFailedError:
            done.refused += 1
            return
        except (DeltaError, OSError) as error:
            raise self._away("rid of old hours", error) from error
        done.hours_dropped += len(gone)
        done.rows_dropped += int(figures["num_deleted_rows"] or 0)

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

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the versions that the log knows, newest first: version, timestamp (Unix ms), operation, metrics."""
        try:
            return list(self._open().history(limit))
        except (DeltaError, OSError) as error:
            raise self._away("asked for its history", error) from error

    def _open(self) -> Any:
        table = self.lake.open()
        if table is None:
            raise Unavailable(f"there is no lake at {self.lake.uri} yet; the sink makes it with its first commit.")
        return table

    def _is_known(self, version: int) -> bool:
        """Say whether the log still has the version; of one that it has not, no file can be told to be kept."""
        try:
            return self.lake.open(version) is not None
        except Unavailable:
            return False

    def _staged(self, dry_run: bool) -> list[str]:
        """Delete what killed writers left half written on a POSIX path; Delta's own vacuum finds it on HDFS."""
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
        return Unavailable(f"the lake at {self.lake.uri} could not be {what}: {error}")


def _sizes(table: Any) -> dict[tuple[date, int] | None, list[int]]:
    """Return the sizes of the newest version's files by date and hour; all under None where there are no hours."""
    found = files(table)
    sizes = found["size_bytes"].to_pylist()
    groups: dict[tuple[date, int] | None, list[int]] = defaultdict(list)
    if f"partition.{DATE}" not in found.column_names:
        groups[None] = sizes
        return groups
    for day, hour, size in zip(
        found[f"partition.{DATE}"].to_pylist(), found[f"partition.{HOUR}"].to_pylist(), sizes, strict=True
    ):
        groups[day, hour].append(size)
    return groups


def _utc_day(day: int) -> str:
    return date.fromordinal(date(1970, 1, 1).toordinal() + day).isoformat()
