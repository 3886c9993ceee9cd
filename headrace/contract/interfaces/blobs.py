"""What the pipeline needs of a blob store: whole objects, replaced atomically. Files and WebHDFS implement it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

Pieces = Iterable[bytes | memoryview]
"""An object in pieces, of bytes, in order: a list, or whatever gives the same pieces each time it is gone through. A
store goes through it anew for each try, so a generator will not do."""


def whole(data: bytes | Pieces) -> bytes:
    """Return an object's bytes in one.

    >>> whole([b"one", memoryview(b" two")])
    b'one two'
    """
    return data if isinstance(data, bytes) else b"".join(data)


class Blobs(Protocol):
    """Named byte strings under one root. Names are relative, `/`-separated. May be called from several threads."""

    def put(self, name: str, data: bytes | Pieces) -> None:
        """Store `data` under `name`, atomically: a reader sees the old object, the new one, or none.

        Pieces are stored one after the other, never copied into one. Raises `Unavailable` when the store stays away
        after bounded retries.
        """

    def get(self, name: str) -> bytes | None:
        """Return the object, or None where there is none."""

    def list(self, prefix: str) -> list[str]:
        """Return the names directly in folder `prefix`, sorted; unfinished writes never appear."""

    def delete(self, name: str) -> None:
        """Remove the object; nothing happens where there is none."""
