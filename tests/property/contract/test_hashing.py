"""Goal: hashes are stable for ever and spread well. Method: golden values and random inputs."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.hashing import combine64, hash_text, mix64, partition_of


def test_golden_values_that_stored_data_depends_on() -> None:
    assert hash_text("42") == hash_text(b"42") == 0x6DE6F5D076D742B9
    assert mix64(np.array([0, 1, 2**64 - 1], np.uint64)).tolist() == [
        16294208416658607535,
        10451216379200822465,
        16490336266968443936,
    ]


@given(st.text(), st.integers(1, 256))
def test_a_key_has_one_partition(key: str, partitions: int) -> None:
    assert 0 <= partition_of(key, partitions) < partitions
    assert partition_of(key, partitions) == partition_of(key, partitions)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50, unique=True))
def test_mixing_is_a_bijection_and_order_matters(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert len(set(mix64(array).tolist())) == len(values)
    assert combine64(array[:1], array[1:2]) != combine64(array[1:2], array[:1])
