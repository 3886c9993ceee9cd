"""Blobs as files under a folder (local disk, CephFS mount): written aside, synced, renamed into place."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from headrace.contract.errors import Unavailable

_UNFINISHED = ".unfinished-"


class FileBlobs:
    """Blobs below `root`, which is created when missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"the store {root} cannot be written: {error}.") from error

    def put(self, name: str, data: bytes) -> None:
        """Store atomically; see `contract.blobs.Blobs`."""
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            raise Unavailable(f"{path} could not be written: {error}.") from error

    def get(self, name: str) -> bytes | None:
        """Return the object, or None."""
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"{self._root / name} could not be read: {error}.") from error

    def list(self, prefix: str) -> list[str]:
        """Return the names directly in folder `prefix`, sorted."""
        folder = self._root / prefix
        if not folder.is_dir():
            return []
        return sorted(
            f"{prefix.rstrip('/')}/{entry.name}"
            for entry in folder.iterdir()
            if entry.is_file() and not entry.name.startswith(_UNFINISHED)
        )

    def delete(self, name: str) -> None:
        """Remove the object, if it is there."""
        (self._root / name).unlink(missing_ok=True)
