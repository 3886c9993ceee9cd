"""What was taken before, in bounded memory: digests of event ids and chunks, forgotten after a horizon.

Two generations: the young one takes what is new; when it is half a horizon old, or full, it becomes the old one and
the former old one is forgotten. So an entry is remembered for at least half the horizon and at most the whole of it,
or for the last `entries_max` / 2 entries at least.

Legend: M places of a table, 2 the halves of an id's hash, N rows of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import xxhash

from headrace.kernels.arrays import Bools, I64s, Int, U64s
from headrace.kernels.open_addressing import BY_PLACE, EMPTY, delete_at, find, move_places, place_of


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


class _Generation(NamedTuple):
    """Hashes of ids, and which chunk brought each; -1 where no id is."""

    chunk_M: I64s
    keys_M2: U64s


def _generation(places: int) -> _Generation:
    return _Generation(np.full(places, EMPTY, np.int64), np.empty((places, 2), np.uint64))


@numba.njit(cache=True)
def _take(
    young: _Generation,
    old: _Generation,
    first_N: U64s,
    second_N: U64s,
    chosen_N: Bools,
    chunk_N: I64s,
    found_N: I64s,
) -> Int:
    """Write to `found_N` who brought each chosen id before, or 0; add the new ones and return how many there were."""
    new = 0
    for n in range(len(first_N)):
        found_N[n] = 0
        if not chosen_N[n]:
            continue
        at = place_of(young.chunk_M, young.keys_M2, BY_PLACE, first_N[n], second_N[n])
        if young.chunk_M[at] != EMPTY:
            found_N[n] = young.chunk_M[at]
            continue
        before = find(old.chunk_M, old.keys_M2, BY_PLACE, first_N[n], second_N[n])
        if before != EMPTY:
            found_N[n] = before
            continue
        young.keys_M2[at, 0], young.keys_M2[at, 1], young.chunk_M[at] = first_N[n], second_N[n], chunk_N[n]
        new += 1
    return new


@numba.njit(cache=True)
def _forget(young: _Generation, first: np.uint64, second: np.uint64) -> None:
    at = place_of(young.chunk_M, young.keys_M2, BY_PLACE, first, second)
    if young.chunk_M[at] != EMPTY:
        delete_at(young.chunk_M, young.keys_M2, BY_PLACE, at)


class EventIds:
    """Which chunk brought an event id first: 128-bit hashes in two generations of open-addressing tables.

    A generation holds `entries_max` / 2 ids; its table doubles as it fills and is at most half full: 24 bytes a place,
    so at most 100 bytes an id. Two ids of one hash would make a loss; with 128 bits and a million ids in memory that is
    1 event in 10^32.
    """

    def __init__(self, horizon_ms: int, entries_max: int) -> None:
        self._half_ms = max(1, horizon_ms // 2)
        self._half_max = max(1, entries_max // 2)
        self._old, self._young = _generation(_PLACES_MIN), _generation(_PLACES_MIN)
        self._count = 0
        """Ids that the young generation took, those among them that it forgot again included."""
        self._since_ms: int | None = None

    def take(self, first_N: U64s, second_N: U64s, chosen_N: Bools, chunk_N: I64s, now_ms: int) -> I64s:
        """Remember the chosen ids as brought by these chunks (numbers > 0); return who brought each before, else 0.

        An id is given as the two halves of its hash. At most `entries_max` / 2 rows at a time.
        """
        if self._since_ms is None:
            self._since_ms = now_ms
        wanted = self._count + len(first_N)
        if now_ms - self._since_ms >= self._half_ms or wanted > self._half_max:
            self._old, self._young = self._young, _generation(_PLACES_MIN)
            self._count, self._since_ms, wanted = 0, now_ms, len(first_N)
        if 2 * wanted > len(self._young.chunk_M):
            larger = _generation(1 << (2 * wanted).bit_length())
            move_places(*self._young, *larger)
            self._young = larger
        found_N = np.zeros(len(first_N), np.int64)
        self._count += _take(self._young, self._old, first_N, second_N, chosen_N, chunk_N, found_N)
        return found_N

    def forget(self, first: np.uint64, second: np.uint64) -> None:
        """Take an id back that was refused after all: offered again it is no repeat."""
        _forget(self._young, first, second)


_PLACES_MIN = 1_024
