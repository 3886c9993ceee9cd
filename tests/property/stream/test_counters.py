"""Goal: sums, recencies and decayed counts as of event time. Method: random events against a brute force over all."""

from __future__ import annotations

from itertools import groupby, product
from random import Random

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, Counter, Custom, FeatureSpec, MultiValued, Numeric, Recency, Text
from headrace.serving.features import FeatureMemory
from headrace.stream.aggregate.core import AggregatorState
from headrace.stream.features.counters import (
    CounterState,
    aged,
    amounts,
    bucket_ms,
    feeds,
    key_texts,
    value_as_of,
    weights,
)

ENTRIES = ("impression", "buy", "sum:buy.value", "last:buy", "last:impression")
PLAIN = Counter(name="c", key="k", counts=ENTRIES, window_ms=1_000, buckets=10)
DECAYED = Counter(name="d", key="k", counts=ENTRIES, window_ms=1_000, buckets=10, half_life_ms=250)
EVENT = st.tuples(
    st.sampled_from(["impression", "buy"]),
    st.sampled_from("ab"),
    st.integers(-200, 4_000),
    st.none() | st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.1, 1e-7]),
)


def take(state: CounterState, events: list) -> None:
    """Count as the join and the aggregator do: by batches of one type."""
    for name, rows in groupby(events, key=lambda event: event[0]):
        several = list(rows)
        batch = pa.RecordBatch.from_pydict({"value": pa.array([e[3] for e in several], pa.float64())})
        fed = [(feed.entry, amounts(feed, batch).tolist()) for feed in feeds(state.counter, name)]
        for row, (_, key, time_ms, _) in enumerate(several):
            for entry, adds in fed:
                state.add(key, entry, time_ms, adds[row])


def millionths(value: float | None) -> int:
    if value is None or value != value:
        return 0
    return round(np.clip(value, -1e9, 1e9) * 1_000_000)


def brute(counter: Counter, events: list, key: str, as_of_ms: int) -> list[float]:
    """Say each value from the events themselves, one window after the other."""
    width = bucket_ms(counter)
    mine = [
        (name, t, value)
        for name, k, t, value in events
        if k == key and as_of_ms // width - counter.buckets < t // width <= as_of_ms // width
    ]
    out: list[float] = []
    for entry in counter.entries():
        rows = [(t, value) for name, t, value in mine if name == entry.event]
        if entry.kind == "last":
            # The latest of each bucket; where that is after `as_of`, the bucket has none.
            latest = [max(t for t, _ in rows if t // width == b) for b in {t // width for t, _ in rows}]
            past = [t for t in latest if t <= as_of_ms]
            out.append(1 + as_of_ms - max(past) if past else 0)
            continue
        total = 0.0
        for age in range(counter.buckets):
            whole = sum(
                1 if entry.kind == "count" else millionths(value)
                for t, value in rows
                if as_of_ms // width - t // width == age
            )
            total += whole * (weights(counter) or (1.0,) * counter.buckets)[age]
        out.append(total / 1_000_000 if entry.kind == "sum" else total)
    return out


@pytest.mark.parametrize("counter", [PLAIN, DECAYED], ids=["plain", "decayed"])
@settings(deadline=None, max_examples=150)
@given(st.lists(EVENT, max_size=40), st.lists(st.integers(-300, 5_500), min_size=1, max_size=8), st.randoms())
def test_values_equal_a_brute_force_in_any_order(counter, events, times, random):
    one, two = CounterState(counter), CounterState(counter)
    take(one, events)
    shuffled = list(events)
    random.shuffle(shuffled)
    take(two, shuffled)
    two.load_plain(msgspec.msgpack.decode(msgspec.msgpack.encode(two.to_plain())))
    for key in "ab":
        for t in times:
            assert one.value(key, t) == brute(counter, events, key, t) == two.value(key, t)


@settings(deadline=None, max_examples=100)
@given(st.lists(EVENT, max_size=40), st.integers(0, 4_000))
def test_a_recency_never_knows_what_is_later(events, as_of_ms):
    state = CounterState(PLAIN)
    take(state, events)
    for key in "ab":
        value = state.value(key, as_of_ms)[3]
        past = [t for name, k, t, _ in events if name == "buy" and k == key and t <= as_of_ms]
        assert value == 0 or (past and value >= 1 + as_of_ms - max(past))


def test_in_order_of_time_a_recency_is_exact():
    state, last = CounterState(PLAIN), {}
    random, now = Random(4), 0
    for _ in range(500):
        now += random.randrange(0, 120)
        key = random.choice("ab")
        expected = 1 + now - last[key] if key in last and now // 100 - last[key] // 100 < 10 else 0
        assert state.value(key, now)[3] == expected
        state.add(key, 3, now)
        last[key] = now


@settings(deadline=None, max_examples=150)
@given(st.lists(EVENT, max_size=30), st.integers(0, 3_000), st.integers(0, 1_500))
def test_what_was_known_ages_as_the_buckets_do(events, known_ms, passed_ms):
    """Where no bucket leaves the window between, aged values are those of the buckets: recencies to the bit."""
    as_of_ms = known_ms + passed_ms
    events = [e for e in events if e[2] // 100 <= known_ms // 100 and e[2] <= known_ms]
    for counter in (PLAIN, DECAYED):
        state = CounterState(counter)
        take(state, events)
        for key in "ab":
            found = aged(counter, tuple(state.value(key, known_ms)), known_ms, as_of_ms)
            exact = state.value(key, as_of_ms)
            assert list(found[3:]) == exact[3:]
            left = [e for e in events if as_of_ms // 100 - 10 >= e[2] // 100 > known_ms // 100 - 10]
            if not left and (counter is PLAIN or as_of_ms // 100 - known_ms // 100 < 10):
                np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-6, atol=1e-6)


def test_keys_of_several_fields_are_equal_where_all_values_are():
    """All values of up to two of the characters that could be taken for a join's, in every pair."""
    values = [None, *("".join(text) for n in range(3) for text in product(":\\a", repeat=n))]
    rows = list(product(values, values, (None, -1, 11)))
    parts = [
        pa.array(column, kind)
        for column, kind in zip(zip(*rows, strict=True), (pa.string(), pa.string(), pa.int64()), strict=True)
    ]
    texts = key_texts(parts).to_pylist()
    assert [text is None for text in texts] == [None in row for row in rows]
    assert len(set(texts)) == 1 + 13 * 13 * 2
    assert key_texts(parts[:1]).equals(parts[0]) and key_texts(parts[2:]).type == pa.string()


def test_old_counters_give_whole_numbers_as_before():
    clicks = Counter(name="item", key="k", window_ms=4_000, buckets=4)
    found = value_as_of({0: [2, 1], 3: [1, 0]}, clicks, 3_999)
    assert found == [3, 1] and all(isinstance(v, int) for v in found)
    assert aged(clicks, (3.0, 1.0), 0, 10_000) == (3.0, 1.0)


def test_serving_reads_the_same_values_at_its_watermark():
    def taken(key: str, as_of_ms: int, buckets: dict) -> Record:
        value = msgspec.json.encode({"as_of_ms": as_of_ms, "epoch": 1, "buckets": buckets})
        return Record("features", 0, 0, key.encode(), value, {}, 0)

    events = [("buy", "a", 100, 2.5), ("impression", "a", 130, None), ("buy", "a", 420, 1.0)]
    state, memory = CounterState(DECAYED), FeatureMemory()
    take(state, events)
    raw = {"k": pa.array(["a", "b", None])}
    memory.take(taken("d/a", 450, {str(b): counts for b, counts in state.rows["a"].items()}))
    for as_of_ms in (450, 451, 499, 500, 900):
        # Another key's record moves the time at which all are read.
        memory.take(taken("d/z", as_of_ms, {}))
        served = memory.look_up(FeatureSpec(counters=(DECAYED,)), raw, 3).open()
        assert list(served[0].values()) == [float(v) for v in state.value("a", as_of_ms)]
        assert list(served[0]) == list(DECAYED.columns())
        assert set(served[1].values()) == set(served[2].values()) == {0.0}


FIELDS = {"k": "string", "n": "int64", "tags": "list[string]", "title": "string"}


def project(*, counters: tuple = (), features: tuple = (), key: str = "k", buy: dict | None = None) -> Project:
    return Project(
        impression=ImpressionType(tag="i", key=key, fields=FIELDS),
        feedback=(FeedbackType(name="buy", tag="b", fields={"n": "int64"} if buy is None else buy),),
        tasks=(Task(name="click", feedback="buy", window_ms=10),),
        features=FeatureSpec(counters=counters, features=features),
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"counters": (Counter(name="c", key="k", counts=("sum:buy.title",)),)},
            "which is no field of it; numbers of that event",
        ),
        ({"counters": (Counter(name="c", key="k", counts=("sum:impression.title",)),)}, "which is string"),
        ({"counters": (Counter(name="c", key="k", counts=("last:view",)),)}, "no event has that name"),
        ({"counters": (Counter(name="c", key="title", counts=("last:buy",)),)}, "'title' is not a field of 'buy'"),
        ({"counters": (Counter(name="c", key="tags", counts=("impression",)),)}, "a list"),
        ({"counters": (Counter(name="c", key=("k", "tags"), counts=("impression",)),)}, "over 'tags', a list"),
        ({"counters": (Counter(name="d", key=("k",), counts=("buy",)),)}, "two fields or more"),
        ({"counters": (Counter(name="c", key=("k", "n", "k"), counts=("buy",)),)}, "each once"),
        (
            {"counters": (Counter(name="c", key=("k", "title"), counts=("buy",)),)},
            "'title' is not a field of",
        ),
        (
            {"counters": (Counter(name="c", key="no", counts=("buy",)),), "buy": {"no": "string"}},
            "'no' is not a field of 'impression'",
        ),
        ({"key": "tags"}, "partition key is one value"),
        ({"features": (Categorical(field="tags"),)}, "it takes"),
        ({"features": (Numeric(field="title"),)}, "it takes"),
        ({"features": (MultiValued(field="title"),)}, "it takes"),
        ({"features": (MultiValued(field="tags", separator="|"),)}, "it takes"),
        ({"features": (Text(field="title", ngram_min=2),)}, "ngram_min"),
        ({"features": (Recency(of="n"),)}, "`last:` column"),
        ({"features": (Custom(function="nowhere", version=1, fields=("n",), gives="slots"),)}, "nowhere"),
    ],
)
def test_declarations_that_contradict_are_refused(changes, match):
    with pytest.raises(ConfigRejected, match=match):
        project(**changes).checked()


def test_declarations_that_fit_are_taken():
    counter = Counter(name="c", key="k", counts=("buy", "sum:buy.value", "sum:impression.n", "last:buy"))
    pair = Counter(name="p", key=("k", "n"), counts=("buy", "impression"))
    features = (
        Recency(of="counter.c.last:buy"),
        MultiValued(field="tags"),
        Numeric(field="event_time_ms"),
    )
    project(counters=(counter, pair), features=features).checked()


def test_a_key_of_one_field_is_written_as_before_and_one_of_several_comes_back():
    """The digest is over the JSON: specifications from before keys of several fields keep theirs."""
    one, pair = Counter(name="c", key="k"), Counter(name="p", key=("k", "n"))
    assert msgspec.json.decode(msgspec.json.encode(one))["key"] == "k"
    assert FeatureSpec(counters=(one,)).digest() == "02342cae57f21410"
    assert msgspec.json.decode(msgspec.json.encode(pair), type=Counter) == pair and hash(pair)
    with pytest.raises(msgspec.ValidationError, match="key"):
        msgspec.json.decode(b'{"name": "p", "key": ["k"]}', type=Counter)


@pytest.mark.parametrize("seed", range(12))
def test_what_the_aggregator_wrote_is_true_at_every_grid_point(seed):
    """Newest value written of each key, aged to the grid point, against a brute force over what came before it."""
    random, grid_ms = Random(seed), 70
    declared = project(counters=(PLAIN, DECAYED), buy={"n": "int64", "k": "string"}, key="n").checked()
    schemas = {"impression": impression_schema(declared), "buy": feedback_schema(declared, declared.feedback[0])}
    state = AggregatorState(declared, 2, grid_ms=grid_ms, silent_ms=10_000, horizon_ms=100_000)
    newest: dict[tuple[str, str], tuple[int, tuple[float, ...]]] = {}
    read: list[list] = [[], []]
    """Per partition: (events, None) or (None, watermark), in log order."""
    checked = now = 0
    offsets = [-1, -1]
    for step in range(300):
        partition = random.randrange(2)
        offsets[partition] += 1
        # Quiet at the end: everything must leave the windows.
        if random.random() < 0.5 or step > 230:
            now += random.randrange(120)
            body, headers = encode_punctuation(Punctuation("g", 1, now)), {"kind": "punctuation"}
            read[partition].append((None, now))
        else:
            name, at_ms = random.choice(["impression", "buy"]), max(0, now + random.randrange(-300, 30))
            event = (name, random.choice("ab"), at_ms, round(random.uniform(-9, 9), 3))
            lead = {"event_id": f"{partition}.{step}", "request_id": "r", "place": step, "key": "1", "n": 1}
            row = lead | {"event_time_ms": at_ms, "k": event[1], "value": event[3]}
            row = {field: row.get(field) for field in schemas[name].names}
            kind = {"kind": "impression"} if name == "impression" else {"kind": "feedback", "type": name}
            body, headers = encode_batch(batch_from_rows([row], schemas[name])), kind
            read[partition].append((event, None))
        settled = state.take(Record("events", partition, offsets[partition], None, body, headers, 0))
        for as_of_ms, items in groupby(settled, key=lambda item: item.as_of_ms):
            for item in items:
                newest[item.counter, item.key] = as_of_ms, tuple(np.float32(item.counts).tolist())
            known = [event for log in read for event in before(log, as_of_ms)]
            for counter in (PLAIN, DECAYED):
                for key in "ab":
                    known_ms, values = newest.get((counter.name, key), (0, (0.0,) * len(ENTRIES)))
                    found = aged(counter, values, known_ms, as_of_ms)
                    np.testing.assert_allclose(found, brute(counter, known, key, as_of_ms), rtol=1e-5, atol=1e-5)
                    checked += 1
    assert checked > 100
    assert len(newest) == 4 and all(not any(values) for _, values in newest.values())


def before(log: list, as_of_ms: int) -> list:
    """Return a partition's events up to a time that lie before the punctuation with which it reached that."""
    end = next((i for i, (_, time_ms) in enumerate(log) if time_ms is not None and time_ms >= as_of_ms), len(log))
    return [event for event, _ in log[:end] if event is not None and event[2] <= as_of_ms]
