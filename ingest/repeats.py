"""What was taken before, in bounded memory: digests of event ids and chunks, forgotten after a horizon.

Two generations: the young one takes what is new; when it is half a horizon old, or full, it becomes the old one and
the former old one is forgotten. So an entry is remembered for at least half the horizon and at most the whole of it,
or for the last `entries_max` / 2 entries at least.
"""

from __future__ import annotations

import xxhash


def digest(*parts: str | bytes) -> bytes:
    """Return 16 bytes that stand for `parts`; lengths are part of it, so ("a", "bc") is not ("ab", "c")."""
    state = xxhash.xxh3_128()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        state.update(len(data).to_bytes(4, "little"))
        state.update(data)
    return state.digest()


class Repeats:
    """A set that forgets."""

    def __init__(self, horizon_ms: int, entries_max: int) -> None:
        self._half_ms = max(1, horizon_ms // 2)
        self._half_max = max(1, entries_max // 2)
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._since_ms: int | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._young or key in self._old

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def add(self, key: bytes, now_ms: int) -> None:
        """Remember `key` from now on."""
        if self._since_ms is None:
            self._since_ms = now_ms
        if now_ms - self._since_ms >= self._half_ms or len(self._young) >= self._half_max:
            self._old, self._young, self._since_ms = self._young, set(), now_ms
        self._young.add(key)


class Occurrences:
    """How often a chunk id came on one connection: the n-th time there is genuine, not a retry. Bounded alike."""

    def __init__(self, entries_max: int = 20_000) -> None:
        self._half_max = max(1, entries_max // 2)
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

    def next(self, key: bytes) -> int:
        """Return how many times `key` came before, and count this one."""
        before = self._young.get(key, self._old.get(key, 0))
        if len(self._young) >= self._half_max:
            self._old, self._young = self._young, {}
        self._young[key] = before + 1
        return before
