"""Keeps the archive small: compaction, retention and vacuum, as `headrace.backends.lake.upkeep` does for samples.

- **Compaction** writes the files of an hour anew as one, once the hour is over by `OVER_MS`: so each byte is written
  twice, and not again with every look. Rows go through memory a group at a time.
- **Retention** drops whole hours of the broker's time. The same commit says from which offset on each partition is
  whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from deltalake import Transaction
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from headrace.backends.archive.delta import DeltaArchive
from headrace.backends.archive.files import ArchiveFile, Place, listed, rows_of, store_at, write_file
from headrace.backends.lake.hour_files import HOUR_MS
from headrace.backends.lake.upkeep import Done, Upkeep, removed

OVER_MS = 600_000
"""Ten minutes after its end an hour gets no more records, unless the archive is behind: these are compacted later."""


class ArchiveUpkeep(Upkeep):
    """Keeps one archive. Safe beside its writer, readers and other upkeeps."""

    def __init__(self, archive: DeltaArchive, now_ms: int) -> None:
        super().__init__(archive)
        self._now_ms = now_ms

    def compact(self, done: Done, *, files_min: int | None = None) -> None:
        """Write hours that are over and have at least `files_min` small files anew. Raises `Unavailable`."""
        least = max(2, self.config.compact_files if files_min is None else files_min)
        table = self._open()
        for place, there in sorted(_by_place(table).items()):
            rewritten = len(there) if (place.hour + 1) * HOUR_MS + OVER_MS > self._now_ms else 0
            # Files that the archive adds meanwhile are the next upkeep's.
            while rewritten < len(there) and len(chosen := self._small(table, place)) >= least:
                actions: list[AddAction | RemoveAction] = [self._joined(table, place, chosen)]
                actions += [removed(file.path, False) for file in chosen]
                if not self._commit(table, actions, "compact"):
                    done.refused += 1
                    break
                done.hours_compacted += 1
                done.files_compacted += len(chosen)
                rewritten += len(chosen)
                table = self._open()
            table = self._open() if done.refused else table

    def retain(self, done: Done, now_ms: int) -> None:
        """Drop hours that ended more than `archive.retention_ms` ago. Raises `Unavailable`."""
        if not self.config.retention_ms:
            return
        table = self._open()
        cutoff = (now_ms - self.config.retention_ms) // HOUR_MS
        gone = [file for file in listed(table) if file.place.hour < cutoff]
        if not gone:
            return
        marks = []
        for (generation, partition), end in _ends(gone).items():
            name = f"begin-g{generation}-p{partition}"
            marks.append(Transaction(name, max(end, table.transaction_version(name) or 0)))
        if not self._commit(table, [removed(file.path, True) for file in gone], "retain", marks):
            done.refused += 1
            return
        done.hours_dropped += len({file.place for file in gone})
        done.rows_dropped += sum(file.rows for file in gone)

    def _small(self, table: Any, place: Place) -> list[ArchiveFile]:
        """Return small files of a place, by offset, that fit into one of the size aimed at."""
        target, taken = self.config.target_file_bytes, 0
        chosen: list[ArchiveFile] = []
        for file in _by_place(table).get(place, []):
            if file.size < target // 2 and (not chosen or taken + file.size <= target):
                chosen.append(file)
                taken += file.size
        return chosen

    def _joined(self, table: Any, place: Place, chosen: Sequence[ArchiveFile]) -> AddAction:
        store = store_at(table)
        try:
            return write_file(store, place, rows_of(store, chosen), data_change=False)
        except (DeltaError, OSError) as error:
            raise self._away("compacted", error) from error


def _by_place(table: Any) -> dict[Place, list[ArchiveFile]]:
    groups: defaultdict[Place, list[ArchiveFile]] = defaultdict(list)
    for file in listed(table):
        groups[file.place].append(file)
    return groups


def _ends(found: Sequence[ArchiveFile]) -> dict[tuple[int, int], int]:
    """Return behind which offset nothing is dropped, by generation and partition."""
    ends: dict[tuple[int, int], int] = {}
    for file in found:
        who = file.place.generation, file.place.partition
        ends[who] = max(ends.get(who, 0), file.last + 1)
    return ends
