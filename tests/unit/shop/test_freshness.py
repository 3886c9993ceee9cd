"""The shop's freshness gauge.

Goal: each click is measured once, to the first answer that contains it, whatever order the topics are read in.
Method: hand-made records in both orders under a virtual clock.
"""

from __future__ import annotations

import pyarrow as pa
import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.sample import IDENTITY
from headrace.contract.formats.steps import Step, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.examples.shop.freshness import Freshness


def sample(offset: int, feedback: str | None) -> Record:
    row = {"partition": 1, "offset": offset, "rank": 0, "event_id": f"i{offset}", "task": "t", "feedback_id": feedback}
    schema = pa.schema([*IDENTITY, pa.field("feedback_id", pa.string())])
    value = encode_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    return Record("samples", 1, offset, None, value, {"after": f"{offset - 1}:0", "last": f"{offset}:0"}, 0)


def step(number: int, offset: int) -> Record:
    made = Step(model="m", run="r", step=number, ranges=(), positions={"1": [offset, 0]})
    return Record("steps", 0, number, None, encode_step(made), {}, 0)


@pytest.mark.parametrize("samples_first", [True, False])
def test_a_click_is_measured_to_the_first_answer_that_contains_it(samples_first: bool):
    clock, seen = VirtualClock(), list[float]()

    class Metrics(MemoryMetrics):
        def observe(self, name: str, value: float) -> None:  # type: ignore[override]
            seen.append(round(value, 3))

    freshness = Freshness(Topics(), Metrics(), clock)
    for second in range(3):
        freshness.clicked(f"c{second}")
        clock.advance(1.0)
    samples = [sample(10, "c0"), sample(11, None), sample(12, "c1"), sample(20, "c2"), sample(21, "not ours")]
    if samples_first:
        freshness.take(samples)
    for number, offset in ((1, 9), (2, 12), (3, 13)):
        freshness.answered(f"r-{number}")
        freshness.take([step(number, offset)])
        freshness.answered(f"r-{number}")
        clock.advance(0.5)
    if not samples_first:
        freshness.take(samples)
    assert sorted(seen) == [2.5, 3.5]
    freshness.answered("r-4")
    freshness.take([])
    freshness.take([step(4, 30)])
    assert sorted(seen) == [2.5, 2.5, 3.5]


def test_a_record_that_is_not_ours_is_counted_and_the_next_one_measured():
    clock, metrics = VirtualClock(), MemoryMetrics()
    freshness = Freshness(Topics(), metrics, clock)
    freshness.clicked("c")
    foreign = pa.RecordBatch.from_pydict({"other": [1]})
    freshness.take([Record("samples", 1, n, None, v, {}, 0) for n, v in enumerate((b"x", b"", encode_batch(foreign)))])
    freshness.take([Record("steps", 0, 0, None, b"no step", {}, 0), step(1, 12)])
    freshness.answered("r-1")
    freshness.take([sample(10, "c")])
    assert metrics.total("records_unreadable_total") == 4
    assert metrics.observations["freshness_seconds"] == [0.0]
