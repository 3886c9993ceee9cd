"""Goal: settled values do not depend on how partitions are read in turn, nor on crashes. Method: random merges."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from msgspec import structs

from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    decode_batch,
    decode_punctuation,
    encode_batch,
    encode_punctuation,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.rules import change_of, encode_change
from headrace.contract.spec import Categorical, Counter, FeatureSpec
from headrace.stream.aggregate.core import AggregatorState, Settled

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


CHANGED = structs.replace(
    PROJECT,
    features=FeatureSpec(
        counters=(Counter(name="new", key="item", counts=("impression",), window_ms=400, buckets=4),),
        features=(Categorical(field="item"),),
    ),
).checked()


def changing(seed: int) -> tuple[list[list[Record]], list[int]]:
    """Return logs in which a change drops one counter and brings another, and where it lies in each partition."""
    random, made, at = Random(seed), logs(seed), list[int]()
    for partition, log in enumerate(made):
        at.append(random.randrange(10, 100))
        value = encode_change(change_of(CHANGED, 2, now_ms=0))
        for place in (at[-1], random.randrange(at[-1] + 1, 110)):
            log.insert(place, Record("events", partition, 0, None, value, {"kind": "spec"}, 0))
        made[partition] = [structs.replace(record, offset=n) for n, record in enumerate(log)]
    return made, at


@pytest.mark.parametrize("seed", range(6))
def test_a_change_of_rules_settles_the_same_in_any_order(seed):
    made, at = changing(seed)
    expected = settle(made, Random(1), crash=False)
    assert settle(made, Random(seed + 100), crash=False) == expected
    assert settle(made, Random(seed + 200), crash=True) == expected
    fresh_values = [item for item in expected if item.counter == "new"]
    assert len(fresh_values) > 5
    for item in fresh_values:
        # Whoever reads it has read the change, and it counts what each partition read after that.
        assert all(reached(log[:place]) < item.as_of_ms for log, place in zip(made, at, strict=True))
        assert item.counts == [brute(made, at, item.key, item.as_of_ms)]
    last = {item.key: item for item in expected if item.counter == "i"}
    assert all(item.counts == [0.0] and item.buckets == {} for item in last.values()), "a dropped counter fades"
    end = fresh()
    for record in (*made[0], *made[1]):
        end.take(record)
    assert [state.counter.name for state in end.counters.values()] == ["new"]


def reached(log: list[Record]) -> int:
    """Return the watermark at the end of a stretch of one partition's log."""
    times = [decode_punctuation(r.value or b"").time_ms for r in log if r.headers["kind"] == "punctuation"]
    return max(times)


def brute(made: list[list[Record]], at: list[int], key: str, as_of_ms: int) -> float:
    count = 0
    oldest = as_of_ms // 100 - 3
    for log, place in zip(made, at, strict=True):
        times = [n for n, record in enumerate(log) if record.headers["kind"] == "punctuation"]
        end = next(n for n in times if reached([log[n]]) >= as_of_ms)
        for record in log[place:end]:
            if record.headers["kind"] == "impression":
                row = decode_batch(record.value or b"").to_pylist()[0]
                is_in = oldest <= row["event_time_ms"] // 100 and row["event_time_ms"] <= as_of_ms
                count += is_in and str(row["item"]) == key
    return float(count)
