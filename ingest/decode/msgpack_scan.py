"""MessagePack without objects: where values begin and end. Compiled, pure, over uint8 arrays.

A value is skipped by counting what is still to come: a container adds its values to the count, so nesting needs no
stack, and a scan that ran out of bytes goes on where it stopped.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

U8s = npt.NDArray[np.uint8]
I64s = npt.NDArray[np.int64]
Word: TypeAlias = Any
"""An integer of 64 bits in compiled code, Python's own outside."""
Flag: TypeAlias = Any
Buffer: TypeAlias = bytes | bytearray | memoryview | U8s

NIL, BOOL, INT, FLOAT, STR, BIN, ARRAY, MAP, EXT, BEYOND, BROKEN = range(11)
"""Kinds of a head. BEYOND is an unsigned integer of more than 63 bits, BROKEN the one byte that is never used."""

DONE, MORE, BAD, LARGE = range(4)
"""How a scan ended: a value is whole; bytes are missing; no MessagePack; more than the bound is declared."""

_MARK_LOW = np.int64(0xFFFFFFFE)


@numba.njit(cache=True)
def big(data: U8s, at: Word, size: Word) -> Word:
    """Return the big-endian unsigned integer of `size` bytes, its 64 bits read as signed."""
    value = np.int64(0)
    for i in range(size):
        value = (value << np.int64(8)) | np.int64(data[at + i])
    return value


def _table() -> tuple[I64s, I64s, I64s]:
    """Return, by first byte: kind, the value that the byte itself holds, how many bytes of number follow."""
    kinds, values, sizes = np.zeros((3, 256), np.int64)

    def put(first: int, many: int, kind: int, value: int = 0, size: int = 0) -> None:
        kinds[first : first + many] = kind
        values[first : first + many] = value + np.arange(many)
        sizes[first : first + many] = size

    put(0x00, 0x80, INT)
    put(0x80, 16, MAP)
    put(0x90, 16, ARRAY)
    put(0xA0, 32, STR)
    put(0xC0, 1, NIL)
    put(0xC1, 1, BROKEN)
    put(0xC2, 2, BOOL)
    put(0xCA, 1, FLOAT, 4)
    put(0xCB, 1, FLOAT, 8)
    put(0xE0, 32, INT, -32)
    for i in range(5):
        put(0xD4 + i, 1, EXT, 1 << i)
    for i in range(4):
        put(0xCC + i, 1, BEYOND if i == 3 else INT, size=1 << i)
        put(0xD0 + i, 1, INT, value=_SIGNED, size=1 << i)
    for i in range(3):
        put(0xC4 + i, 1, BIN, size=1 << i)
        put(0xC7 + i, 1, EXT, size=1 << i)
        put(0xD9 + i, 1, STR, size=1 << i)
    for i in range(2):
        put(0xDC + i, 1, ARRAY, size=2 << i)
        put(0xDE + i, 1, MAP, size=2 << i)
    return kinds, values, sizes


_SIGNED = -1
_KIND, _VALUE, _SIZE = _table()


@numba.njit(cache=True)
def head(data: U8s, at: Word) -> tuple[Word, Word, Word]:
    """Return (kind, value, where the payload or the next value begins) of the head at `at`, which is all there.

    The value is the number itself (for FLOAT its size in bytes), or how many bytes or values follow. For EXT it is
    the payload's length; the type is the byte before the payload.
    """
    first = data[at]
    kind, size = _KIND[first], _SIZE[first]
    rest = at + 1 + size
    if size == 0:
        return kind, _VALUE[first], rest + (1 if kind == EXT else 0)
    value = big(data, at + 1, size)
    if kind == EXT:
        return kind, value, rest + 1
    if kind == INT and _VALUE[first] == _SIGNED:
        shift = 64 - 8 * size
        return kind, (value << shift) >> shift, rest
    if kind == BEYOND and value >= 0:
        return INT, value, rest
    return kind, value, rest


@numba.njit(cache=True)
def has_head(data: U8s, end: Word, at: Word) -> Flag:
    """Say whether the head at `at` is all there."""
    return at < end and at + 1 + _SIZE[data[at]] + (_KIND[data[at]] == EXT) <= end


@numba.njit(cache=True)
def skip(data: U8s, end: Word, at: Word, todo: Word, limit: Word) -> tuple[Word, Word, Word]:
    """Go on over `todo` values from `at`; return (how it ended, where, how many values are still to come).

    With MORE, `at` may lie beyond `end`: so far a payload is known to reach. LARGE when the values reach, or must
    reach, beyond `limit`.
    """
    while todo > 0:
        if at >= end:
            return MORE, at, todo
        first = data[at]
        if at + 1 + _SIZE[first] + (_KIND[first] == EXT) > end:
            return MORE, at, todo
        kind, value, rest = head(data, at)
        todo -= 1
        if kind == STR or kind == BIN or kind == EXT or kind == FLOAT:
            at = rest + value
        elif kind == ARRAY:
            at, todo = rest, todo + value
        elif kind == MAP:
            at, todo = rest, todo + 2 * value
        elif kind == BROKEN:
            return BAD, at, todo
        else:
            at = rest
        if at + todo > limit:
            return LARGE, at, todo
    return (DONE if at <= end else MORE), at, todo


@numba.njit(cache=True)
def is_group_marker(data: U8s, at: Word) -> Flag:
    """Say whether the entry at `at` opens or closes a group of OTLP records: it is no record."""
    kind, count, at = head(data, at)
    if kind != ARRAY or count < 2:
        return False
    kind, count, rest = head(data, at)
    if kind == ARRAY and count > 0:
        kind, count, rest = head(data, rest)
    return kind == EXT and count == 8 and data[rest - 1] == 0 and big(data, rest, 4) >= _MARK_LOW


ENTRIES_MAX = 524_288
"""Most entries of one message: 32 bytes each in one of 16 MiB, less than any event has that can be taken. Without it,
a body of one-byte entries, packed to some kilobytes, would become millions of dead letters."""


@numba.njit(cache=True)
def _entries(data: U8s, end: Word, starts: I64s) -> tuple[Word, Word]:
    at = np.int64(0)
    found = 0
    while at < end and found <= ENTRIES_MAX:
        status, after, _ = skip(data, end, at, 1, end)
        if status != DONE:
            return -1, at
        if not is_group_marker(data, at):
            if found < len(starts):
                starts[found] = at
            found += 1
        at = after
    return found, at


def entry_starts(body: U8s) -> I64s:
    """Return where each entry of a plain body begins, int64 [N], group markers left out.

    Raises `ValueError` when the body ends inside an entry, holds no MessagePack, or more than `ENTRIES_MAX` entries.
    """
    # 96 bytes an entry at first: most bodies are scanned once.
    starts = np.empty(len(body) // 96 + 4, np.int64)
    found, at = _entries(body, len(body), starts)
    if found > ENTRIES_MAX:
        raise ValueError(f"more than {ENTRIES_MAX} entries in one message of {len(body)} bytes; make chunks smaller")
    if found > len(starts):
        starts = np.empty(found, np.int64)
        found, at = _entries(body, len(body), starts)
    if found < 0:
        raise ValueError(f"the body of {len(body)} bytes ends inside the entry at byte {at}, or that is no MessagePack")
    return starts[:found]


@numba.njit(cache=True)
def quoted_after(byte: Word, quoted: Word) -> Word:
    """Return where JSON stands behind a byte: 0 outside of a string, 1 inside, 2 after a backslash in it."""
    if quoted == 2:
        return 1
    if quoted == 1:
        return 2 if byte == 0x5C else 0 if byte == 0x22 else 1
    return 1 if byte == 0x22 else 0


@numba.njit(cache=True)
def skip_json(data: U8s, end: Word, at: Word, depth: Word, quoted: Word) -> tuple[Word, Word, Word, Word]:
    """Go on over a JSON array from `at`; return (DONE or MORE, where, depth, quoted).

    `quoted` is as `quoted_after` gives it. The array ends where depth comes back to 0.
    """
    while at < end:
        byte = data[at]
        at += 1
        was_quoted, quoted = quoted, quoted_after(byte, quoted)
        if was_quoted:
            continue
        if byte == 0x5B or byte == 0x7B:
            depth += 1
        elif byte == 0x5D or byte == 0x7D:
            depth -= 1
            if depth <= 0:
                return DONE, at, depth, quoted
    return MORE, at, depth, quoted


def as_bytes(data: Buffer) -> U8s:
    """Return a buffer as uint8 without a copy."""
    return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
