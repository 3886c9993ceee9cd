"""Goal: the compiled table says of every key what `counters.value_as_of` says of its buckets, to the bit, whatever came
before. Method: random puts, drops and questions by hypothesis against a dict of buckets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.spec import Counter
from headrace.kernels.hashes import hash128_texts
from headrace.serving.counter_table import CounterTable, salt_of
from headrace.stream.features.counters import value_as_of

FADED = ("click", "sum:order.value", "last:click")
COUNTERS = (
    Counter(name="plain", key="k", counts=("impression", "click"), window_ms=4_000, buckets=4),
    Counter(name="sums", key="k", counts=("click", "sum:order.value"), window_ms=6_000, buckets=3),
    Counter(name="lately", key="k", counts=("last:click", "click"), window_ms=4_000, buckets=4),
    Counter(name="faded", key="k", counts=FADED, window_ms=8_000, buckets=8, half_life_ms=1_500),
)  # fmt: skip
BY_NAME = {counter.name: counter for counter in COUNTERS}
KEYS = [f"k{n}" for n in range(12)] + ["", "a/b", "é"]
amounts = st.integers(0, 900) | st.integers(-(2**60), 2**60) | st.sampled_from([2**53 + 1, 999_999])
# A recency lies within its bucket; what else a foreign record says of one is of no matter here.
buckets = st.dictionaries(st.integers(-3, 14), st.lists(amounts, max_size=3), max_size=6)
actions = st.lists(st.tuples(st.sampled_from(sorted(BY_NAME)), st.sampled_from(KEYS), st.none() | buckets), max_size=40)


def asked(table: CounterTable, counter: Counter, as_of_ms: int) -> np.ndarray:
    keys_N2 = hash128_texts(pa.array(KEYS), salt_of(counter.name))
    return table.values(counter, keys_N2, np.ones(len(KEYS), np.bool_), as_of_ms)


def expected(known: dict[Any, Any], counter: Counter, as_of_ms: int) -> list[list[float]]:
    rows = []
    for key in KEYS:
        held, width = known.get((counter.name, key), {}), len(counter.counts)
        fitted = {bucket: (entries + [0] * width)[:width] for bucket, entries in held.items()}
        rows.append([float(value) for value in value_as_of(fitted, counter, as_of_ms)])
    return rows


@given(actions, st.lists(st.integers(0, 16_000), min_size=1, max_size=3))
@settings(max_examples=60)
def test_the_table_says_what_the_buckets_say(told: list[Any], times: list[int]) -> None:
    table, known = CounterTable(), {}
    for name, key, held in told:
        if held is None:
            table.drop(f"{name}/{key}")
            known.pop((name, key), None)
        else:
            table.put(f"{name}/{key}", held)
            known[name, key] = held
    assert len(table) == len(known)
    for as_of_ms in times:
        for counter in COUNTERS:
            found, wanted = asked(table, counter, as_of_ms), np.array(expected(known, counter, as_of_ms))
            assert found.tobytes() == wanted.tobytes(), (counter.name, as_of_ms)


def test_it_grows_and_uses_again_what_is_left() -> None:
    table, counter = CounterTable(), BY_NAME["plain"]
    for turn in range(3):
        for n in range(5_000):
            table.put(f"plain/{n}", {b: [n, turn] for b in range(n % 4)})
        for n in range(0, 5_000, 2):
            table.drop(f"plain/{n}")
    rows, words = len(table.arrays.keys_R2), len(table.arrays.arena_A)
    for n in range(0, 5_000, 2):
        table.put(f"plain/{n}", {b: [n, 9] for b in range(n % 4)})
    assert (len(table.arrays.keys_R2), len(table.arrays.arena_A)) == (rows, words) and len(table) == 5_000
    keys_N2 = hash128_texts(pa.array([str(n) for n in range(5_000)]), salt_of("plain"))
    found = table.values(counter, keys_N2, np.ones(5_000, np.bool_), 3_999)
    assert found[:, 0].tolist() == [float(n * (n % 4)) for n in range(5_000)]


@pytest.mark.parametrize("bad", [{2**63: [1]}, {1: [2**64]}, {-(2**70): []}])
def test_a_number_beyond_64_bits_is_refused_and_changes_nothing(bad: dict[int, list[int]]) -> None:
    table = CounterTable()
    table.put("plain/k0", {1: [5, 2]})
    for name in ("plain/k0", "plain/k1"):
        with pytest.raises(ValueError, match="more than 64 bits"):
            table.put(name, bad)
    assert asked(table, BY_NAME["plain"], 3_000)[:2].tolist() == [[5.0, 2.0], [0.0, 0.0]] and len(table) == 1
