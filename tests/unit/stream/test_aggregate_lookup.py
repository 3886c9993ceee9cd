"""Goal: a partition uses the newest value not after the impression, and no value of a fenced-off aggregator.
Method: small examples."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.contract.formats.events import AGGREGATE_SCHEMA
from headrace.contract.spec import Counter
from headrace.stream.join.aggregate_lookup import AggregateLookup

ITEM = Counter(name="item", key="item", counts=("click",), window_ms=800, buckets=4)


def told(*rows: tuple[str, int, int, float]) -> pa.RecordBatch:
    """Return rows of (key, as_of_ms, epoch, clicks) as the aggregator writes them."""
    return pa.RecordBatch.from_pylist(
        [{"counter": "item", "key": k, "as_of_ms": t, "epoch": e, "counts": [c]} for k, t, e, c in rows],
        schema=AGGREGATE_SCHEMA,
    )


def clicks(known: AggregateLookup, key: str, *times: int) -> list[float]:
    values_NE = known.values(ITEM, pa.array([key] * len(times)), np.array(times, np.int64))
    return [float(value) for value in values_NE[:, 0]]


def test_the_newest_value_not_after_the_impression_counts():
    known = AggregateLookup([ITEM])
    known.take(told(("7", 100, 1, 2.0), ("7", 200, 1, 5.0), ("8", 200, 1, 9.0)))
    assert clicks(known, "7", 99, 100, 199, 200, 900) == [0.0, 2.0, 2.0, 5.0, 5.0]
    assert clicks(known, "9", 900) == [0.0]


def test_a_declared_dead_aggregator_that_writes_on_is_not_heard():
    known = AggregateLookup([ITEM])
    known.take(told(("7", 100, 3, 2.0)))
    known.take(told(("7", 200, 2, 77.0), ("8", 200, 2, 77.0)))
    assert clicks(known, "7", 200) == [2.0]
    assert clicks(known, "8", 200) == [0.0]
    known.take(told(("7", 200, 4, 3.0)))
    known.take(told(("7", 300, 3, 77.0)))
    assert clicks(known, "7", 300) == [3.0]


def test_a_restarted_aggregator_says_again_what_it_said():
    known = AggregateLookup([ITEM])
    known.take(told(("7", 100, 1, 2.0), ("7", 200, 1, 5.0)))
    known.take(told(("7", 100, 2, 2.0)))
    assert clicks(known, "7", 100, 250) == [2.0, 2.0]
    known.take(told(("7", 200, 2, 5.0)))
    assert clicks(known, "7", 100, 250) == [2.0, 5.0]


def test_a_key_at_zero_is_forgotten_when_the_watermark_has_passed():
    known = AggregateLookup([ITEM])
    known.take(told(("7", 100, 1, 2.0), ("7", 900, 1, 0.0), ("8", 900, 1, 1.0)))
    before = known.to_plain()
    known.advance(899)
    assert clicks(known, "7", 150) == [2.0]
    known.advance(900)
    assert clicks(known, "7", 150, 1_000) == [0.0, 0.0]
    assert clicks(known, "8", 1_000) == [1.0]
    assert known.to_plain() != before
