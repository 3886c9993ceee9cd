"""What is remembered for a while: a bounded map from a 128-bit key to a small number, forgotten by watermark time.

Keys lie in slices of time. The newest slice is a dict; a closed one is three sorted columns (16 bytes and a number a
key), immutable, so that a snapshot need not write it again.

Legend: K keys of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

SLICES = 16
"""A horizon is cut into so many; forgetting is that coarse."""


def key_of(*parts: str) -> bytes:
    """Return a 16-byte XXH3 key of several texts. Two of 2**32 keys collide with a chance of 3e-20."""
    return xxhash.xxh3_128_digest("\x00".join(parts).encode())


class _Slice:
    """A closed slice: keys sorted by their high half."""

    def __init__(self, start_ms: int, raw: bytes, values: bytes) -> None:
        self.start_ms, self.raw, self.values = start_ms, raw, values
        words = np.frombuffer(raw, dtype="<u8").reshape(-1, 2)
        self._high_K: npt.NDArray[np.uint64] = np.ascontiguousarray(words[:, 1])
        self._low_K: npt.NDArray[np.uint64] = np.ascontiguousarray(words[:, 0])
        self._values_K = np.frombuffer(values, dtype="<u1")

    @classmethod
    def close(cls, start_ms: int, items: dict[bytes, int]) -> _Slice:
        words = np.frombuffer(b"".join(items), dtype="<u8").reshape(-1, 2)
        order_K = np.lexsort((words[:, 0], words[:, 1]))
        values_K = np.fromiter(items.values(), dtype=np.uint8, count=len(items))
        return cls(start_ms, np.ascontiguousarray(words[order_K]).tobytes(), values_K[order_K].tobytes())

    def get(self, low: int, high: int) -> int | None:
        at = int(np.searchsorted(self._high_K, np.uint64(high)))
        while at < len(self._high_K) and int(self._high_K[at]) == high:
            if int(self._low_K[at]) == low:
                return int(self._values_K[at])
            at += 1
        return None


class Memory:
    """Remembers each key for at least `horizon_ms` of watermark time and at most 1/16 longer; values are 0..255."""

    def __init__(self, horizon_ms: int) -> None:
        self.slice_ms = max(1, horizon_ms // SLICES)
        self.start_ms = 0
        self.open: dict[bytes, int] = {}
        self.closed: list[_Slice] = []

    def __len__(self) -> int:
        return len(self.open) + sum(len(s.values) for s in self.closed)

    def get(self, key: bytes) -> int | None:
        """Return the newest value put under `key`, or None when it is unknown or forgotten."""
        value = self.open.get(key)
        if value is not None or not self.closed:
            return value
        low, high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
        for part in reversed(self.closed):
            value = part.get(low, high)
            if value is not None:
                return value
        return None

    def put(self, key: bytes, value: int = 0) -> None:
        """Remember `key` from now on."""
        self.open[key] = value

    def advance(self, watermark_ms: int) -> None:
        """Close the open slice when its time is over, and forget slices that are older than the horizon."""
        start_ms = watermark_ms - watermark_ms % self.slice_ms
        if start_ms <= self.start_ms:
            return
        if self.open:
            self.closed.append(_Slice.close(self.start_ms, self.open))
            self.open = {}
        self.start_ms = start_ms
        oldest_ms = start_ms - (SLICES + 1) * self.slice_ms
        self.closed = [s for s in self.closed if s.start_ms > oldest_ms]

    def to_plain(self) -> list[Any]:
        """Return the state as lists, numbers and bytes; closed slices are given as they are, without a copy."""
        open_ = [b"".join(self.open), bytes(self.open.values())]
        return [self.start_ms, open_, [[s.start_ms, s.raw, s.values] for s in self.closed]]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        self.start_ms = plain[0]
        raw, values = plain[1]
        self.open = {bytes(raw[16 * i : 16 * i + 16]): value for i, value in enumerate(values)}
        self.closed = [_Slice(start, bytes(raw), bytes(values)) for start, raw, values in plain[2]]
