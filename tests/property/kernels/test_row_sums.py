"""Goal: a sum of row hashes is of the set of rows, whatever their order and however it is put together; one other bit
gives another sum. Method: random rows against a plain loop, and golden values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.row_sums import RowSum, row_hashes, row_sum, sum_of

MASK = 2**64 - 1
P1, P2, P4 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x85EBCA77C2B2AE63


def rotl(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & MASK


def plain(key: int, words: list[list[int]]) -> tuple[int, int]:
    """Both hashes of a row in Python's integers."""
    a, b = 0x2545F4914F6CDD1D, 0x9FB21C651E98DF25
    pairs = [key & MASK]
    for part in words:
        pairs += [part[j] | (part[j + 1] << 32) for j in range(0, len(part) - 1, 2)] + part[len(part) & ~1 :]
    for word in pairs:
        mixed = (rotl((word * P2) & MASK, 31) * P1) & MASK
        a = (rotl(a ^ mixed, 27) * P1 + P4) & MASK
        b = (rotl(b ^ mixed, 41) * 0x87C37B91114253D5 + 0x52DCE72938495AB5) & MASK
    a = ((a ^ (a >> 33)) * P2) & MASK
    a = ((a ^ (a >> 29)) * 0x165667B19E3779F9) & MASK
    b = ((b ^ (b >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    b = ((b ^ (b >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return a ^ (a >> 32), b ^ (b >> 33)


def rows(seed: int, count: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**63), 2**63 - 1, count)
    return keys, rng.normal(size=(count, width)).astype(np.float32), rng.integers(0, 2**32, count).astype(np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(0, 40), st.integers(0, 7))
def test_hashes_are_those_of_a_plain_loop(seed: int, count: int, width: int):
    keys, values, used = rows(seed, count, width)
    words = values.view(np.uint32).reshape(count, width)
    expected = [plain(int(k), [v.tolist(), [int(u)]]) for k, v, u in zip(keys, words, used, strict=True)]
    found = row_hashes(keys, values, used)
    assert found.tolist() == [list(pair) for pair in expected]
    low, high = (sum(pair[i] for pair in expected) & MASK for i in (0, 1))
    assert row_sum(keys, values, used) == RowSum(count, low, high)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9_000), st.data())
def test_order_and_parts_do_not_matter_and_a_bit_does(seed: int, count: int, data: st.DataObject):
    keys, values, used = rows(seed, count, 5)
    whole = row_sum(keys, values, used)
    order = np.random.default_rng(seed).permutation(count)
    assert row_sum(keys[order], values[order], used[order]) == whole
    cut = data.draw(st.integers(0, count))
    head, tail = (row_sum(keys[at], values[at], used[at]) for at in (slice(cut), slice(cut, None)))
    assert head + tail == whole and whole - tail == head
    row, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 31))
    for array in (keys, values[:, data.draw(st.integers(0, 4))], used):
        changed = array.view(np.uint32 if array.dtype.itemsize == 4 else np.uint64)
        changed[row] ^= changed.dtype.type(1 << bit)
        found = row_sum(keys, values, used)
        assert found != whole and found.low != whole.low and found.high != whole.high
        changed[row] ^= changed.dtype.type(1 << bit)
    assert row_sum(keys, values, used) == whole


def test_values_that_change_places_between_rows_change_the_sum():
    keys, values, used = rows(1, 10, 4)
    swapped = values[[1, 0, *range(2, 10)]]
    assert row_sum(keys, values, used) != row_sum(keys, swapped, used)
    assert row_sum(keys, np.zeros((10, 4), np.float32)) != row_sum(keys, np.full((10, 4), -0.0, np.float32))


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.bool_, np.int64, ">f4"])
def test_any_type_has_words(kind: str):
    keys, values = np.arange(1, 9), np.arange(24).reshape(8, 3).astype(kind)
    other = values.copy()
    other[3, 1] = 0 if other[3, 1] else 1
    assert row_sum(keys, values) != row_sum(keys, other)
    assert row_sum(keys, values) == row_sum(keys, values.astype(np.dtype(kind).newbyteorder("<")))


def test_hashes_are_the_same_for_ever():
    keys, values = np.array([1, -2, 2**62], np.int64), np.array([[0.5, 1.0, -2.0]] * 3, np.float32)
    assert row_sum(keys, values).text == GOLDEN
    assert sum_of(row_hashes(keys[:0], values[:0])) == RowSum()


GOLDEN = "3.83662e18b830bbe40c6bfb4b1d680926"
