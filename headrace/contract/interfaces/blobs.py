"""What the pipeline needs of a blob store: whole objects, replaced atomically. Files and WebHDFS implement it."""

from __future__ import annotations

from typing import Protocol


class Blobs(Protocol):
    """Named byte strings under one root. Names are relative, `/`-separated."""

    def put(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, atomically: a reader sees the old object, the new one, or none.

        Raises `Unavailable` when the store stays away after bounded retries.
        """

    def get(self, name: str) -> bytes | None:
        """Return the object, or None where there is none."""

    def list(self, prefix: str) -> list[str]:
        """Return the names directly in folder `prefix`, sorted; unfinished writes never appear."""

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens where there is none."""
