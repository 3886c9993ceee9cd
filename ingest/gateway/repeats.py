"""What was taken before, in bounded memory: digests of event ids and chunks, forgotten after a horizon.

Two generations: the young one takes what is new; when it is half a horizon old, or full, it becomes the old one and
the former old one is forgotten. So an entry is remembered for at least half the horizon and at most the whole of it,
or for the last `entries_max` / 2 entries at least.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import xxhash

from headrace.ingest.decode.msgpack_scan import I64s, Word

U64s = npt.NDArray[np.uint64]


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


@numba.njit(cache=True)
def _place(keys: U64s, values: I64s, first: np.uint64, second: np.uint64) -> Word:
    """Return where a key lies, or the empty place (value 0) where it would."""
    mask = np.uint64(len(values) - 1)
    at = first & mask
    while values[at] != 0 and not (keys[at, 0] == first and keys[at, 1] == second):
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@numba.njit(cache=True)
def _take(
    keys: U64s,
    values: I64s,
    old_keys: U64s,
    old_values: I64s,
    first_N: U64s,
    second_N: U64s,
    chosen_N: npt.NDArray[np.bool_],
    chunk_N: I64s,
    found_N: I64s,
) -> Word:
    new = 0
    for row in range(len(first_N)):
        found_N[row] = 0
        if not chosen_N[row]:
            continue
        at = _place(keys, values, first_N[row], second_N[row])
        if values[at] != 0:
            found_N[row] = values[at]
            continue
        before = _place(old_keys, old_values, first_N[row], second_N[row])
        if old_values[before] != 0:
            found_N[row] = old_values[before]
            continue
        keys[at, 0], keys[at, 1], values[at] = first_N[row], second_N[row], chunk_N[row]
        new += 1
    return new


@numba.njit(cache=True)
def _move(keys: U64s, values: I64s, new_keys: U64s, new_values: I64s) -> None:
    for at in range(len(values)):
        if values[at] != 0 and (keys[at, 0] != 0 or keys[at, 1] != 0):
            to = _place(new_keys, new_values, keys[at, 0], keys[at, 1])
            new_keys[to, 0], new_keys[to, 1], new_values[to] = keys[at, 0], keys[at, 1], values[at]


class EventIds:
    """Which chunk brought an event id first: 128-bit hashes in two generations of open-addressing tables.

    A generation holds `entries_max` / 2 ids; its table doubles as it fills and is at most half full: 24 bytes a place,
    so at most 100 bytes an id. Two ids of one hash would make a loss; with 128 bits and a million ids in memory that is
    1 event in 10^32.
    """

    def __init__(self, horizon_ms: int, entries_max: int) -> None:
        self._half_ms = max(1, horizon_ms // 2)
        self._half_max = max(1, entries_max // 2)
        self._old, self._young = self._empty(_PLACES_MIN), self._empty(_PLACES_MIN)
        self._count = 0
        self._since_ms: int | None = None

    @staticmethod
    def _empty(places: int) -> tuple[U64s, I64s]:
        return np.zeros((places, 2), np.uint64), np.zeros(places, np.int64)

    def take(self, first_N: U64s, second_N: U64s, chosen_N: npt.NDArray[np.bool_], chunk_N: I64s, now_ms: int) -> I64s:
        """Remember the chosen ids as brought by these chunks (numbers > 0); return who brought each before, else 0.

        At most `entries_max` / 2 rows at a time.
        """
        if self._since_ms is None:
            self._since_ms = now_ms
        wanted = self._count + len(first_N)
        if now_ms - self._since_ms >= self._half_ms or wanted > self._half_max:
            self._old, self._young = self._young, self._empty(_PLACES_MIN)
            self._count, self._since_ms, wanted = 0, now_ms, len(first_N)
        if 2 * wanted > len(self._young[1]):
            larger = self._empty(1 << (2 * wanted).bit_length())
            _move(*self._young, *larger)
            self._young = larger
        found_N = np.zeros(len(first_N), np.int64)
        self._count += _take(*self._young, *self._old, first_N, second_N, chosen_N, chunk_N, found_N)
        return found_N

    def forget(self, first: np.uint64, second: np.uint64) -> None:
        """Take an id back that was refused after all: offered again it is no repeat."""
        keys, values = self._young
        at = _place(keys, values, first, second)
        if values[at] != 0:
            # The place stays taken, by a key that no id has, so that what lies behind it is still found.
            keys[at] = _GRAVE


_PLACES_MIN = 1_024
_GRAVE = np.array([0, 0], np.uint64)
