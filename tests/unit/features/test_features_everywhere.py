"""Goal: stream, lake, trainer and serving make the same of an event. Method: one impression with every kind of field
through all four, real ones."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from served_world import served_of

from headrace.backends.lake.delta import DeltaLake
from headrace.contract.config import JoinConfig
from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    decode_batch,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import Position
from headrace.contract.formats.sample import conform, matrix, sample_schema
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.functions import feature_function
from headrace.contract.interfaces.log import Record
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import (
    PAD,
    Categorical,
    Counter,
    Custom,
    FeatureSpec,
    Mean,
    MultiValued,
    Product,
    Recency,
    Text,
    TimePart,
)
from headrace.serving.features import FeatureMemory
from headrace.serving.model.scorer import merge, rank
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.stream.aggregate.core import AggregatorState
from headrace.stream.join.join import JoinState
from headrace.trainer.model.learner import make_learner
from headrace.trainer.source.batch import to_batch


@feature_function("everywhere.title_length", version=3)
def title_length(title):
    return pc.utf8_length(title)


PROJECT = Project(
    impression=ImpressionType(
        tag="i",
        key="user",
        fields={"user": "int64", "tags": "list[string]", "topics": "list[int64]", "title": "string"},
    ),
    feedback=(FeedbackType(name="buy", tag="b", fields={"title": "string"}),),
    tasks=(Task(name="click", feedback="buy", window_ms=1_000),),
    features=FeatureSpec(
        counters=(
            Counter(name="u", key="user", counts=("buy", "sum:buy.value", "last:buy")),
            Counter(name="d", key="user", counts=("buy",), half_life_ms=600_000),
            Counter(name="ut", key=("user", "title"), counts=("buy", "impression")),
        ),
        features=(
            Categorical(field="user"),
            MultiValued(field="tags", values_max=3),
            MultiValued(field="topics", values_max=2),
            Text(field="title", ngram_max=2, values_max=6),
            TimePart(part="minute_of_day", utc_offset_minutes=60),
            Product(parts=(TimePart(part="hour"), MultiValued(field="tags", values_max=3)), values_max=3),
            Mean(of="counter.u.sum:buy.value", over="counter.u.buy"),
            Recency(of="counter.u.last:buy"),
            Custom(function="everywhere.title_length", version=3, fields=("title",), gives="numbers"),
        ),
    ),
    recipe=Recipe(dim=4, hidden=(8,), init_scale=0.5),
).checked()
T0 = 1_760_000_000_000
FIELDS = {"user": 7, "tags": ["a", "b", "a"], "topics": [5], "title": "Red:  bicycle"}


def log() -> list[Record]:
    """Return three impressions: before any purchase, 30 s and 400 s after one of 12.5."""
    schema, bought = impression_schema(PROJECT), feedback_schema(PROJECT, PROJECT.feedback[0])
    records: list[tuple[dict[str, str], bytes]] = []

    def impression(n: int, at_ms: int, **fields) -> None:
        lead = {"event_id": f"e{n}", "request_id": f"r{n}", "place": 0, "key": "7", "event_time_ms": at_ms}
        records.append(({"kind": "impression"}, encode_batch(batch_from_rows([lead | FIELDS | fields], schema))))

    impression(0, T0)
    lead = {"event_id": "b0", "request_id": "r9", "place": 0, "key": "7", "event_time_ms": T0 + 1_000}
    value = encode_batch(batch_from_rows([lead | {"value": 12.5, "user": 7, "title": FIELDS["title"]}], bought))
    records.append(({"kind": "feedback", "type": "buy"}, value))
    impression(1, T0 + 31_000)
    impression(2, T0 + 401_000, tags=None, topics=[], title=None)
    records.append(({"kind": "punctuation"}, encode_punctuation(Punctuation("g", 1, T0 + 1_000_000))))
    return [Record("events", 0, offset, None, body, headers, 0) for offset, (headers, body) in enumerate(records)]


def joined() -> pa.RecordBatch:
    """Return the samples of the log."""
    state = JoinState(PROJECT, JoinConfig(), silent_ms=10_000, partition=0)
    out = [emitted.batch for record in log() if (emitted := state.take(record)) is not None]
    return pa.Table.from_batches(out).combine_chunks().to_batches()[0].sort_by("event_time_ms")


@pytest.fixture(scope="module")
def samples() -> pa.RecordBatch:
    return joined()


def test_the_join_counts_sums_recencies_and_decay(samples):
    assert samples["counter.u.buy"].to_pylist() == [0, 1, 1]
    assert samples["counter.u.sum:buy.value"].to_pylist() == [0, 12.5, 12.5]
    assert samples["counter.u.last:buy"].to_pylist() == [0, 30_001, 400_001]
    # Buckets are 5 minutes: in the same one, then one later, which is half a half-life.
    faded = samples["counter.d.buy"].to_pylist()
    assert faded[0] == 0 and faded[1] in (1.0, pytest.approx(0.5**0.5)) and faded[2] < faded[1]


def test_counters_are_learnt_as_they_were_served_and_else_as_the_join_knows_them():
    """A served answer saw another moment than the join does: what the model saw is what it learns."""
    schema = impression_schema(PROJECT)
    lead = {"request_id": "r", "place": 0, "key": "7", "event_time_ms": T0} | FIELDS
    served = {"counter.u.buy": 41.0, "counter.u.sum:buy.value": 82.0}
    told = [lead | {"event_id": "served"} | served, lead | {"event_id": "said nothing", "place": 1}]
    state = JoinState(PROJECT, JoinConfig(), silent_ms=10_000, partition=0)
    state.take(Record("events", 0, 0, None, encode_batch(batch_from_rows(told, schema)), {"kind": "impression"}, 0))
    emitted = state.take(Record("events", 0, 1, None, _time(T0 + 1_000_000), {"kind": "punctuation"}, 0))
    rows = {row["event_id"]: row for row in emitted.batch.to_pylist()}
    assert (rows["served"]["counter.u.buy"], rows["said nothing"]["counter.u.buy"]) == (41.0, 0.0)
    # What was not served of the same impression is what the join knows; features are made of what stands there.
    assert rows["served"]["counter.u.last:buy"] == 0.0
    assert rows["served"]["numeric"] != rows["said nothing"]["numeric"]


def test_a_counter_over_two_fields_is_the_same_in_join_aggregator_and_serving(samples):
    """The join counts by itself what has the partition key; serving takes it from the aggregator, by its own text."""
    assert samples["counter.ut.buy"].to_pylist() == [0, 1, 0] and samples["counter.ut.impression"][1].as_py() == 1
    aggregator, memory = (
        AggregatorState(PROJECT, 1, grid_ms=1_000, silent_ms=10_000, horizon_ms=100_000),
        FeatureMemory(),
    )
    # Up to the last impression: the windows are still full, and what was counted is known to serving.
    told = [*log()[:-1], Record("events", 0, 9, None, _time(T0 + 402_000), {"kind": "punctuation"}, 0)]
    for settled in [item for record in told for item in aggregator.take(record)]:
        body = {"as_of_ms": settled.as_of_ms, "epoch": 1, "buckets": {str(b): c for b, c in settled.buckets.items()}}
        key = f"{settled.counter}/{settled.key}".encode()
        memory.take(Record("features", 0, 0, key, msgspec.json.encode(body), {}, 0))
    raw = merge(PROJECT, FIELDS, [{}, {"title": None}, {"title": "Red"}])
    found = [
        (row["counter.ut.buy"], row["counter.ut.impression"]) for row in memory.look_up(PROJECT.features, raw, 3).open()
    ]
    assert found == [(1, 2), (0, 0), (0, 0)]


def _time(at_ms: int) -> bytes:
    return encode_punctuation(Punctuation("g", 1, at_ms))


def test_lake_and_trainer_read_what_the_join_made(samples, tmp_path):
    lake = DeltaLake(str(tmp_path / "lake"))
    lake.append([decode_batch(encode_batch(samples))], {0: 1}, {0: Position(9, 0)})
    rows = conform(lake.read().sort_by("event_time_ms"), sample_schema(PROJECT))
    batch = to_batch(rows, PROJECT)
    slots_NF = matrix(samples["slots"], PROJECT.features.slots)
    assert batch.slots_BF.tobytes() == slots_NF.tobytes()
    # Rows of another digest are featurized again from their raw fields, to the same bits.
    other = rows.set_column(rows.schema.get_field_index("spec"), "spec", pa.array(["other"] * rows.num_rows))
    again = to_batch(other, PROJECT)
    assert again.slots_BF.tobytes() == batch.slots_BF.tobytes()
    assert again.numeric_BD.tobytes() == batch.numeric_BD.tobytes()
    assert (slots_NF[2] == PAD).sum() == 2 + 2 + 5 + 2 and not (slots_NF[0] == 0).any()


def test_rows_from_before_a_field_was_declared_are_featurized_again(samples):
    """A column that an old row lacks is null: no tags, no sum."""
    lacking = {"tags", "counter.u.sum:buy.value", "counter.d.buy", "counter.ut.buy"}
    old = pa.Table.from_batches([samples]).select([n for n in samples.schema.names if n not in lacking])
    old = old.set_column(old.schema.get_field_index("spec"), "spec", pa.array(["other"] * old.num_rows))
    before = to_batch(conform(old, sample_schema(PROJECT)), PROJECT)
    now = to_batch(pa.Table.from_batches([samples]), PROJECT)
    assert before.slots_BF[:, 0].tolist() == now.slots_BF[:, 0].tolist()
    assert len({row.tobytes() for row in before.slots_BF[:, 1:4]}) == 1
    assert before.slots_BF[0, 1] == now.slots_BF[2, 1] and (before.slots_BF[:, 2:4] == PAD).all()


def test_serving_scores_as_the_trainer_does(samples, tmp_path):
    batch, learner = to_batch(pa.Table.from_batches([samples]), PROJECT), make_learner(PROJECT.recipe, PROJECT.features)
    learner.learn(batch)
    weights = learner.weights()
    assert PAD not in weights.keys_K
    meta = Meta(
        Manifest(kind="snapshot", model="m", run="r", step=1, version="r-1"),
        "r-1",
        msgspec.json.encode(PROJECT.features).decode(),
        msgspec.json.encode(PROJECT.recipe).decode(),
        {name: list(array.shape) for name, array in weights.dense.items()},
    )
    model = SharedModel(tmp_path / "m", dim=4, rows_max=1_000, create=True)
    model.load_snapshot(weights, meta)
    for n, candidate in enumerate(({}, {}, {"tags": None, "topics": [], "title": None})):
        raw = merge(PROJECT, FIELDS, [candidate])
        served = served_of(PROJECT, {name: samples[name][n].as_py() for name in samples.schema.names})
        at_ms = samples["event_time_ms"][n].as_py()
        found, _ = model.read(lambda view, s=served, t=at_ms, r=raw: rank(view, r, s, rows=1, event_time_ms=t))
        assert found.tolist() == [[float(learner.predict(batch)[n])]]


@pytest.mark.parametrize("bad", [{"tags": "a"}, {"tags": [1]}, {"topics": ["1"]}, {"topics": [1.5]}, {"user": [1]}])
def test_serving_refuses_what_is_no_such_list(bad):
    with pytest.raises(EventRejected, match=next(iter(bad))):
        merge(PROJECT, FIELDS, [bad])
    assert merge(PROJECT, FIELDS, [{"topics": [1.0, None]}])["topics"].to_pylist() == [[1, None]]


def test_bits_of_a_changed_number_are_not_the_same(samples):
    """The test above would see a wrong time: a minute later has another slot."""
    one = to_batch(pa.Table.from_batches([samples]), PROJECT).slots_BF
    assert np.unique(one[:, 12]).size == 2
