"""SipHash-2-4: 64 bits that only who has the key can make of a message; made for short ones. Compiled, pure.

Source: Aumasson, Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012.
"""

from __future__ import annotations

import numba
import numpy as np

from headrace.kernels.arrays import Int, U8s


@numba.njit(cache=True)
def siphash(data: U8s, at: Int, end: Int, low: np.uint64, high: np.uint64) -> np.uint64:
    """Return SipHash-2-4 of the bytes from `at` up to `end`, under the key whose halves are `low` and `high`."""
    a = low ^ np.uint64(0x736F6D6570736575)
    b = high ^ np.uint64(0x646F72616E646F6D)
    c = low ^ np.uint64(0x6C7967656E657261)
    d = high ^ np.uint64(0x7465646279746573)
    size = end - at
    blocks = size // 8
    for block in range(blocks + 1):
        first = at + 8 * block
        word = np.uint64(0) if block < blocks else np.uint64(size & 0xFF) << np.uint64(56)
        for i in range(8 if block < blocks else size - 8 * blocks):
            word |= np.uint64(data[first + i]) << np.uint64(8 * i)
        d ^= word
        for _ in range(2):
            a, b, c, d = _rounded(a, b, c, d)
        a ^= word
    c ^= np.uint64(0xFF)
    for _ in range(4):
        a, b, c, d = _rounded(a, b, c, d)
    return a ^ b ^ c ^ d


@numba.njit(cache=True)
def _rotl(value: np.uint64, bits: Int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True)
def _rounded(
    a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    a += b
    b = _rotl(b, 13) ^ a
    a = _rotl(a, 32)
    c += d
    d = _rotl(d, 16) ^ c
    a += d
    d = _rotl(d, 21) ^ a
    c += b
    b = _rotl(b, 17) ^ c
    c = _rotl(c, 32)
    return a, b, c, d
