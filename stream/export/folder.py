"""A folder of Parquet files that is there whole, or not at all.

1. Everything is written in a hidden folder beside the wanted one, which a lock keeps for one writer.
2. The manifest is written last, and all is on the disk.
3. The hidden folder is renamed to the wanted one: an empty one, or, where it may be overwritten, an older export, which
   is set aside before and deleted after.

A writer that is killed leaves hidden folders, which the next one deletes, or puts back where it had set one aside.
Row groups and files are cut by rows alone, however the rows came: equal rows are equal bytes. One row group is written
in a thread while the rows of the next are read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import parquet

from headrace.backends.lake.fsync import sync
from headrace.contract.errors import ConfigRejected, Overloaded, Unavailable

MANIFEST = "_manifest.json"
"""Readers of Parquet folders leave out names that begin with `_`."""
ROW_GROUP_ROWS = 131_072
FILE_ROWS = 8 * ROW_GROUP_ROWS


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an export."""

    name: str
    rows: int
    bytes: int
    sha256: str


class ParquetFolder:
    """Writes one folder; made by `parquet_folder`."""

    def __init__(self, folder: Path, schema: pa.Schema, *, row_group_rows: int, file_rows: int) -> None:
        self.files: list[FileEntry] = []
        """Files that are whole."""
        self._folder, self._schema = folder, schema
        self._group_rows, self._file_rows = row_group_rows, file_rows
        self._held: list[pa.Table] = []
        self._held_rows = self._rows = 0
        self._writer: Any = None
        self._thread = ThreadPoolExecutor(1, "export-write")
        self._under_way: Future[None] | None = None

    def write(self, rows: pa.Table) -> None:
        """Add rows; they are on their way to the disk when a row group is full. Raises what the one before it met."""
        self._held.append(rows)
        self._held_rows += rows.num_rows
        if self._held_rows < self._group_rows:
            return
        held = pa.concat_tables(self._held)
        whole = held.num_rows // self._group_rows * self._group_rows
        for begin in range(0, whole, self._group_rows):
            self._write_group(held.slice(begin, self._group_rows))
        self._held, self._held_rows = [held.slice(whole)], held.num_rows - whole

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write what is left, and the manifest with the files' names, rows, sizes and digests."""
        if self._held_rows:
            self._write_group(pa.concat_tables(self._held))
        self._wait()
        self._close()
        body = {**manifest, "rows": sum(file.rows for file in self.files), "files": self.files}
        text = msgspec.json.format(msgspec.json.encode(body), indent=2)
        _store(self._folder / MANIFEST, text + b"\n")

    def stop(self) -> None:
        """Return when nothing is written any more."""
        self._thread.shutdown()

    def _path(self) -> Path:
        return self._folder / f"part-{len(self.files):05d}.parquet"

    def _write_group(self, rows: pa.Table) -> None:
        self._wait()
        self._under_way = self._thread.submit(self._write_now, rows)

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write_now(self, rows: pa.Table) -> None:
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path(), self._schema, compression="zstd")
        # In one chunk, since how rows came must not show in the bytes.
        self._writer.write_table(rows.combine_chunks(), row_group_size=self._group_rows)
        self._rows += rows.num_rows
        if self._rows >= self._file_rows:
            self._close()

    def _close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        path = self._path()
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.files.append(FileEntry(name=path.name, rows=self._rows, bytes=path.stat().st_size, sha256=digest))
        self._writer, self._rows = None, 0


@contextmanager
def parquet_folder(
    target: Path,
    schema: pa.Schema,
    *,
    overwrite: bool = False,
    row_group_rows: int = ROW_GROUP_ROWS,
    file_rows: int = FILE_ROWS,
) -> Iterator[ParquetFolder]:
    """Yield the writer of a folder, which is at `target` when the block has ended without an exception.

    Raises:
        ConfigRejected: something is at `target` that may not be replaced, or the place cannot be written.
        Overloaded: another export to `target` is under way.
        Unavailable: the disk is full or fails. Nothing of this export is left then.
    """
    target = target.resolve()
    making, aside = (target.parent / f".{target.name}.{end}" for end in ("exporting", "replaced"))
    refuse_occupied(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        making.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigRejected(f"{target} can't be written: {error.strerror}. Name another folder.") from error
    lock = os.open(making, os.O_RDONLY)
    try:
        _take(lock, target)
        _clear(making)
        if aside.exists():
            shutil.rmtree(aside)
        writer = ParquetFolder(making, schema, row_group_rows=row_group_rows, file_rows=file_rows)
        try:
            try:
                yield writer
            finally:
                writer.stop()
            _put_in_place(making, target, aside)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else str(error)
            raise Unavailable(f"{target} was not written: {what}. Nothing of it is left; make room there.") from error
        finally:
            if _is_locked_folder(lock, making):
                shutil.rmtree(making, ignore_errors=True)
    finally:
        os.close(lock)


def refuse_occupied(target: Path, *, overwrite: bool) -> None:
    """Raise `ConfigRejected` unless nothing, an empty folder or, to overwrite, an older export is at `target`. What a
    killed writer had set aside is put back."""
    aside = target.parent / f".{target.name}.replaced"
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigRejected(f"{target} is a file; name a folder that is not there yet.")
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return
    own = MANIFEST in names and all(n == MANIFEST or (n.startswith("part-") and n.endswith(".parquet")) for n in names)
    if not own:
        raise ConfigRejected(f"{target} is not empty and is no export ({names[0]} is in it): name another folder.")
    if not overwrite:
        raise ConfigRejected(f"{target} holds an export already: name another folder, or add --overwrite.")


def _take(lock: int, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Overloaded(f"another export to {target} is under way: wait until it is done.") from None


def _is_locked_folder(lock: int, making: Path) -> bool:
    """Say whether the folder of that name is still the one that the lock is on, not renamed or another's."""
    try:
        return os.path.samestat(os.fstat(lock), making.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _store(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(making: Path, target: Path, aside: Path) -> None:
    sync(making)
    if target.exists() and any(target.iterdir()):
        target.rename(aside)
    making.rename(target)
    sync(target.parent)
    if aside.exists():
        shutil.rmtree(aside)
