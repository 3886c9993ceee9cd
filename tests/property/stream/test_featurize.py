"""Goal: the featurizer depends on a row alone. Method: random batches, cut anywhere, must give the same bits."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.spec import Bucket, Categorical, Counter, Cross, FeatureSpec, Numeric, Rate
from headrace.stream.features.featurize import featurize

SPEC = FeatureSpec(
    counters=(Counter(name="item", key="item"),),
    features=(
        Categorical(field="item"),
        Categorical(field="city"),
        Categorical(field="member"),
        Categorical(field="price"),
        Bucket(field="price", edges=(1.0, 10.0)),
        Cross(fields=("item", "city")),
        Numeric(field="price", scale=0.5),
        Numeric(field="item", transform="identity"),
        Rate(of="counter.item.click", over="counter.item.impression"),
    ),
)
SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("city", pa.string()),
        ("member", pa.bool_()),
        ("price", pa.float64()),
        ("counter.item.impression", pa.float32()),
        ("counter.item.click", pa.float32()),
    ]
)
ROW = st.fixed_dictionaries(
    {
        "item": st.none() | st.integers(-(2**50), 2**50),
        "city": st.none() | st.text(max_size=8),
        "member": st.none() | st.booleans(),
        "price": st.none() | st.floats(allow_infinity=False, width=32),
        "counter.item.impression": st.none() | st.integers(0, 10**6).map(float),
        "counter.item.click": st.none() | st.integers(0, 10**6).map(float),
    }
)


@given(st.lists(ROW, max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_any_cut_gives_the_same_bits(rows, cuts):
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
    slots_NF, numeric_ND = featurize(batch, SPEC)
    edges = sorted({0, len(rows), *(c for c in cuts if c < len(rows))})
    parts = [featurize(batch.slice(a, b - a), SPEC) for a, b in itertools.pairwise(edges)]
    if parts:
        assert np.concatenate([s for s, _ in parts]).tobytes() == slots_NF.tobytes()
        assert np.concatenate([n for _, n in parts]).tobytes() == numeric_ND.tobytes()
    assert slots_NF.shape == (len(rows), 6) and numeric_ND.shape == (len(rows), 4)
    assert not np.isin(slots_NF, (0, -1)).any()


def test_golden_slots_and_numbers():
    rows = [
        {
            "item": 7,
            "city": "Łódź",
            "member": True,
            "price": 10.0,
            "counter.item.impression": 3.0,
            "counter.item.click": 1.0,
        },
        dict.fromkeys(SCHEMA.names),
    ]
    slots_NF, numeric_ND = featurize(pa.RecordBatch.from_pylist(rows, schema=SCHEMA), SPEC)
    assert slots_NF.tolist() == GOLDEN_SLOTS
    np.testing.assert_array_equal(numeric_ND, np.array(GOLDEN_NUMERIC, dtype=np.float32))


GOLDEN_SLOTS: list[list[int]] = [
    [
        -4079222283183429289,
        -9032656745708022713,
        -5959680263890611297,
        -2998452345967760238,
        -4063280281001478235,
        -2393699598974904769,
    ],
    [
        -7640003555064185278,
        -4254400708520660552,
        2434049334978655607,
        -5394578314671586320,
        8531134249672206289,
        2689482537080147198,
    ],
]
GOLDEN_NUMERIC: list[list[float]] = [[1.1989477, 7.0, 0.46153846, 1.3862944], [0.0, 0.0, 0.5, 0.0]]
