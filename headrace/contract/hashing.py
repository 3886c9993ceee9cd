"""The two hashes that all stages share: key to partition, value to slot id.

Both are part of the stored format: changing one is a new generation of topics (partition) or a new
feature-spec digest (slots).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

U64 = np.uint64
_GOLDEN = U64(0x9E3779B97F4A7C15)
_MIX1 = U64(0xBF58476D1CE4E5B9)
_MIX2 = U64(0x94D049BB133111EB)


def hash_text(text: str | bytes, *, salt: int = 0) -> int:
    """Return the 64-bit XXH64 of `text` (UTF-8) under `salt`, as an unsigned integer."""
    data = text.encode() if isinstance(text, str) else text
    return xxhash.xxh64_intdigest(data, seed=salt)


def partition_of(key: str, partitions: int) -> int:
    """Return the partition that owns `key`: XXH64 modulo the count of partitions.

    Every producer gives this number explicitly, because Kafka clients' default partitioners differ.

    >>> partition_of("42", 4) == partition_of("42", 4)
    True
    """
    return hash_text(key) % partitions


def mix64(values_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's finalizer of every value: uint64 [N] to uint64 [N], a bijection.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        z = values_N + _GOLDEN
        z = (z ^ (z >> U64(30))) * _MIX1
        z = (z ^ (z >> U64(27))) * _MIX2
        return z ^ (z >> U64(31))


def combine64(left_N: npt.NDArray[np.uint64], right_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return one order-sensitive 64-bit hash of each pair: uint64 [N] x uint64 [N] to uint64 [N]."""
    with np.errstate(over="ignore"):
        return mix64(left_N * _MIX1 ^ mix64(right_N))
