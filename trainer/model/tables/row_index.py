"""Rows found by 64-bit keys: records in memory that only grows, and a hash index that grows a page at a time.

A *record* is one row: its key, the time of its last use, and as many 4-byte words as its owner asks for. All records
lie in one region of reserved addresses whose pages take memory when they are first written, so that growing never
copies a record and NumPy or torch see all rows as one array. A freed record holds the number of the next free one and
is used again first.

The index is extendible hashing: the first bits of a key's hash choose a *segment* through the directory. A segment is
one page, 64 buckets of a cache line each; a bucket has 12 entries (8 bits of the hash, 32 bits of row), a count, and
the number of keys that went past it because it was full, which is what makes removal leave no tombstones. A segment
with more than 640 keys splits in two: no insertion moves more than 640 entries, and the directory (4 bytes a
segment) is all that ever doubles. An entry costs 6.4 to 12.8 bytes, by where between two splits a table is.

What a lookup answers depends on keys alone; which row a key gets depends on the order of insertions and removals.

Source: Fagin et al., "Extendible Hashing", TODS 1979; segments of cache lines as in Nam et al., "Write-Optimized
Dynamic Hashing" (CCEH), FAST 2019; tags and overflow counts as in Facebook's F14, 2019.

Axes: K keys, R rows, W words of a record, X keys of a record's width, D entries of the directory, S segments,
B buckets.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import NamedTuple, Protocol

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.spec import PAD
from headrace.kernels.hashes import mix

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Uint8s = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]

HEADER_WORDS = 3
"""Words of a record before its owner's: the key takes two, the last use (seconds, unsigned) one."""
LAST_USE = 2
SWEEPS = 4_096
"""In so many parts the hash space is swept; see `RowIndex.sweep`."""
MISSING, EXPIRED = -1, -2

_BUCKETS, _ENTRIES, _SPLIT_ABOVE = 64, 12, 640
_LINE = 16
_SEGMENT_BYTES = _BUCKETS * _LINE * 4
_SWEEP_BITS = 12
# Rows are counted in 31 bits.
_ROWS_MAX = 2**31 - 1
# `head` holds: rows in use, rows ever used, newest free row, segments, bits of the directory.
_COUNT, HIGH, _FREE, _SEGMENTS, _BITS = range(5)
_DONE, _DIRECTORY_FULL, _SEGMENTS_FULL = range(3)
# Keys looked up side by side, so that the memory's answers to one overlap with the questions of the next.
_GROUP = 32
_PAD = np.int64(PAD)


class Arrays(NamedTuple):
    """What the kernels work on."""

    directory_D: Int32s
    bits_S: Uint8s
    """How many bits of the hash all keys of a segment share."""
    keys_S: Int32s
    """Keys in a segment."""
    lines_B: Int32s
    """[B, 16]: 12 tags in 3 words, 12 rows, and count + 256 * passed."""
    tags_B: Uint8s
    """[B, 64]: the same memory."""
    words_RW: Int32s
    keys_RX: Int64s
    """[R, W / 2]: the same memory as `words_RW`; column 0 is the key."""
    head: Int64s


class Listener(Protocol):
    """Hears of rows before they change."""

    def note(self, rows_N: Int64s) -> None:
        """Take in that these rows are about to change, -1 for none; a row may be named twice."""


@numba.njit(cache=True)
def _segment_of(a: Arrays, mixed: np.uint64) -> int:
    return int(a.directory_D[mixed >> np.uint64(64 - a.head[_BITS])])


@numba.njit(cache=True)
def _find_one(a: Arrays, key: np.int64, mixed: np.uint64) -> tuple[int, int]:
    """Return where the entry of a key is, (bucket, entry), or (-1, -1)."""
    first = _segment_of(a, mixed) * _BUCKETS
    home = np.int64(mixed & np.uint64(_BUCKETS - 1))
    tag = np.uint8((mixed >> np.uint64(6)) & np.uint64(255))
    for step in range(_BUCKETS):
        bucket = first + ((home + step) & (_BUCKETS - 1))
        state = a.lines_B[bucket, 15]
        for entry in range(state & 255):
            if a.tags_B[bucket, entry] == tag and a.keys_RX[a.lines_B[bucket, 3 + entry], 0] == key:
                return int(bucket), entry
        if state < 256:
            break
    return -1, -1


@numba.njit(cache=True)
def _put_entry(a: Arrays, segment: int, mixed: np.uint64, row: int) -> None:
    """Add an entry to a segment that has room."""
    first, at = segment * _BUCKETS, np.int64(mixed & np.uint64(_BUCKETS - 1))
    while a.lines_B[first + at, 15] & 255 == _ENTRIES:
        a.lines_B[first + at, 15] += 256
        at = (at + 1) & (_BUCKETS - 1)
    bucket = first + at
    entry = a.lines_B[bucket, 15] & 255
    a.tags_B[bucket, entry] = np.uint8((mixed >> np.uint64(6)) & np.uint64(255))
    a.lines_B[bucket, 3 + entry] = row
    a.lines_B[bucket, 15] += 1
    a.keys_S[segment] += 1


@numba.njit(cache=True)
def _remove_one(a: Arrays, key: np.int64) -> bool:
    """Remove a key and free its record; False where it has none."""
    mixed = mix(np.uint64(key))
    bucket, entry = _find_one(a, key, mixed)
    if bucket < 0:
        return False
    segment = bucket // _BUCKETS
    at = np.int64(mixed & np.uint64(_BUCKETS - 1))
    while segment * _BUCKETS + at != bucket:
        a.lines_B[segment * _BUCKETS + at, 15] -= 256
        at = (at + 1) & (_BUCKETS - 1)
    row = a.lines_B[bucket, 3 + entry]
    last = (a.lines_B[bucket, 15] & 255) - 1
    a.tags_B[bucket, entry] = a.tags_B[bucket, last]
    a.lines_B[bucket, 3 + entry] = a.lines_B[bucket, 3 + last]
    a.lines_B[bucket, 15] -= 1
    a.keys_S[segment] -= 1
    a.keys_RX[row, 0] = _PAD
    a.words_RW[row, LAST_USE] = np.int32(a.head[_FREE])
    a.head[_FREE] = row
    a.head[_COUNT] -= 1
    return True


@numba.njit(cache=True)
def _split(a: Arrays, segment: int, mixed: np.uint64) -> None:
    """Move the half of a segment's keys whose next bit is 1 to a new segment; `mixed` is the hash of one of its keys.

    The directory must have more bits than the segment's keys share.
    """
    bits, shared = a.head[_BITS], np.int64(a.bits_S[segment])
    rows = np.empty(_BUCKETS * _ENTRIES, np.int32)
    count = 0
    for bucket in range(segment * _BUCKETS, (segment + 1) * _BUCKETS):
        for entry in range(a.lines_B[bucket, 15] & 255):
            rows[count] = a.lines_B[bucket, 3 + entry]
            count += 1
        a.lines_B[bucket, 15] = 0
    fresh = a.head[_SEGMENTS]
    a.head[_SEGMENTS] += 1
    a.bits_S[segment] = a.bits_S[fresh] = shared + 1
    a.keys_S[segment] = a.keys_S[fresh] = 0
    # The segment's entries in the directory follow one another; the second half of them is the new one's.
    entries = np.int64(1) << (bits - shared)
    start = np.int64(mixed >> np.uint64(64 - bits)) & ~(entries - 1)
    for at in range(start + entries // 2, start + entries):
        a.directory_D[at] = fresh
    for i in range(count):
        moved = mix(np.uint64(a.keys_RX[rows[i], 0]))
        _put_entry(a, fresh if (moved >> np.uint64(63 - shared)) & np.uint64(1) else segment, moved, rows[i])


@numba.njit(cache=True)
def _find(a: Arrays, wanted_K: Int64s, out_K: Int64s, oldest: int) -> int:
    """Write each key's row: `MISSING` where it has none, `EXPIRED` where it was last used before `oldest` seconds.

    Returns how many have no live row. In groups, each in stages, so that loads of one stage overlap.
    """
    homes, rows, without = np.empty(_GROUP, np.int64), np.empty(_GROUP, np.int64), 0
    mixed = np.empty(_GROUP, np.uint64)
    for begin in range(0, wanted_K.shape[0], _GROUP):
        size = min(_GROUP, wanted_K.shape[0] - begin)
        for i in range(size):
            mixed[i] = mix(np.uint64(wanted_K[begin + i]))
            homes[i] = _segment_of(a, mixed[i]) * _BUCKETS + np.int64(mixed[i] & np.uint64(_BUCKETS - 1))
            rows[i] = a.lines_B[homes[i], 15]
        for i in range(size):
            tag, state = np.uint8((mixed[i] >> np.uint64(6)) & np.uint64(255)), rows[i]
            rows[i] = -1 if state < 256 else -2
            for entry in range(state & 255):
                if a.tags_B[homes[i], entry] == tag:
                    rows[i] = a.lines_B[homes[i], 3 + entry]
                    break
        for i in range(size):
            key, row = wanted_K[begin + i], rows[i]
            if row != -1 and (row == -2 or a.keys_RX[row, 0] != key):
                bucket, entry = _find_one(a, key, mixed[i])
                row = -1 if bucket < 0 else np.int64(a.lines_B[bucket, 3 + entry])
            if row >= 0 and np.int64(np.uint32(a.words_RW[row, LAST_USE])) < oldest:
                row = EXPIRED
            without += row < 0
            out_K[begin + i] = row
    return without


@numba.njit(cache=True)
def _insert(
    a: Arrays, wanted_K: Int64s, out_K: Int64s, fresh_K: Int64s, begin: int, count: int
) -> tuple[int, int, int]:
    """Write each key's row from `begin` on; keys that have none get one, whose number goes to `fresh_K` at `count`.

    Returns (how it ended, where, fresh rows so far); the caller makes room and goes on from there.
    """
    for i in range(begin, wanted_K.shape[0]):
        key = wanted_K[i]
        if key == _PAD:
            out_K[i] = -1
            continue
        mixed = mix(np.uint64(key))
        bucket, entry = _find_one(a, key, mixed)
        if bucket >= 0:
            out_K[i] = a.lines_B[bucket, 3 + entry]
            continue
        segment = _segment_of(a, mixed)
        while a.keys_S[segment] >= _SPLIT_ABOVE:
            if a.head[_SEGMENTS] == a.keys_S.shape[0]:
                return _SEGMENTS_FULL, i, count
            if a.bits_S[segment] == a.head[_BITS]:
                return _DIRECTORY_FULL, i, count
            _split(a, segment, mixed)
            segment = _segment_of(a, mixed)
        row = a.head[_FREE]
        if row >= 0:
            a.head[_FREE] = a.words_RW[row, LAST_USE]
        else:
            row = a.head[HIGH]
            a.head[HIGH] += 1
        a.keys_RX[row, 0] = key
        a.head[_COUNT] += 1
        _put_entry(a, segment, mixed, row)
        out_K[i] = fresh_K[count] = row
        count += 1
    return _DONE, wanted_K.shape[0], count


@numba.njit(cache=True)
def _place(a: Arrays, begin: int) -> tuple[int, int]:
    """Index the rows from `begin` to `high` by the keys that their records hold; those with `PAD` are free.

    Returns (how it ended, where); the caller makes room and goes on from there.
    """
    for row in range(begin, a.head[HIGH]):
        key = a.keys_RX[row, 0]
        if key == _PAD:
            a.words_RW[row, LAST_USE] = np.int32(a.head[_FREE])
            a.head[_FREE] = row
            continue
        mixed = mix(np.uint64(key))
        segment = _segment_of(a, mixed)
        while a.keys_S[segment] >= _SPLIT_ABOVE:
            if a.head[_SEGMENTS] == a.keys_S.shape[0]:
                return _SEGMENTS_FULL, row
            if a.bits_S[segment] == a.head[_BITS]:
                return _DIRECTORY_FULL, row
            _split(a, segment, mixed)
            segment = _segment_of(a, mixed)
        _put_entry(a, segment, mixed, row)
        a.head[_COUNT] += 1
    return _DONE, int(a.head[HIGH])


@numba.njit(cache=True)
def _next_free(a: Arrays, most: int) -> Int64s:
    """Return the free rows that are used next, as many as there are and `most` at most."""
    rows, count, row = np.empty(most, np.int64), 0, a.head[_FREE]
    while row >= 0 and count < most:
        rows[count] = row
        row = np.int64(a.words_RW[row, LAST_USE])
        count += 1
    return rows[:count]


@numba.njit(cache=True)
def _remove(a: Arrays, keys_K: Int64s) -> int:
    count = 0
    for i in range(keys_K.shape[0]):
        count += _remove_one(a, keys_K[i])
    return count


@numba.njit(cache=True)
def _unused(a: Arrays, part: int, oldest: int) -> Int64s:
    """Return the keys of one part of the hash space that were last used before `oldest`."""
    bits = a.head[_BITS]
    first = part << (bits - _SWEEP_BITS) if bits >= _SWEEP_BITS else part >> (_SWEEP_BITS - bits)
    entries = np.int64(1) << max(bits - _SWEEP_BITS, 0)
    found, count, before = np.empty(_SPLIT_ABOVE, np.int64), 0, np.int64(-1)
    for at in range(first, first + entries):
        segment = np.int64(a.directory_D[at])
        if segment == before:
            continue
        before = segment
        if count + _BUCKETS * _ENTRIES > found.shape[0]:
            wider = np.empty(2 * found.shape[0] + _BUCKETS * _ENTRIES, np.int64)
            wider[:count] = found[:count]
            found = wider
        for bucket in range(segment * _BUCKETS, (segment + 1) * _BUCKETS):
            for entry in range(a.lines_B[bucket, 15] & 255):
                row = a.lines_B[bucket, 3 + entry]
                key = a.keys_RX[row, 0]
                old = np.int64(np.uint32(a.words_RW[row, LAST_USE])) < oldest
                if old and np.int64(mix(np.uint64(key)) >> np.uint64(64 - _SWEEP_BITS)) == part:
                    found[count] = key
                    count += 1
    return np.sort(found[:count])


def reserve(size: int) -> Uint8s:
    """Return zeroed bytes whose pages take memory only when they are first written.

    Huge pages are asked for: with them a random row costs one miss of the memory's own tables instead of four.
    """
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise Unavailable(
            f"{size:,} bytes of addresses (not memory) cannot be reserved: {error.strerror}. Lift the limit "
            "(ulimit -v), or set vm.overcommit_memory to 0 or 1."
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # A kernel without huge pages serves small ones.
            region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, np.uint8)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class RowIndex:
    """Keys, their rows, and the rows' records. Not thread-safe; kernels are single-threaded."""

    def __init__(self, *, words: int, rows_max: int = 0) -> None:
        """Make an empty one.

        Args:
            words: 4-byte words of a record after its header; one more is added where keys would not lie on 8 bytes.
            rows_max: most rows; by default what the machine's memory could hold.
        """
        self.words = HEADER_WORDS + words + (HEADER_WORDS + words) % 2
        fits = _memory_bytes() // (4 * self.words)
        self.rows_max = min(rows_max or fits, _ROWS_MAX)
        # Twice the segments that full ones would need: a segment that has just split is half full.
        segments = 2 * self.rows_max // _SPLIT_ABOVE + 16
        lines = reserve(segments * _SEGMENT_BYTES)
        records = reserve(self.rows_max * self.words * 4)
        head = np.array([0, 0, -1, 2, 1], np.int64)
        self.arrays = Arrays(
            np.arange(2, dtype=np.int32),
            reserve(segments),
            reserve(segments * 4).view(np.int32),
            lines.view(np.int32).reshape(-1, _LINE),
            lines.reshape(-1, _LINE * 4),
            records.view(np.int32).reshape(-1, self.words),
            records.view(np.int64).reshape(-1, self.words // 2),
            head,
        )
        self.arrays.bits_S[:2] = 1
        self.floats_RW: Float32s = self.arrays.words_RW.view(np.float32)
        self.listeners: list[Listener] = []

    def __len__(self) -> int:
        return int(self.arrays.head[_COUNT])

    @property
    def high(self) -> int:
        """Rows ever used; free ones among them have the key `PAD`."""
        return int(self.arrays.head[HIGH])

    @property
    def keys_R(self) -> Int64s:
        """The key of each row up to `high`, a view."""
        return self.arrays.keys_RX[: self.high, 0]

    @property
    def nbytes(self) -> int:
        """Bytes in use: records, segments and directory."""
        segments = int(self.arrays.head[_SEGMENTS])
        # 5: bits and keys of a segment.
        return self.high * self.words * 4 + segments * (_SEGMENT_BYTES + 5) + self.arrays.directory_D.nbytes

    def live_rows(self) -> Int64s:
        """Return the rows in use, ascending."""
        return np.flatnonzero(self.keys_R != PAD)

    def changing(self, rows_N: Int64s) -> None:
        """Tell who listens that these rows are about to change, -1 for none: every write to a record comes after.

        Rows that are inserted or removed are told by `insert`, `remove` and `sweep` themselves.
        """
        for listener in self.listeners:
            listener.note(rows_N)

    def find(self, keys_K: Int64s, *, oldest: int = 0) -> Int64s:
        """Return the row of each key: `MISSING` where it has none, `EXPIRED` where it was last used before `oldest`."""
        rows_K = np.empty(len(keys_K), np.int64)
        _find(self.arrays, np.ascontiguousarray(keys_K), rows_K, oldest)
        return rows_K

    def insert(self, keys_K: Int64s) -> tuple[Int64s, Int64s]:
        """Return the row of each key, -1 for `PAD`, and the rows that are new, ordered by their keys' first appearance.

        A new row's key is set; its other words hold what was there. Raises `Overloaded`, and inserts nothing, when so
        many rows could be more than `rows_max`.
        """
        if len(self) + len(keys_K) > self.rows_max:
            raise self._full()
        keys_K = np.ascontiguousarray(keys_K)
        if self.listeners:
            self.changing(_next_free(self.arrays, len(keys_K)))
        rows_K, fresh_K = np.empty(len(keys_K), np.int64), np.empty(len(keys_K), np.int64)
        ended, at, count = _insert(self.arrays, keys_K, rows_K, fresh_K, 0, 0)
        while ended == _DIRECTORY_FULL:
            self._double_directory()
            ended, at, count = _insert(self.arrays, keys_K, rows_K, fresh_K, at, count)
        if ended == _SEGMENTS_FULL:
            raise self._full()
        self.changing(fresh_K[:count])
        return rows_K, fresh_K[:count]

    def place(self, keys_R: Int64s) -> None:
        """Give an empty index these rows, 0, 1, 2 ..., as another one had them; rows with the key `PAD` are free.

        Raises `Overloaded` when there are more than `rows_max`.
        """
        self.begin(len(keys_R))
        self.arrays.keys_RX[: len(keys_R), 0] = keys_R
        self.number()

    def begin(self, rows: int) -> None:
        """Give an empty index so many rows, whose keys are written before `number` is called. Raises as `place`."""
        if rows > self.rows_max:
            raise self._full()
        self.arrays.head[HIGH] = rows

    def number(self) -> None:
        """Find the rows by the keys that their records hold from now on; see `begin`. Raises as `place`."""
        ended, at = _place(self.arrays, 0)
        while ended == _DIRECTORY_FULL:
            self._double_directory()
            ended, at = _place(self.arrays, at)
        if ended == _SEGMENTS_FULL:
            raise self._full()

    def remove(self, keys_K: Int64s) -> int:
        """Remove keys, and return how many had a row. Rows that were looked up before may be another key's after."""
        if self.listeners:
            self.changing(self.find(keys_K))
        return int(_remove(self.arrays, np.ascontiguousarray(keys_K)))

    def sweep(self, part: int, *, oldest: int) -> Int64s:
        """Remove what was last used before `oldest` in part `part` of the hash space; return those keys, ascending.

        Which keys are in a part depends on keys alone, so what a sweep removes does not depend on the order of
        insertions. `SWEEPS` parts are the whole.
        """
        removed_K: Int64s = _unused(self.arrays, part, oldest)
        if len(removed_K):
            self.remove(removed_K)
        return removed_K

    def _double_directory(self) -> None:
        self.arrays = self.arrays._replace(directory_D=np.repeat(self.arrays.directory_D, 2))
        self.arrays.head[_BITS] += 1

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{len(self):,} rows of {self.words * 4} bytes: more fill this machine's memory ({self.rows_max:,}). Let "
            "unused ones expire (recipe.expire_after_ms), admit fewer (recipe.admit_after), or use a larger machine."
        )
