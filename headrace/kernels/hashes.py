"""The hash functions of compiled code: XXH64 and MurmurHash3 of texts, SplitMix64 of integers. Pure.

XXH64 decides partitions and samples, MurmurHash3 makes the keys of the join's tables. Both are part of stored formats:
a text has the same hash for ever.

Legend: N rows, S rows and one more, 2 the halves of a key.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.kernels.arrays import I32s, I64s, Int, U8s, U64s

# The primes of XXH64.
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
# The multipliers of MurmurHash3 x64-128 and of its finalizer.
_C1 = np.uint64(0x87C37B91114253D5)
_C2 = np.uint64(0x4CF5AD432745937F)
_M1 = np.uint64(0xFF51AFD7ED558CCD)
_M2 = np.uint64(0xC4CEB9FE1A85EC53)


def hash64_texts(column: pa.Array, seed: int = 0) -> U64s:
    """Return XXH64 of each text of a column without nulls: uint64 [N], the same as `contract.hashing.hash_text`.

    >>> f"{hash64_texts(pa.array(['hello']))[0]:016x}"
    '26c7827d889f6da3'
    """
    hashes_N = np.empty(len(column), np.uint64)
    if len(column):
        _xxh64_all(*_buffers(column), np.uint64(seed), hashes_N)
    return hashes_N


def hash128_texts(column: pa.Array, salt: int) -> U64s:
    """Return 128 bits of each text: uint64 [N, 2], MurmurHash3 x64-128 of its bytes under `salt`.

    Two of 2**32 keys collide with a chance of 3e-20. Nulls count as empty texts.

    >>> [f"{half:016x}" for half in hash128_texts(pa.array(["hello"]), 0)[0]]
    ['cbd8a7b341bd9b02', '5b1e906a48ae1d19']
    """
    keys_N2 = np.empty((len(column), 2), np.uint64)
    if len(column):
        _murmur_all(*_buffers(column), np.uint64(salt), keys_N2)
    return keys_N2


def hash128_integers(values_N: npt.NDArray[np.int64], salt: int) -> U64s:
    """Return `hash128_texts` of the decimal forms of integers: uint64 [N, 2].

    >>> bool((hash128_integers(np.array([-12, 0]), 3) == hash128_texts(pa.array(["-12", "0"]), 3)).all())
    True
    """
    keys_N2 = np.empty((len(values_N), 2), np.uint64)
    _murmur_decimals(values_N, np.uint64(salt), keys_N2)
    return keys_N2


def with_numbers(keys_N2: U64s, numbers_N: npt.NDArray[np.signedinteger]) -> U64s:
    """Return the keys of (text, number) pairs, given the keys of the texts: uint64 [N, 2]."""
    out_N2 = np.empty_like(keys_N2)
    _with_numbers(keys_N2, numbers_N.astype(np.int64).view(np.uint64), out_N2)
    return out_N2


def _buffers(column: pa.Array) -> tuple[U8s, I32s]:
    """Return the bytes of a string column that has rows, and where each text begins: int32 [N + 1]."""
    _, starts, data = column.buffers()
    starts_S = np.frombuffer(starts, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8), starts_S


@numba.njit(cache=True)
def mix(key: np.uint64) -> np.uint64:
    """Return 64 well mixed bits, those of `contract.hashing.mix64`.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = key + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True)
def combine(left: np.uint64, right: np.uint64) -> np.uint64:
    """Return one order-sensitive hash of a pair, that of `contract.hashing.combine64`."""
    return mix(left * np.uint64(0xBF58476D1CE4E5B9) ^ mix(right))


@numba.njit(cache=True)
def _rotl(value: np.uint64, bits: Int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@numba.njit(cache=True)
def _little(data: U8s, at: np.uint64, size: Int) -> np.uint64:
    """Return `size` bytes as an integer, the lowest byte first."""
    value = np.uint64(0)
    for i in range(size):
        value |= np.uint64(data[at + np.uint64(i)]) << np.uint64(8 * i)
    return value


@numba.njit(cache=True)
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotl(acc + lane * _P2, 31) * _P1


@numba.njit(cache=True)
def _xxh64(data: U8s, at: np.uint64, end: np.uint64, seed: np.uint64) -> np.uint64:
    """Return XXH64 of the bytes from `at` up to `end`.

    Source: the xxHash specification, "XXH64 algorithm description".
    """
    size = end - at
    if size >= np.uint64(32):
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + np.uint64(32) <= end:
            a = _round(a, _little(data, at, 8))
            b = _round(b, _little(data, at + np.uint64(8), 8))
            c = _round(c, _little(data, at + np.uint64(16), 8))
            d = _round(d, _little(data, at + np.uint64(24), 8))
            at += np.uint64(32)
        acc = _rotl(a, 1) + _rotl(b, 7) + _rotl(c, 12) + _rotl(d, 18)
        for lane in (a, b, c, d):
            acc = (acc ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        acc = seed + _P5
    acc += size
    while at + np.uint64(8) <= end:
        acc = _rotl(acc ^ _round(np.uint64(0), _little(data, at, 8)), 27) * _P1 + _P4
        at += np.uint64(8)
    if at + np.uint64(4) <= end:
        acc = _rotl(acc ^ (_little(data, at, 4) * _P1), 23) * _P2 + _P3
        at += np.uint64(4)
    while at < end:
        acc = _rotl(acc ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += np.uint64(1)
    acc = (acc ^ (acc >> np.uint64(33))) * _P2
    acc = (acc ^ (acc >> np.uint64(29))) * _P3
    return acc ^ (acc >> np.uint64(32))


@numba.njit(cache=True)
def _xxh64_all(data: U8s, starts_S: I32s, seed: np.uint64, out_N: U64s) -> None:
    for n in range(out_N.shape[0]):
        out_N[n] = _xxh64(data, np.uint64(starts_S[n]), np.uint64(starts_S[n + 1]), seed)


@numba.njit(cache=True)
def _finalized(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> np.uint64(33))) * _M1
    value = (value ^ (value >> np.uint64(33))) * _M2
    return value ^ (value >> np.uint64(33))


@numba.njit(cache=True)
def _murmur_all(data: U8s, starts_S: I32s, salt: np.uint64, out_N2: U64s) -> None:
    """Write MurmurHash3 x64-128 of each text. Source: Appleby, SMHasher, `MurmurHash3_x64_128`."""
    for n in range(out_N2.shape[0]):
        at, end = np.uint64(starts_S[n]), np.uint64(starts_S[n + 1])
        size = end - at
        a, b = salt, salt
        while at + np.uint64(16) <= end:
            a ^= _rotl(_little(data, at, 8) * _C1, 31) * _C2
            a = (_rotl(a, 27) + b) * np.uint64(5) + np.uint64(0x52DCE729)
            b ^= _rotl(_little(data, at + np.uint64(8), 8) * _C2, 33) * _C1
            b = (_rotl(b, 31) + a) * np.uint64(5) + np.uint64(0x38495AB5)
            at += np.uint64(16)
        left = np.int64(end - at)
        if left > 8:
            b ^= _rotl(_little(data, at + np.uint64(8), left - 8) * _C2, 33) * _C1
        if left > 0:
            a ^= _rotl(_little(data, at, 8 if left > 8 else left) * _C1, 31) * _C2
        a ^= size
        b ^= size
        a += b
        b += a
        a, b = _finalized(a), _finalized(b)
        a += b
        b += a
        out_N2[n, 0], out_N2[n, 1] = a, b


@numba.njit(cache=True)
def _murmur_decimals(values_N: I64s, salt: np.uint64, out_N2: U64s) -> None:
    digits = np.empty(20, np.uint8)
    starts_S = np.zeros(2, np.int32)
    for n in range(values_N.shape[0]):
        value = values_N[n]
        # Wraps around for the smallest one too.
        left = np.uint64(0) - np.uint64(value) if value < 0 else np.uint64(value)
        at = 20
        while True:
            at -= 1
            digits[at] = np.uint8(48) + np.uint8(left % np.uint64(10))
            left //= np.uint64(10)
            if left == np.uint64(0):
                break
        if value < 0:
            at -= 1
            digits[at] = 45
        starts_S[0], starts_S[1] = at, 20
        _murmur_all(digits, starts_S, salt, out_N2[n : n + 1])


@numba.njit(cache=True)
def _with_numbers(keys_N2: U64s, numbers_N: U64s, out_N2: U64s) -> None:
    for n in range(keys_N2.shape[0]):
        number = numbers_N[n] + np.uint64(1)
        out_N2[n, 0] = _finalized(keys_N2[n, 0] + number * _C1)
        out_N2[n, 1] = _finalized(keys_N2[n, 1] + number * _C2)
