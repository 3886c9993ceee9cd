"""Every key's counter buckets in flat arrays, and their values as of a time, compiled.

One thread puts and drops; others ask. Compiled calls hold the interpreter's lock, so that each sees a key's buckets
whole. All that is asked lies in `Arrays`, which hold no Python object: they may lie in memory that processes share.

A key is 128 bits of its text under its counter's name. Its buckets lie in the arena from `spans_R2[row, 0]` on: how
many there are, how many entries each has, then each bucket's number and entries, youngest first. A place of the arena
that is left is used again by a key that needs as much.

Legend: R rows, M places of the index, A words of the arena, N keys asked, E entries of a counter, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa

from headrace.contract.hashing import hash_text
from headrace.contract.spec import Counter
from headrace.kernels import open_addressing
from headrace.kernels.arrays import Bools, F64s, I32s, I64s, Int, U64s
from headrace.kernels.hashes import hash128_texts
from headrace.kernels.open_addressing import BY_ROW, EMPTY, delete_row, insert_row
from headrace.stream.features.counters import UNIT, bucket_ms, value_as_of, weights

_COUNT, _SUM, _LAST = range(3)
_KINDS = {"count": _COUNT, "sum": _SUM, "last": _LAST}
_HEAD = 2
_ROWS_MIN, _WORDS_MIN = 1_024, 16_384
_EXACT = 2**53
"""Integers up to here are exact as floats; what is larger is evaluated as Python's integers are."""
_NO_WEIGHTS = np.empty(0, np.float64)


class Arrays(NamedTuple):
    """What a table holds."""

    index_M: I32s
    keys_R2: U64s
    spans_R2: I64s
    """Where a row's buckets begin in the arena, and how many words it may use there."""
    arena_A: I64s


@lru_cache(maxsize=1_024)
def salt_of(counter: str) -> int:
    """Return the salt of a counter's keys."""
    return hash_text(counter)


@lru_cache(maxsize=256)
def _entries_of(counter: Counter) -> tuple[I64s, F64s]:
    """Return the kind of each entry, and the weight of each age; no weights where all are 1."""
    given = weights(counter)
    kinds_E = np.array([_KINDS[entry.kind] for entry in counter.entries()], np.int64)
    return kinds_E, _NO_WEIGHTS if given is None else np.array(given)


class CounterTable:
    """The buckets of all keys of all counters."""

    def __init__(self) -> None:
        self.arrays = Arrays(
            np.full(_ROWS_MIN + _ROWS_MIN // 2, EMPTY, np.int32),
            np.zeros((_ROWS_MIN, 2), np.uint64),
            np.zeros((_ROWS_MIN, 2), np.int64),
            np.zeros(_WORDS_MIN, np.int64),
        )
        self._row_of: dict[str, int] = {}
        self._used = 0
        self._free_rows: list[int] = []
        self._free_spans: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, name: str) -> bool:
        return name in self._row_of

    def put(self, name: str, buckets: Mapping[int, Sequence[int]]) -> None:
        """Take a key's buckets in place of those that it had.

        Args:
            name: `<counter>/<key>`.
            buckets: entries by the bucket's number.

        Raises:
            ValueError: a number has more than 64 bits, or there are more entries than any counter has.
        """
        width = max(map(len, buckets.values()), default=0)
        words = [len(buckets), width]
        for bucket in sorted(buckets, reverse=True):
            entries = buckets[bucket]
            words += [bucket, *entries, *[0] * (width - len(entries))]
        try:
            words_W = np.array(words, np.int64)
        except OverflowError as error:
            raise ValueError("a bucket has a number of more than 64 bits") from error
        row = self._row_of.get(name)
        if row is None:
            self._add(name, words_W)
            return
        at, room = self.arrays.spans_R2[row].tolist()
        if len(words_W) <= room:
            _write(self.arrays.arena_A, at, words_W)
            return
        self.arrays.spans_R2[row] = self._put_away(words_W)
        self._free_spans.setdefault(room, []).append(at)

    def drop(self, name: str) -> None:
        """Forget a key; nothing happens where it is not known."""
        row = self._row_of.pop(name, None)
        if row is None:
            return
        arrays = self.arrays
        delete_row(arrays.index_M, arrays.keys_R2, row)
        at, room = arrays.spans_R2[row].tolist()
        self._free_spans.setdefault(room, []).append(at)
        self._free_rows.append(row)

    def values(self, counter: Counter, keys_N2: U64s, known_N: Bools, as_of_ms: int) -> F64s:
        """Return the values of a counter's window that ends at `as_of_ms`: float64 [N, E], 0 where nothing is known.

        They are `counters.value_as_of`'s, bit for bit.

        Args:
            keys_N2: `hash128_texts` of the keys under `salt_of` the counter.
            known_N: which rows have a key.
        """
        arrays, (kinds_E, weights_B) = self.arrays, _entries_of(counter)
        out_NE = np.zeros((len(keys_N2), len(kinds_E)))
        large_N = np.zeros(len(keys_N2), np.bool_)
        _values(
            arrays, keys_N2, known_N, kinds_E, weights_B, bucket_ms(counter), counter.buckets, as_of_ms, out_NE, large_N
        )  # fmt: skip
        for n in np.flatnonzero(large_N) if large_N.any() else ():
            out_NE[n] = value_as_of(self._buckets(keys_N2[n], len(kinds_E)), counter, as_of_ms)
        return out_NE

    def _buckets(self, key_2: U64s, entries: int) -> dict[int, list[int]]:
        arrays = self.arrays
        row = int(open_addressing.find(arrays.index_M, arrays.keys_R2, BY_ROW, key_2[0], key_2[1]))
        if row < 0:
            return {}
        at = int(arrays.spans_R2[row, 0])
        count, width = arrays.arena_A[at : at + _HEAD].tolist()
        words = arrays.arena_A[at + _HEAD : at + _HEAD + count * (1 + width)].reshape(count, 1 + width).tolist()
        return {bucket: held[:entries] for bucket, *held in words}

    def _add(self, name: str, words_W: I64s) -> None:
        """Add a key. It is found when all of it is there: the index comes last."""
        counter, _, key = name.partition("/")
        row = self._free_rows.pop() if self._free_rows else len(self._row_of)
        if row >= len(self.arrays.keys_R2):
            self._grow_rows()
        span = self._put_away(words_W)
        arrays = self.arrays
        arrays.spans_R2[row] = span
        arrays.keys_R2[row] = hash128_texts(pa.array([key], pa.string()), salt_of(counter))[0]
        insert_row(arrays.index_M, arrays.keys_R2, row)
        self._row_of[name] = row

    def _grow_rows(self) -> None:
        old = self.arrays
        rows = len(old.keys_R2)
        keys_R2, spans_R2 = np.concatenate([old.keys_R2] * 2), np.concatenate([old.spans_R2] * 2)
        index_M = np.full(3 * rows, EMPTY, np.int32)
        _index(index_M, keys_R2, rows)
        self.arrays = old._replace(index_M=index_M, keys_R2=keys_R2, spans_R2=spans_R2)

    def _put_away(self, words_W: I64s) -> tuple[int, int]:
        """Write words to a place of the arena that nobody reads; return where it begins and its room, a power of 2."""
        room = 1 << (len(words_W) - 1).bit_length()
        free = self._free_spans.get(room)
        if free:
            at = free.pop()
        else:
            at = self._used
            if at + room > len(self.arrays.arena_A):
                more = np.zeros(max(room, len(self.arrays.arena_A)), np.int64)
                self.arrays = self.arrays._replace(arena_A=np.concatenate([self.arrays.arena_A, more]))
            self._used += room
        _write(self.arrays.arena_A, at, words_W)
        return at, room


@numba.njit(cache=True)
def _write(arena_A: I64s, at: Int, words_W: I64s) -> None:
    """Write in one compiled call: NumPy lets other threads run while it copies much."""
    for i in range(words_W.shape[0]):
        arena_A[at + i] = words_W[i]


@numba.njit(cache=True)
def _index(index_M: I32s, keys_R2: U64s, rows: Int) -> None:
    for row in range(rows):
        insert_row(index_M, keys_R2, row)


@numba.njit(cache=True)
def _values(
    arrays: Arrays,
    keys_N2: U64s,
    known_N: Bools,
    kinds_E: I64s,
    weights_B: F64s,
    width_ms: Int,
    buckets: Int,
    as_of_ms: Int,
    out_NE: F64s,
    large_N: Bools,
) -> None:
    """See `CounterTable.values`; `large_N` says of which rows a number is too large to be added here."""
    entries = kinds_E.shape[0]
    totals_E = np.zeros(entries, np.int64)
    top = as_of_ms // width_ms
    oldest = top - buckets + 1
    weighed = weights_B.shape[0] > 0
    for n in range(keys_N2.shape[0]):
        if not known_N[n]:
            continue
        row = open_addressing.find(arrays.index_M, arrays.keys_R2, BY_ROW, keys_N2[n, 0], keys_N2[n, 1])
        if row < 0:
            continue
        at = arrays.spans_R2[row, 0]
        count, width = arrays.arena_A[at], arrays.arena_A[at + 1]
        at += _HEAD
        totals_E[:] = 0
        for i in range(count):
            first = at + i * (1 + width)
            bucket = arrays.arena_A[first]
            if bucket > top or bucket < oldest:
                continue
            for e in range(min(entries, width)):
                amount = arrays.arena_A[first + 1 + e]
                if abs(amount) > _EXACT:
                    large_N[n] = True
                if kinds_E[e] == _LAST:
                    if amount != 0 and out_NE[n, e] == 0:
                        last_ms = bucket * width_ms + amount - 1
                        if last_ms <= as_of_ms:
                            out_NE[n, e] = 1 + as_of_ms - last_ms
                elif weighed:
                    out_NE[n, e] += float(amount) * weights_B[top - bucket]
                else:
                    totals_E[e] += amount
        for e in range(entries):
            if kinds_E[e] != _LAST and not weighed:
                if abs(totals_E[e]) > _EXACT:
                    large_N[n] = True
                out_NE[n, e] = totals_E[e]
            if kinds_E[e] == _SUM:
                out_NE[n, e] /= UNIT
