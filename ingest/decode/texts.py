"""Text columns from spans of bytes: gathered and checked. Compiled, pure.

A text is where it starts and how long it is, or a number of which it is the decimal form.

Legend: N rows.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from headrace.ingest.decode.msgpack_scan import Flag, I64s, U8s, Word

NUMBER = -2
"""In place of a length: the text is the decimal form of the number in `starts`."""

Flags = npt.NDArray[np.uint8]


@numba.njit(cache=True)
def valid_utf8(data: U8s, at: Word, size: Word) -> Flag:
    """Say whether these bytes are UTF-8 (no surrogates, nothing overlong). Source: RFC 3629, section 4."""
    end = at + size
    if size > 16:
        # Most text is ASCII, which is seen many bytes at once.
        text = data[at:end]
        high = np.uint8(0)
        for i in range(len(text)):
            high |= text[i]
        if high < 0x80:
            return True
    while at < end:
        first = data[at]
        if first < 0x80:
            at += 1
            continue
        if first < 0xC2 or first > 0xF4:
            return False
        low, top, more = 0x80, 0xBF, 1
        if first >= 0xF0:
            more = 3
            if first == 0xF0:
                low = 0x90
            elif first == 0xF4:
                top = 0x8F
        elif first >= 0xE0:
            more = 2
            if first == 0xE0:
                low = 0xA0
            elif first == 0xED:
                top = 0x9F
        if at + more >= end or data[at + 1] < low or data[at + 1] > top:
            return False
        for i in range(2, more + 1):
            if data[at + i] < 0x80 or data[at + i] > 0xBF:
                return False
        at += more + 1
    return True


@numba.njit(cache=True)
def _digits(number: Word) -> Word:
    if number < 0:
        # -(2**63) has no positive twin; its length is known.
        return 20 if number == -(2**63) else 1 + _digits(-number)
    size = 1
    while number >= 10:
        number //= 10
        size += 1
    return size


@numba.njit(cache=True)
def _write(number: Word, data: U8s, at: Word, size: Word) -> None:
    low = at
    if number < 0:
        data[at] = 0x2D
        low += 1
    at += size - 1
    while at >= low:
        digit = number % 10 if number >= 0 else (-(number % -10))
        data[at] = 0x30 + digit
        number = (number - digit) // 10 if number >= 0 else -((-(number + digit)) // 10)
        at -= 1


@numba.njit(cache=True)
def _copy(data: U8s, start: Word, text: U8s, at: Word, size: Word) -> None:
    # A slice is copied by the machine's own routine, which pays from some 32 bytes on.
    if size > 32:
        text[at : at + size] = data[start : start + size]
    else:
        for i in range(size):
            text[at + i] = data[start + i]


@numba.njit(cache=True)
def _size(ints_N: I64s, lens_N: npt.NDArray[np.int32], row: Word) -> Word:
    size = np.int64(lens_N[row])
    return _digits(ints_N[row]) if size == NUMBER else size


@numba.njit(cache=True)
def _put(data: U8s, ints_N: I64s, lens_N: npt.NDArray[np.int32], row: Word, text: U8s, at: Word, size: Word) -> None:
    if lens_N[row] == NUMBER:
        _write(ints_N[row], text, at, size)
    else:
        _copy(data, ints_N[row], text, at, size)


@numba.njit(cache=True)
def gather(data: U8s, ints_N: I64s, lens_N: npt.NDArray[np.int32], valid_N: Flags) -> tuple[I64s, U8s]:
    """Return the offsets and bytes of a text column; a number becomes its decimal text, null is empty."""
    rows = len(ints_N)
    offsets = np.zeros(rows + 1, np.int64)
    for row in range(rows):
        size = np.int64(0)
        if valid_N[row]:
            size = _size(ints_N, lens_N, row)
        offsets[row + 1] = offsets[row] + size
    text = np.empty(offsets[rows], np.uint8)
    for row in range(rows):
        at = offsets[row]
        size = offsets[row + 1] - at
        if size > 0:
            _put(data, ints_N, lens_N, row, text, at, size)
    return offsets, text


@numba.njit(cache=True)
def gather_ids(
    data: U8s,
    ints_N: I64s,
    lens_N: npt.NDArray[np.int32],
    valid_N: Flags,
    prefixes: U8s,
    prefix_at: I64s,
    chunk_N: I64s,
    nth_N: I64s,
) -> tuple[I64s, U8s]:
    """Return event ids: an event's own, else its chunk's prefix, a slash and its place in the chunk."""
    rows = len(ints_N)
    offsets = np.zeros(rows + 1, np.int64)
    for row in range(rows):
        if valid_N[row]:
            size = _size(ints_N, lens_N, row)
        else:
            chunk = chunk_N[row]
            size = prefix_at[chunk + 1] - prefix_at[chunk] + 1 + _digits(nth_N[row])
        offsets[row + 1] = offsets[row] + size
    text = np.empty(offsets[rows], np.uint8)
    for row in range(rows):
        at = offsets[row]
        size = offsets[row + 1] - at
        if valid_N[row]:
            _put(data, ints_N, lens_N, row, text, at, size)
            continue
        chunk = chunk_N[row]
        for i in range(prefix_at[chunk], prefix_at[chunk + 1]):
            text[at] = prefixes[i]
            at += 1
        text[at] = 0x2F
        at += 1
        _write(nth_N[row], text, at, offsets[row + 1] - at)
    return offsets, text
