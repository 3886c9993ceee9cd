"""Sums of row hashes: digests of sets of rows that can be put together and taken apart. Compiled, pure.

A row is a key and its numbers. It has two 64-bit hashes, of different functions; a `RowSum` holds the number of rows
and both sums modulo 2**64. So the order of rows does not matter, the sum of two parts is that of the whole, and a row
is replaced by taking its old hashes off and adding its new ones. Two sets that differ by chance have equal sums with a
chance of 2**-128. It is no protection against whoever chooses rows on purpose.

The hashes are part of stored formats: equal rows have equal hashes for ever.

Source: Bellare, Micciancio, "A new paradigm for collision-free hashing: incrementality at reduced cost", EUROCRYPT
1997 (AdHash). The rounds are XXH64's, in lane b with other
numbers; the last mixing is XXH64's and MurmurHash3's.

Axes: R rows, W words of 4 bytes of a row, 2 the hashes of a row.
"""

from __future__ import annotations

import msgspec
import numba
import numpy as np
import numpy.typing as npt

from headrace.kernels.arrays import I64s, Int, U64s

U32s = npt.NDArray[np.uint32]

_MASK = 2**64 - 1
_BLOCK_ROWS = 4_096
"""Rows that are hashed at a time: their 64 KiB of hashes stay in the second cache while one array follows another."""

_P1, _P2, _P4 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x85EBCA77C2B2AE63)
_C1, _C3 = np.uint64(0x87C37B91114253D5), np.uint64(0x52DCE72938495AB5)
_M1, _M2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_F1, _F2 = np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_SEED_A, _SEED_B = np.uint64(0x2545F4914F6CDD1D), np.uint64(0x9FB21C651E98DF25)


class RowSum(msgspec.Struct, frozen=True, order=True):
    """Rows, and the sums of their hashes."""

    rows: int = 0
    low: int = 0
    high: int = 0

    def __add__(self, other: RowSum) -> RowSum:
        """Return the sum of both sets together.

        >>> RowSum(1, 2**64 - 1, 5) + RowSum(1, 2, 6)
        RowSum(rows=2, low=1, high=11)
        """
        return RowSum(self.rows + other.rows, (self.low + other.low) & _MASK, (self.high + other.high) & _MASK)

    def __sub__(self, other: RowSum) -> RowSum:
        """Return the sum without the other set's rows, which must be among these.

        >>> RowSum(2, 1, 11) - RowSum(1, 2, 6)
        RowSum(rows=1, low=18446744073709551615, high=5)
        """
        return RowSum(self.rows - other.rows, (self.low - other.low) & _MASK, (self.high - other.high) & _MASK)

    @property
    def text(self) -> str:
        """Return it as text: rows, and 32 hex digits.

        >>> RowSum(2, 1, 11).text
        '2.0000000000000001000000000000000b'
        """
        return f"{self.rows}.{self.low:016x}{self.high:016x}"


def row_hashes(keys_R: I64s, *parts: npt.NDArray[np.generic]) -> U64s:
    """Return both hashes of each row: uint64 [R, 2].

    Args:
        parts: what a row holds besides its key, in this order: arrays with an entry a row, of any type whose entries
            are a whole number of 4-byte words; others are widened to 4 bytes a number.
    """
    hashes_R2 = np.empty((len(keys_R), 2), np.uint64)
    _begin(np.ascontiguousarray(keys_R, np.int64), hashes_R2)
    for part in parts:
        _fold(words_of(part), hashes_R2)
    _finish(hashes_R2)
    return hashes_R2


def row_sum(keys_R: I64s, *parts: npt.NDArray[np.generic]) -> RowSum:
    """Return the sum of the rows' hashes. Takes no more memory than a block of rows needs; see `row_hashes`."""
    total = RowSum()
    for begin in range(0, len(keys_R), _BLOCK_ROWS):
        here = slice(begin, begin + _BLOCK_ROWS)
        total = total + sum_of(row_hashes(keys_R[here], *(part[here] for part in parts)))
    return total


def sum_of(hashes_R2: U64s) -> RowSum:
    """Return the sum of these rows' hashes."""
    low, high = _added(hashes_R2)
    return RowSum(len(hashes_R2), int(low), int(high))


def words_of(part: npt.NDArray[np.generic]) -> U32s:
    """Return an array with an entry a row as words: uint32 [R, W]."""
    rows = len(part)
    width = int(np.prod(part.shape[1:], dtype=np.int64))
    if not width:
        return np.empty((rows, 0), np.uint32)
    part = np.ascontiguousarray(part, part.dtype.newbyteorder("<")).reshape(rows, width)
    if part.dtype.itemsize * width % 4:
        return part.view(f"u{part.dtype.itemsize}").astype(np.uint32)
    return part.view(np.uint32)


@numba.njit(cache=True)
def _rotl(value: np.uint64, bits: Int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True)
def _round(a: np.uint64, b: np.uint64, word: np.uint64) -> tuple[np.uint64, np.uint64]:
    # Mixed once for both lanes: no two words are mixed to one, so the lanes alone decide what collides.
    mixed = _rotl(word * _P2, 31) * _P1
    return _rotl(a ^ mixed, 27) * _P1 + _P4, _rotl(b ^ mixed, 41) * _C1 + _C3


@numba.njit(cache=True, nogil=True)
def _begin(keys_R: I64s, hashes_R2: U64s) -> None:
    for i in range(keys_R.shape[0]):
        hashes_R2[i, 0], hashes_R2[i, 1] = _round(_SEED_A, _SEED_B, np.uint64(keys_R[i]))


@numba.njit(cache=True, nogil=True)
def _fold(words_RW: U32s, hashes_R2: U64s) -> None:
    # Rows within words: the rounds of different rows do not wait for each other, and run side by side.
    width = words_RW.shape[1]
    for pair in range(width // 2):
        for i in range(words_RW.shape[0]):
            word = np.uint64(words_RW[i, 2 * pair]) | (np.uint64(words_RW[i, 2 * pair + 1]) << np.uint64(32))
            hashes_R2[i, 0], hashes_R2[i, 1] = _round(hashes_R2[i, 0], hashes_R2[i, 1], word)
    if width % 2:
        for i in range(words_RW.shape[0]):
            word = np.uint64(words_RW[i, width - 1])
            hashes_R2[i, 0], hashes_R2[i, 1] = _round(hashes_R2[i, 0], hashes_R2[i, 1], word)


@numba.njit(cache=True, nogil=True)
def _finish(hashes_R2: U64s) -> None:
    for i in range(hashes_R2.shape[0]):
        a, b = hashes_R2[i, 0], hashes_R2[i, 1]
        a = (a ^ (a >> np.uint64(33))) * _F1
        a = (a ^ (a >> np.uint64(29))) * _F2
        b = (b ^ (b >> np.uint64(33))) * _M1
        b = (b ^ (b >> np.uint64(33))) * _M2
        hashes_R2[i, 0], hashes_R2[i, 1] = a ^ (a >> np.uint64(32)), b ^ (b >> np.uint64(33))


@numba.njit(cache=True, nogil=True)
def _added(hashes_R2: U64s) -> tuple[np.uint64, np.uint64]:
    low = high = np.uint64(0)
    for i in range(hashes_R2.shape[0]):
        low += hashes_R2[i, 0]
        high += hashes_R2[i, 1]
    return low, high
