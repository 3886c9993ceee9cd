"""XXH64, compiled, over bytes that lie in an array: the contract's hash without a Python object a value."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)


@numba.njit(cache=True)
def _rotl(value: np.uint64, bits: int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True)
def _little(data: npt.NDArray[np.uint8], at: int, size: int) -> np.uint64:
    value = np.uint64(0)
    for i in range(size):
        value |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return value


@numba.njit(cache=True)
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotl(acc + lane * _P2, 31) * _P1


@numba.njit(cache=True)
def xxh64(data: npt.NDArray[np.uint8], at: int, size: int, seed: np.uint64) -> np.uint64:
    """Return XXH64 of `size` bytes from `at`. Source: the xxHash specification, "XXH64 algorithm description"."""
    end = at + size
    if size >= 32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + 32 <= end:
            a = _round(a, _little(data, at, 8))
            b = _round(b, _little(data, at + 8, 8))
            c = _round(c, _little(data, at + 16, 8))
            d = _round(d, _little(data, at + 24, 8))
            at += 32
        acc = _rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)
        for lane in (a, b, c, d):
            acc = (acc ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        acc = seed + _P5
    acc += np.uint64(size)
    while at + 8 <= end:
        acc = _rotl(acc ^ _round(np.uint64(0), _little(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= end:
        acc = _rotl(acc ^ (_little(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < end:
        acc = _rotl(acc ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    acc = (acc ^ (acc >> np.uint64(33))) * _P2
    acc = (acc ^ (acc >> np.uint64(29))) * _P3
    return acc ^ (acc >> np.uint64(32))
