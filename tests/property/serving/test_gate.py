"""Goal: a delta is exactly the next one of the chain, or it is refused by name and the served model stays.
Method: a good delta, changed in each field of its manifest, in its rows and in its bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import TOPICS, Trainer, World

from headrace.contract.errors import InvariantBroken, Overloaded
from headrace.contract.formats.snapshot import FORMAT, Manifest, Weights, decode_weights, encode_weights
from headrace.serving.gate.admit import Refused, admit_delta
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.trainer.model.tables.table import initial_values

DIM = 2
SERVED = Manifest(
    kind="delta", model="m", run="r", step=7, version="r-7", base="r-6", chain="r-3", seq=4, spec="s", format=FORMAT
)
NEXT = Manifest(
    kind="delta", model="m", run="r", step=9, version="r-9", base="r-7", chain="r-3", seq=5, spec="s", dim=DIM,
    format=FORMAT,
)  # fmt: skip
SHAPES = {"bias": [1], "w": [2, 3]}
CHANGES = {
    "kind": st.sampled_from(["snapshot", "Delta", ""]),
    "model": st.sampled_from(["", "another", "M"]),
    "run": st.sampled_from(["", "other", "R"]),
    "step": st.integers(-1, 30),
    "version": st.sampled_from(["", "r-8", "r-7", "other-9", "r-09"]),
    "base": st.sampled_from(["", "r-6", "r-8", "r-9", "other-7"]),
    "chain": st.sampled_from(["", "r-1", "r-6", "other-3"]),
    "seq": st.integers(-1, 12),
    "spec": st.sampled_from(["", "another"]),
    "generation": st.integers(0, 3),
    "dim": st.integers(0, 5),
}
REASONS = {
    **{name: name for name in CHANGES},
    "step": "version",
}


def rows(keys: list[int], width: int = 1 + DIM) -> Weights:
    values = np.arange(len(keys) * width, dtype=np.float32).reshape(len(keys), width)
    return Weights(np.array(keys, np.int64), values, {"bias": np.ones(1, np.float32), "w": np.ones((2, 3), np.float32)})


def admit(data: bytes, served: Manifest = SERVED, refused: tuple[str, ...] = ()) -> tuple[Weights, Manifest]:
    return admit_delta(data, model="m", served=served, dim=DIM, shapes=SHAPES, refused=refused)[:2]


def reason_of(data: bytes, **rest: Any) -> str:
    with pytest.raises(Refused) as refused:
        admit(data, **rest)
    return refused.value.reason


def test_the_next_delta_is_taken_and_so_is_the_first_of_a_chain_that_begins_here():
    assert admit(encode_weights(rows([5, -5]), NEXT))[1] == NEXT
    first = msgspec.structs.replace(NEXT, chain="r-7", seq=1)
    assert admit(encode_weights(rows([5]), first))[1] == first
    snapshot = msgspec.structs.replace(SERVED, kind="snapshot", base="", chain="", seq=0)
    assert admit(encode_weights(rows([5]), first), snapshot)[1] == first
    assert reason_of(encode_weights(rows([5]), first), refused=("r-7",)) == "chain"
    assert reason_of(encode_weights(rows([5]), NEXT), served=snapshot) == "chain"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_delta_with_one_other_word_is_refused_by_its_name(data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(CHANGES)))
    changed = msgspec.structs.replace(NEXT, **{name: data.draw(CHANGES[name])})
    if changed == NEXT:
        return
    assert reason_of(encode_weights(rows([5]), changed)) == REASONS[name]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(CHANGES)), st.integers(0, 2), min_size=1), st.data())
def test_several_changes_are_never_taken_for_the_next(names: dict[str, int], data: st.DataObject):
    changed = msgspec.structs.replace(NEXT, **{name: data.draw(CHANGES[name]) for name in names})
    if changed.step > SERVED.step and changed.version == f"r-{changed.step}":
        changed = msgspec.structs.replace(changed, step=NEXT.step, version=NEXT.version)
    if changed != NEXT:
        reason_of(encode_weights(rows([5]), changed))


@pytest.mark.parametrize(
    ("reason", "weights"),
    [
        ("key_zero", rows([0])),
        ("key_zero", rows([3, 0, 4])),
        ("key_twice", rows([3, 4, 3])),
        ("dim", rows([3], width=DIM)),
        ("dim", rows([3], width=2 + DIM)),
        ("dim", rows([], width=1)),
        ("not_finite", Weights(np.array([3]), np.array([[0, np.nan, 0]], np.float32), rows([]).dense)),
        ("not_finite", Weights(np.array([3]), np.array([[0, -np.inf, 0]], np.float32), rows([]).dense)),
        ("not_finite", Weights(np.array([3]), rows([3]).values_KV, rows([]).dense | {"bias": np.array([np.inf])})),
        ("dense", Weights(np.array([3]), rows([3]).values_KV, {"bias": np.ones(1, np.float32)})),
        ("dense", Weights(np.array([3]), rows([3]).values_KV, rows([]).dense | {"w": np.ones((3, 2), np.float32)})),
    ],
)
def test_damaged_rows_are_refused_by_name(reason: str, weights: Weights):
    assert reason_of(encode_weights(weights, NEXT)) == reason


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_say_the_same_or_are_refused(data: st.DataObject):
    weights = rows([5, -5, 2**40])
    good = encode_weights(weights, NEXT)
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(good), len(good), data.draw(st.integers(0, len(good)))]))
    try:
        found, manifest = admit(bytes(changed[:cut]))
    except Refused as refused:
        assert refused.reason
        return
    assert manifest == NEXT
    np.testing.assert_array_equal(found.keys_K, weights.keys_K)
    np.testing.assert_array_equal(found.values_KV, weights.values_KV)


def test_counts_that_differ_are_damaged():
    weights = rows([5])
    more = Weights(weights.keys_K, weights.values_KV, {"bias": np.ones(2, np.float32)})
    data = encode_weights(more, NEXT)
    assert reason_of(data.replace(b'{"bias":[2]}', b'{"bias":[1]}')) == "damaged"
    assert reason_of(data.replace(b'{"bias":[2]}', b'{"bias":[9]}')) == "damaged"


@pytest.mark.parametrize("seed", range(5))
def test_whatever_lies_between_two_deltas_the_served_model_is_the_trainers(tmp_path: Path, seed: int):
    world, rng = World(tmp_path), Random(seed)
    trainer = Trainer(world)
    trainer.learn(rng)
    trainer.snapshot()
    foreign: list[dict[str, Any]] = [
        {"model": "another"}, {"run": "z"}, {"spec": "z"}, {"chain": "z-1"}, {"seq": 99}, {"kind": "snapshot"},
        {"generation": 7}, {"step": 0}, {"version": "z-9"},
    ]  # fmt: skip
    for _ in range(12):
        weights = trainer.learn(rng)
        base, seq = trainer.base, trainer.seq
        trainer.delta(weights, **rng.choice(foreign))
        trainer.base, trainer.seq = base, seq
        damaged = world.log.partitions(TOPICS.deltas)[0][-1].value or b""
        world.log.append(TOPICS.deltas, 0, damaged[: rng.randrange(len(damaged))], b"small", {"base": base})
        world.log.append(TOPICS.deltas, 0, damaged, b"\xff\xfe", {"base": base})
        trainer.delta(weights)
        world.follow(2)
        assert world.version == trainer.version
        np.testing.assert_array_equal(world.served_rows(), world.expected_rows(trainer.version))
    assert sum(n for (name, _), n in world.metrics.counters.items() if name == "versions_refused_total") == 24


def test_the_region_takes_no_row_that_would_be_written_elsewhere():
    """Key 0 marks an empty place: it made a row at every delta, past the region's end, until the process died."""
    with tempfile.TemporaryDirectory() as folder:
        model = SharedModel(Path(folder) / "m", dim=DIM, rows_max=4, create=True)
        meta = Meta(NEXT, "r-3", "{}", "{}", SHAPES)
        model.load_snapshot(rows([1, 2]), meta)
        for bad in (rows([0]), Weights(np.array([3, 4]), rows([3]).values_KV, rows([]).dense)):
            with pytest.raises(InvariantBroken, match="gate must refuse"):
                model.check_fits(bad, meta, fresh=False)
        with pytest.raises(Overloaded, match="rows of 9 values do not fit"):
            model.check_fits(rows([3], width=9), meta, fresh=False)
        rows_of_zero, _ = model.read(lambda view: view.lookup(np.array([0]), seed=1, scale=0.1))
        np.testing.assert_array_equal(rows_of_zero, initial_values(np.array([0]), dim=DIM, seed=1, scale=0.1))
        with pytest.raises(InvariantBroken, match="check_fits"):
            model.apply_delta(rows([0] * 9), meta)
        assert model.meta().manifest == NEXT


def test_what_release_0_1_sent_is_read_without_the_digest_of_its_rows():
    data = encode_weights(rows([5]), msgspec.structs.replace(NEXT, kind="snapshot"))
    assert b"content_sha256" not in data and len(decode_weights(data)[0].keys_K) == 1
