"""Goal: compiled hashes have the bits of the contract's and of their sources. Method: plain ones beside them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.hashing import mix64
from headrace.kernels.hashes import hash64_texts, hash128_texts, mix, with_numbers

MASK = 2**64 - 1
TEXTS = st.lists(st.text(max_size=80), max_size=5)


@given(TEXTS, st.integers(0, 2**63 - 1), st.integers(0, 2))
def test_64_bits_equal_those_of_the_library(texts: list[str], seed: int, start: int) -> None:
    column = pa.array(texts, pa.string()).slice(min(start, len(texts)))
    wanted = [xxhash.xxh64_intdigest(text.encode(), seed=seed) for text in column.to_pylist()]
    assert hash64_texts(column, seed).tolist() == wanted


@given(TEXTS, st.integers(0, MASK), st.integers(0, 2))
def test_128_bits_equal_those_of_plain_arithmetic(texts: list[str], salt: int, start: int) -> None:
    column = pa.array(texts, pa.string()).slice(min(start, len(texts)))
    assert hash128_texts(column, salt).tolist() == [murmur(text.encode(), salt) for text in column.to_pylist()]


def test_a_null_counts_as_an_empty_text() -> None:
    keys = hash128_texts(pa.array([None, "", "a"]), 7).tolist()
    assert keys[0] == keys[1] != keys[2]


@given(st.lists(st.integers(0, MASK), max_size=20))
def test_integers_are_mixed_as_in_the_contract(values: list[int]) -> None:
    values_N = np.array(values, np.uint64)
    assert [int(mix(value)) for value in values_N] == mix64(values_N).tolist()


def test_keys_of_a_text_and_a_number_differ() -> None:
    keys = with_numbers(hash128_texts(pa.array(["a", "a", "b"]), 0), np.array([0, 1, 0], np.int32))
    assert len({tuple(key) for key in keys.tolist()}) == 3


def murmur(data: bytes, salt: int) -> list[int]:
    """Return MurmurHash3 x64-128. Source: Appleby, SMHasher, `MurmurHash3_x64_128`."""
    c1, c2 = 0x87C37B91114253D5, 0x4CF5AD432745937F

    def rotated(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (64 - bits))) & MASK

    def finalized(value: int) -> int:
        value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & MASK
        value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
        return value ^ (value >> 33)

    one = two = salt
    whole = len(data) - len(data) % 16
    for at in range(0, whole, 16):
        one ^= rotated(int.from_bytes(data[at : at + 8], "little") * c1 & MASK, 31) * c2 & MASK
        one = ((rotated(one, 27) + two) * 5 + 0x52DCE729) & MASK
        two ^= rotated(int.from_bytes(data[at + 8 : at + 16], "little") * c2 & MASK, 33) * c1 & MASK
        two = ((rotated(two, 31) + one) * 5 + 0x38495AB5) & MASK
    two ^= rotated(int.from_bytes(data[whole + 8 :], "little") * c2 & MASK, 33) * c1 & MASK
    one ^= rotated(int.from_bytes(data[whole : whole + 8], "little") * c1 & MASK, 31) * c2 & MASK
    one, two = one ^ len(data), two ^ len(data)
    one = (one + two) & MASK
    two = (two + one) & MASK
    one, two = finalized(one), finalized(two)
    one = (one + two) & MASK
    return [one, (two + one) & MASK]
