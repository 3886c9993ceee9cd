"""A folder of Parquet files that is there whole, or not at all: see `headrace.stream.export.whole_folder`.

The manifest is written last. Row groups and files are cut by rows alone, however the rows came: equal rows are equal
bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from pyarrow import parquet

from headrace.contract.errors import ConfigRejected
from headrace.stream.export.whole_folder import names_in, store, whole_folder

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

    def write(self, rows: pa.Table) -> None:
        """Add rows; they are on their way to the disk when a row group is full."""
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
        self._close()
        body = {**manifest, "rows": sum(file.rows for file in self.files), "files": self.files}
        text = msgspec.json.format(msgspec.json.encode(body), indent=2)
        store(self._folder / MANIFEST, text + b"\n")

    def _path(self) -> Path:
        return self._folder / f"part-{len(self.files):05d}.parquet"

    def _write_group(self, rows: pa.Table) -> None:
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

    Raises `ConfigRejected` where something is at `target` that may not be replaced; else as `whole_folder`.
    """
    target = target.resolve()
    refuse_occupied(target, overwrite=overwrite)
    with whole_folder(target) as making:
        yield ParquetFolder(making, schema, row_group_rows=row_group_rows, file_rows=file_rows)


def refuse_occupied(target: Path, *, overwrite: bool) -> None:
    """Raise `ConfigRejected` unless nothing, an empty folder or, to overwrite, an older export is at `target`. What a
    killed writer had set aside is put back."""
    names = names_in(target)
    if not names:
        return
    own = MANIFEST in names and all(n == MANIFEST or (n.startswith("part-") and n.endswith(".parquet")) for n in names)
    if not own:
        raise ConfigRejected(f"{target} is not empty and is no export ({names[0]} is in it): name another folder.")
    if not overwrite:
        raise ConfigRejected(f"{target} holds an export already: name another folder, or add --overwrite.")
