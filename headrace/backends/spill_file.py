"""Batches in files until they are asked for, in place of memory. After a crash they are made anew from the log.

Each batch is an Arrow file that is mapped into memory. What is read of it comes from the disk or the disk's cache.
While it is not read, it costs the process nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa

from headrace.contract.errors import Unavailable, disk_remedy


class FileSpill:
    """Batches below `folder`, which is emptied first: the next process has no use for what this one spilled."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder = folder

    def put(self, name: str, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Store a batch and return it mapped. Raises `Unavailable` when the disk refuses."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except OSError as error:
            raise Unavailable(
                f"{batch.nbytes} bytes were not spilled to {path}: {error}; {disk_remedy(error)}."
            ) from error

    def drop(self, name: str) -> None:
        """Remove a batch; one that is still mapped stays readable until it is let go."""
        (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
