"""Goal: settled values do not depend on how partitions are read in turn, nor on crashes. Method: random merges."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from headrace.contract.events import Punctuation, batch_from_rows, encode_batch, encode_punctuation, impression_schema
from headrace.contract.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, FeatureSpec
from headrace.stream.aggregator import AggregatorState, Settled

PROJECT = Project(
    impression=ImpressionType(tag="i", key="user", fields={"user": "int64", "item": "int64"}),
    feedback=(FeedbackType(name="click", tag="c", fields={"item": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=500),),
    features=FeatureSpec(
        counters=(Counter(name="i", key="item", counts=("impression",), window_ms=800, buckets=4),),
        features=(Categorical(field="item"),),
    ),
).checked()
SCHEMA = impression_schema(PROJECT)


def logs(seed: int) -> list[list[Record]]:
    random, made = Random(seed), [[], []]
    for partition, log in enumerate(made):
        now = 10_000
        log.append(Record("events", partition, 0, None, _time(now), {"kind": "punctuation"}, 0))
        for n in range(1, 120):
            now += random.randrange(0, 25)
            if random.random() < 0.4:
                value, kind = _time(now), "punctuation"
            else:
                row = {"event_id": f"{partition}.{n}", "request_id": "r", "place": n, "key": "1", "user": 1}
                row |= {"event_time_ms": now - random.randrange(40), "item": random.randrange(6)}
                value, kind = encode_batch(batch_from_rows([row], SCHEMA)), "impression"
            log.append(Record("events", partition, n, None, value, {"kind": kind}, 0))
        for step in range(1, 16):
            end = Record("events", partition, 119 + step, None, _time(14_000 + 100 * step), {"kind": "punctuation"}, 0)
            log.append(end)
    return made


def _time(now: int) -> bytes:
    return encode_punctuation(Punctuation("g", 1, now))


def fresh() -> AggregatorState:
    return AggregatorState(PROJECT, 2, grid_ms=100, silent_ms=1_000, horizon_ms=100_000)


def settle(made: list[list[Record]], random: Random, *, crash: bool) -> list[Settled]:
    state, at, stored = fresh(), [0, 0], None
    newest: dict[tuple[str, str, int], Settled] = {}
    while any(at[p] < len(made[p]) for p in (0, 1)):
        p = random.choice([p for p in (0, 1) if at[p] < len(made[p])])
        for item in state.take(made[p][at[p]]):
            again = newest.setdefault((item.counter, item.key, item.as_of_ms), item)
            assert again == item, "a grid point that is settled again has equal values"
        at[p] += 1
        if crash and random.random() < 0.1:
            stored = msgspec.msgpack.encode(state.to_plain())
        if crash and stored is not None and random.random() < 0.05:
            state = fresh()
            state.load_plain(msgspec.msgpack.decode(stored))
            at = [offset + 1 for offset in state.offsets]
    return [newest[key] for key in sorted(newest, key=lambda k: (k[2], k))]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_partitions_settles_the_same(seed):
    made = logs(seed)
    expected = settle(made, Random(1), crash=False)
    assert len(expected) > 50
    assert settle(made, Random(seed + 100), crash=False) == expected
    assert settle(made, Random(seed + 200), crash=True) == expected


def test_values_decay_to_zero_when_the_window_has_passed():
    last = {item.key: item for item in settle(logs(1), Random(1), crash=False)}
    assert all(item.counts == [0.0] and item.buckets == {} for item in last.values())
