"""Goal: an impression finds of a shared counter what lies before its own time, aged as a live one is. Method: a few
events on and beside points of the grid; and the join's own look-up as the oracle of ageing."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from headrace.contract.config import AggregateConfig, Config, LogConfig
from headrace.contract.formats.events import AGGREGATE_SCHEMA, encode_batch, impression_schema
from headrace.contract.project import ImpressionType, Project
from headrace.contract.spec import Counter, FeatureSpec
from headrace.stream.history.shared_counters import SharedCounters, aged
from headrace.stream.join.aggregate_lookup import AggregateLookup

CONFIG = Config(log=LogConfig(partitions=2), aggregate=AggregateConfig(grid_ms=1_000))


def project(**counter: object) -> Project:
    declared = Counter(name="item", key="item", window_ms=60_000, buckets=6, **counter)  # type: ignore[arg-type]
    impression = ImpressionType(tag="t", key="user", fields={"user": "int64", "item": "int64"})
    return Project(impression=impression, feedback=(), tasks=(), features=FeatureSpec(counters=(declared,)))


def impressions(of: Project, times_ms: list[int]) -> pa.RecordBatch:
    rows = [
        {"event_id": f"i{t}", "request_id": f"r{t}", "place": 0, "key": "1", "event_time_ms": t, "user": 1, "item": 7}
        for t in times_ms
    ]
    return pa.RecordBatch.from_pylist(rows, schema=impression_schema(of))


def test_an_impression_on_a_point_of_the_grid_does_not_count_itself() -> None:
    ours = project(counts=("impression",))
    counters, found = SharedCounters(ours, CONFIG), []
    for first, times in ((10_000, [10_500, 11_000, 11_000, 11_001]), (12_000, [13_000, 13_001])):
        batch = impressions(ours, times)
        records = [(0, {"kind": "impression"}, encode_batch(batch))]
        settled = counters.settle(records, first, times[-1] // 1_000 * 1_000 + 1_000)
        found += counters.with_values(batch, settled)["counter.item.impression"].to_pylist()
    # Equal ids count once.
    assert found == [0.0, 0.0, 0.0, 2.0, 3.0, 4.0]


LASTS = {"counts": ("impression", "last:impression")}
FADING = {"counts": ("impression",), "half_life_ms": 9_000}


@pytest.mark.parametrize("counter", [LASTS, FADING])
def test_values_age_as_the_joins_look_up_ages_them(counter: dict[str, object]) -> None:
    ours = project(**counter)
    declared = ours.features.counters[0]
    lookup = AggregateLookup([declared])
    value = [3.0, 4_200.0][: len(declared.counts)]
    row = {"counter": "item", "key": "7", "as_of_ms": 100_000, "epoch": 1, "counts": value}
    lookup.take(pa.RecordBatch.from_pylist([row], schema=AGGREGATE_SCHEMA))
    time_N = np.array([100_001, 104_999, 112_000, 151_000, 163_000, 500_000], np.int64)
    wanted = lookup.values(declared, pa.array(["7"] * len(time_N)), time_N)
    value_NE = np.repeat([np.float32(value).astype(np.float64)], len(time_N), axis=0)
    assert (aged(declared, value_NE, np.full(len(time_N), 100_000), time_N) == wanted).all()
