"""Goal: the contract's promises hold. Method: small examples of each, old and new forms read by each other."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from headrace.contract.config import PORTS, decode_config, port
from headrace.contract.errors import ConfigRejected, EventRejected, InvariantBroken
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    decode_batch,
    decode_punctuation,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import START, Position, Positions, least
from headrace.contract.formats.sample import list_column, matrix
from headrace.contract.formats.snapshot import FORMAT, Manifest, Weights, decode_weights, encode_weights
from headrace.contract.formats.steps import Step, StepRange, decode_step, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.project import FeedbackType, ImpressionType, Project, Recipe, Task
from headrace.contract.spec import Categorical, Counter, Cross, FeatureSpec, Numeric, Rate

SPEC = FeatureSpec(
    counters=(Counter(name="item", key="item_id"),),
    features=(
        Categorical(field="item_id"),
        Cross(fields=("user_id", "item_id")),
        Numeric(field="price"),
        Rate(of="counter.item.click", over="counter.item.impression"),
    ),
)
PROJECT = Project(
    impression=ImpressionType(
        tag="shop.impression", key="user_id", fields={"user_id": "int64", "item_id": "int64", "price": "float64"}
    ),
    feedback=(FeedbackType(name="click", tag="shop.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=1000),),
    features=SPEC,
)


def rows() -> list[dict[str, object]]:
    lead = {"event_id": "e", "request_id": "r", "place": 0, "key": "1", "event_time_ms": 5}
    return [{**lead, "user_id": 1, "item_id": 2, "price": 3.5}]


def test_old_reader_ignores_a_new_column_and_new_reader_fills_it() -> None:
    old = impression_schema(PROJECT)
    new = old.append(pa.field("colour", pa.string()))
    newer = encode_batch(batch_from_rows([{**rows()[0], "colour": "red"}], new))
    older = encode_batch(batch_from_rows(rows(), old))
    assert decode_batch(newer, old).schema.equals(old)
    assert decode_batch(older, new).column("colour").to_pylist() == [None]


def test_a_changed_type_is_refused_with_both_types() -> None:
    wrong = pa.RecordBatch.from_pydict({"event_time_ms": pa.array(["5"])})
    with pytest.raises(EventRejected, match=r"event_time_ms.*string.*int64") as caught:
        decode_batch(encode_batch(wrong), impression_schema(PROJECT))
    assert caught.value.reason == "bad_batch"


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(EventRejected, match="no Arrow IPC stream of 3 bytes"):
        decode_batch(b"abc")


def test_feedback_always_carries_the_partition_key_field() -> None:
    assert "user_id" in feedback_schema(PROJECT, PROJECT.feedback[0]).names


@pytest.mark.parametrize("extra", [{}, {"colour": "new"}])
def test_json_records_grow(extra: dict[str, str]) -> None:
    mark = Punctuation("g", 1, 2, counts={"read": 3})
    data = msgspec.json.encode({**msgspec.to_builtins(mark), **extra})
    assert decode_punctuation(data) == mark == decode_punctuation(encode_punctuation(mark))
    step = Step(
        model="m", run="r", step=1, ranges=(StepRange("live", partition=0, upto=(4, 1)),), positions={"0": [4, 1]}
    )
    assert decode_step(msgspec.json.encode({**msgspec.to_builtins(step), **extra})) == step
    assert decode_step(encode_step(step)) == step


def test_positions_never_go_back_and_cover_what_they_passed() -> None:
    start = Positions(1)
    moved = start.advanced({0: Position(5, 1)}).advanced({0: Position(4, 9), 1: Position(0, 0)})
    assert moved.at(0) == Position(5, 1) and moved.at(7) == START
    assert moved.covers(0, Position(5, 1)) and not moved.covers(0, Position(5, 2))
    assert Positions.from_json(1, moved.to_json()) == moved
    assert least([moved, start.advanced({0: Position(2, 0)})]).by_partition == {0: Position(2, 0), 1: START}


def test_weights_survive_the_journey_and_a_flipped_bit_is_noticed() -> None:
    weights = Weights(
        np.array([3, -9], np.int64),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        {"w": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32)},
    )
    manifest = Manifest(kind="delta", model="m", run="r", step=4, version="r-4", base="r-3", format=FORMAT)
    data = encode_weights(weights, manifest)
    back, same = decode_weights(data)
    assert same == manifest
    assert np.array_equal(back.keys_K, weights.keys_K) and np.array_equal(back.values_KV, weights.values_KV)
    assert {k: v.tolist() for k, v in back.dense.items()} == {k: v.tolist() for k, v in weights.dense.items()}
    one = np.float32(1).tobytes()
    with pytest.raises(InvariantBroken, match="r-4"):
        decode_weights(data.replace(one * 4, np.float32(2).tobytes() + one * 3, 1))


def test_an_empty_delta_survives() -> None:
    weights = Weights(np.zeros(0, np.int64), np.zeros((0, 3), np.float32), {})
    manifest = Manifest(kind="delta", model="m", run="r", step=1, version="r-1", format=FORMAT)
    back, _ = decode_weights(encode_weights(weights, manifest))
    assert back.keys_K.shape == (0,) and back.values_KV.shape == (0, 3)


@pytest.mark.parametrize("width", [0, 1, 4])
def test_list_columns_are_matrices(width: int) -> None:
    values = np.arange(3 * width, dtype=np.int64).reshape(3, width)
    assert np.array_equal(matrix(list_column(values, pa.int64()), width), values)


def test_a_matrix_of_a_sliced_column_is_the_slice() -> None:
    column = list_column(np.arange(12, dtype=np.int64).reshape(4, 3), pa.int64())
    assert matrix(column.slice(1, 2), 3).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_the_digest_of_a_spec_moves_with_its_content_only() -> None:
    again = FeatureSpec(counters=SPEC.counters, features=SPEC.features)
    assert SPEC.digest() == again.digest()
    assert FeatureSpec(counters=SPEC.counters, features=SPEC.features[::-1]).digest() != SPEC.digest()
    assert (SPEC.slots, SPEC.numerics) == (2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": (Task(name="click", feedback="order", window_ms=1),)}, "order"),
        ({"recipe": Recipe(task="dwell")}, "dwell"),
        ({"features": FeatureSpec(features=(Categorical(field="colour"),))}, "colour"),
        ({"features": FeatureSpec(counters=(Counter(name="c", key="price"),))}, "price"),
        ({"impression": ImpressionType(tag="t", key="nobody", fields={"item_id": "int64"})}, "nobody"),
        ({"features": FeatureSpec(features=(Categorical(field="itemid"),))}, r"there are: .*'item_id'"),
        ({"features": FeatureSpec(counters=(Counter(name="c", key="item_id", counts=("view",)),))}, "counts 'view'"),
        ({"features": FeatureSpec(counters=(Counter(name="c", key="item_id", counts="click"),))}, "A tuple of one"),
        ({"tasks": (Task(name="click", feedback="click", window_ms=0),)}, r"tasks\[0\]\.window_ms"),
        ({"tasks": (Task(name="click", feedback="click", window_ms="10s"),)}, r"tasks\[0\]\.window_ms"),
        ({"tasks": (Task(name="click", feedback="click", window_ms=1, policy="eagr"),)}, "eagr"),
        ({"recipe": Recipe(dim=-8)}, r"recipe.dim"),
        ({"feedback": (FeedbackType(name="click", tag="c", fields={"item_id": "strng"}),)}, "strng"),
        ({"feedback": (FeedbackType(name="impression", tag="c"),)}, "'impression' and 'impression' are one"),
        ({"feedback": (FeedbackType(name="click", tag="shop.impression"),)}, "the tags 'shop.impression'"),
        ({"feedback": tuple(FeedbackType(name="click", tag=tag) for tag in "ab")}, "'click' and 'click' are one"),
        ({"tasks": (Task(name="click", feedback="click", window_ms=1),) * 2}, "the tasks 'click'"),
        ({"features": FeatureSpec(counters=(Counter(name="item", key="item_id"),) * 2)}, "the counters 'item'"),
        ({"name": "../x"}, "begin with a-z or 0-9"),
        ({"name": ""}, "begin with a-z or 0-9"),
    ],
)
def test_a_project_that_contradicts_itself_is_refused(change: dict[str, object], words: str) -> None:
    assert PROJECT.checked() is PROJECT
    with pytest.raises(ConfigRejected, match=words):
        msgspec.structs.replace(PROJECT, **change).checked()


def test_configuration_names_the_wrong_key() -> None:
    assert decode_config(b"").log.partitions == 4
    with pytest.raises(ConfigRejected, match="partition_count"):
        decode_config(b"[log]\npartition_count = 3\n")
    with pytest.raises(ConfigRejected, match=r"log.partitions"):
        decode_config(b"[log]\npartitions = 0\n")
    with pytest.raises(ConfigRejected, match="not TOML"):
        decode_config(b"[log\n")


def test_ports_move_together_and_never_collide() -> None:
    assert port("forward") == 24224 and port("forward", 30_000) == 30_000
    assert len({port(name) for name in PORTS}) == len(PORTS) == len({port(name, 30_000) for name in PORTS})


def test_topics_of_a_new_generation_have_names_of_their_own() -> None:
    first, second = ({t.name for t in Topics(g).specs(4)} for g in (1, 2))
    assert "events" in first and not first & second


def test_every_error_says_what_the_caller_does_next() -> None:
    import headrace.contract.errors as errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.HeadraceError)]
    assert len(kinds) == 7 and all(e.__doc__ for e in kinds)
