"""Goal: every aggregate is what the events before it give. Method: random logs, every kind of entry, counted twice.

The aggregator's own columns against a plain second count (replay/ledger/settled.py); then values are tampered with.
"""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pytest

from headrace.contract.config import AggregateConfig, Config, LogConfig
from headrace.contract.formats.events import (
    AGGREGATE,
    AGGREGATE_SCHEMA,
    Punctuation,
    batch_from_rows,
    decode_batch,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec
from headrace.replay.ledger.settled import check_settled
from headrace.stream.aggregate.core import AggregatorState

GRID_MS, PARTITIONS = 100, 2
COUNTS = ("impression", "click", "sum:click.price", "last:click")
PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64", "shop": "string"}),
    feedback=(FeedbackType(name="click", tag="c", fields={"item": "int64", "shop": "string", "price": "float64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=500),),
    features=FeatureSpec(
        counters=(
            Counter(name="item", key="item", counts=COUNTS, window_ms=800, buckets=4),
            Counter(name="trend", key="item", counts=COUNTS[:3], window_ms=600, buckets=6, half_life_ms=200),
            Counter(name="shop", key="shop", counts=COUNTS[:2], window_ms=450, buckets=3),
            Counter(name="pair", key=("item", "shop"), counts=COUNTS[:3], window_ms=500, buckets=5),
            Counter(name="user_item", key=("user", "item"), counts=COUNTS[:2], window_ms=800, buckets=4),
            Counter(name="user", key="user", counts=("impression",), window_ms=800, buckets=4),
        ),
        features=(Categorical(field="item"),),
    ),
).checked()
CONFIG = Config(log=LogConfig(partitions=PARTITIONS), aggregate=AggregateConfig(grid_ms=GRID_MS))
SCHEMAS = {"impression": impression_schema(PROJECT), "click": feedback_schema(PROJECT, PROJECT.feedback[0])}


def arrivals(seed: int) -> list[Record]:
    """Return both partitions' events in one order of arrival: late rows, repeats, missing keys, silences."""
    random, made = Random(seed), list[Record]()
    now, offsets, sent = 10_000, [0] * PARTITIONS, list[tuple[str, dict]]()

    def append(partition: int, value: bytes, **headers: str) -> None:
        made.append(Record("events", partition, offsets[partition], None, value, headers, 0))
        offsets[partition] += 1

    for n in range(220):
        now += random.randrange(0, 20) if random.random() < 0.97 else 1_500
        partition = random.randrange(PARTITIONS)
        if random.random() < 0.35:
            told = Punctuation("g", 1, now - random.randrange(60))
            append(partition, encode_punctuation(told), kind="punctuation")
            continue
        kind = random.choice(["impression", "impression", "click"])
        row = {"event_id": f"{kind}{n}", "request_id": f"r{n}", "place": 0, "key": "1"}
        row |= {"event_time_ms": now - random.randrange(-30, 300), "user": 1, "item": random.randrange(4)}
        row |= {"shop": random.choice(["a", "b", None]), "price": random.randrange(1_000) / 8}
        if sent and random.random() < 0.1:
            kind, row = random.choice(sent)
        sent.append((kind, row))
        value = encode_batch(batch_from_rows([row], SCHEMAS[kind]))
        append(partition, value, **({"kind": kind} if kind == "impression" else {"kind": "feedback", "type": kind}))
    for step in range(25):
        for partition in range(PARTITIONS):
            append(partition, encode_punctuation(Punctuation("g", 1, now + 400 + 100 * step)), kind="punctuation")
    return made


def aggregated(events: list[Record]) -> list[Record]:
    """Return the events with the aggregator's values behind them, as it writes them into every partition."""
    state = AggregatorState(
        PROJECT, PARTITIONS, grid_ms=GRID_MS, silent_ms=CONFIG.ingest.silent_ms, horizon_ms=3_600_000
    )
    values = list[Record]()
    for record in events:
        settled = [s for s in state.take(record) if s.is_shared]
        if settled:
            rows = [{"counter": s.counter, "key": s.key, "as_of_ms": s.as_of_ms, "epoch": 1} for s in settled]
            counts = [{**row, "counts": s.counts} for row, s in zip(rows, settled, strict=True)]
            value = encode_batch(pa.RecordBatch.from_pylist(counts, schema=AGGREGATE_SCHEMA))
            values += [Record("events", p, 0, None, value, {"kind": AGGREGATE}, 0) for p in range(PARTITIONS)]
    return [*events, *values]


@pytest.mark.parametrize("seed", range(12))
def test_every_value_is_what_the_events_give(seed):
    found = check_settled(PROJECT, CONFIG, aggregated(arrivals(seed)))
    assert found.closes(), found
    assert found.values > 400


def test_a_partition_keeps_what_has_its_key_and_the_aggregator_tells_the_rest():
    told = [decode_batch(r.value or b"", AGGREGATE_SCHEMA) for r in aggregated(arrivals(1))[-40:]]
    pairs = {row["key"] for batch in told for row in batch.to_pylist() if row["counter"] == "pair"}
    assert {row["counter"] for batch in told for row in batch.to_pylist()} == {"item", "trend", "shop", "pair"}
    # A row without a shop has no such key.
    assert pairs <= {f"{item}:{shop}" for item in range(4) for shop in "ab"} and len(pairs) > 3


def test_a_changed_a_missing_and_a_needless_value_are_found():
    log = aggregated(arrivals(1))
    at = next(i for i in range(len(log) - 1, 0, -1) if log[i].headers["kind"] == AGGREGATE)
    (row, *others) = decode_batch(log[at].value or b"", AGGREGATE_SCHEMA).to_pylist()

    def told(*rows: dict) -> list[Record]:
        value = encode_batch(pa.RecordBatch.from_pylist(list(rows), schema=AGGREGATE_SCHEMA))
        return [*log[:at], Record("events", log[at].partition, 0, None, value, {"kind": AGGREGATE}, 0), *log[at + 1 :]]

    changed = check_settled(PROJECT, CONFIG, told({**row, "counts": [c + 1 for c in row["counts"]]}, *others))
    assert (changed.wrong, changed.missing, changed.undue) == (1, 0, 0)
    missing = check_settled(PROJECT, CONFIG, told(*others))
    assert (missing.wrong, missing.missing, missing.undue) == (0, 1, 0)
    again = check_settled(PROJECT, CONFIG, told(row, {**row, "epoch": 2}, *others))
    assert again.closes()
    later = {**row, "as_of_ms": row["as_of_ms"] + 7 * GRID_MS}
    assert check_settled(PROJECT, CONFIG, told(row, later, *others)).undue == 1
