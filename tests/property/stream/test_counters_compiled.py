"""Goal: compiled counters give the bits of the plain ones. Method: random events of each kind through both."""

from __future__ import annotations

from random import Random

import numpy as np
import pyarrow as pa
import pytest

from headrace.contract.formats.events import AGGREGATE_SCHEMA, batch_from_rows
from headrace.contract.spec import Counter
from headrace.kernels.hashes import hash128_texts
from headrace.stream.features.counters import CounterState, aged, amounts, feeds
from headrace.stream.join.aggregate_lookup import AggregateLookup
from headrace.stream.join.local_counters import LocalCounter

ENTRIES = ("buy", "impression", "sum:buy.value", "last:buy", "last:impression", "sum:impression.value")
COUNTERS = [
    Counter(name="plain", key="k", counts=("impression", "buy"), window_ms=1_000, buckets=10),
    Counter(name="all", key="k", counts=ENTRIES, window_ms=1_000, buckets=10),
    Counter(name="decayed", key="k", counts=ENTRIES, window_ms=1_000, buckets=64, half_life_ms=130),
    Counter(name="one", key="k", counts=("last:buy", "sum:buy.value"), window_ms=3, buckets=1),
]


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(5))
def test_the_table_gives_the_bits_of_the_state(counter, seed):
    random, plain, table, now = Random(seed), CounterState(counter), LocalCounter(counter), 0
    for step in range(150):
        now += random.randrange(60)
        name = random.choice(["impression", "buy"])
        rows = random.randrange(1, 6)
        keys = [random.choice(["a", "b", "c", "日本"]) for _ in range(rows)]
        times = [max(0, now + random.randrange(-400, 200)) for _ in range(rows)]
        values = [random.choice([None, float("nan"), 1e300, 0.1, -2.5, random.uniform(-1e6, 1e6)]) for _ in range(rows)]
        batch = pa.RecordBatch.from_pydict({"value": pa.array(values, pa.float64())})
        fed = feeds(counter, name)
        amounts_FN = np.array([amounts(feed, batch) for feed in fed], np.int64).reshape(len(fed), rows)
        present = np.array([random.random() < 0.9 for _ in keys])
        found = table.take(hash128_texts(pa.array(keys), 0), present, np.array(times), fed, amounts_FN, read=True)
        for row, (key, time_ms) in enumerate(zip(keys, times, strict=True)):
            if not present[row]:
                assert not found[row].any()
                continue
            assert found[row].tolist() == [float(v) for v in plain.value(key, time_ms)]
            for f, feed in enumerate(fed):
                plain.add(key, feed.entry, time_ms, int(amounts_FN[f, row]))
        if random.random() < 0.2:
            plain.advance(now)
            table.advance(now)
        if step % 50 == 49:
            again = LocalCounter(counter)
            again.load(table.floor, [table.rows(changed=False)])
            table = again


@pytest.mark.parametrize("counter", COUNTERS, ids=lambda c: c.name)
def test_what_the_join_reads_of_the_aggregator_ages_as_told(counter):
    random, other = Random(7), Counter(name="other", key="k", counts=("buy",))
    aggregates, known = AggregateLookup([other, counter]), {}
    for as_of_ms in range(0, 6_000, 50):
        key = random.choice("ab")
        values = [random.choice([0.0, float(random.randrange(1, 900))]) for _ in counter.counts]
        row = {"counter": counter.name, "key": key, "as_of_ms": as_of_ms, "epoch": 1, "counts": values}
        aggregates.take(batch_from_rows([row], AGGREGATE_SCHEMA))
        known[key] = as_of_ms, tuple(values)
        for passed_ms in (0, 1, 99, 100, 640, 2_000):
            found = aggregates.values(counter, pa.array(["a", "b", None]), np.array([as_of_ms + passed_ms] * 3))
            for i, asked in enumerate("ab"):
                at_ms, held = known.get(asked, (0, (0.0,) * len(counter.counts)))
                assert found[i].tolist() == list(aged(counter, held, at_ms, as_of_ms + passed_ms))
            assert not found[2].any()
