"""Goal: after any deltas serving holds what a snapshot of the same moment holds, by values and by digest; and what is
lost, skipped, forgotten or flipped on the way gives another digest.

Method: a model that is a dictionary, changed at random; deltas cut at random, applied to a real region."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.contract.formats.dense_change import PLAIN, SAME, XOR_ZSTD, WrongBase, change_of, sha256_of
from headrace.contract.formats.snapshot import (
    FORMAT,
    Manifest,
    Weights,
    as_served,
    decode_update,
    encode_weights,
    served_digest,
)
from headrace.contract.recipe import Recipe
from headrace.kernels.row_sums import row_sum
from headrace.serving.model.served_sum import dense_bits, sum_after, sum_held
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.trainer.commit.served_rows import ServedRows, as_snapshot, digest_of
from headrace.trainer.model.tables.table import initial_values

RECIPE = Recipe(model="fm", dim=3)
KEYS = np.array([1, 2, 3, 77, -5, 2**40, -(2**62), 8, 9, 10], np.int64)
SHAPES = {"bias": [1], "w": [40, 3]}
BEGIN = -1
"""What a key's row is changed to: its first values again."""
STEP = st.tuples(st.lists(st.tuples(st.integers(0, len(KEYS) - 1), st.integers(BEGIN, 5)), max_size=6), st.booleans())


def values_of(key: int, what: int) -> np.ndarray:
    first = initial_values(np.array([key], np.int64), dim=RECIPE.dim, seed=RECIPE.seed, scale=RECIPE.row_scale)[0]
    return first if what == BEGIN else np.random.default_rng([abs(key), what]).normal(size=4).astype(np.float32)


class Model:
    """What a learner is to publication."""

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}
        self.dense = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def weights(self, keys: np.ndarray | None = None) -> Weights:
        keys = np.array(list(self.rows), np.int64) if keys is None else keys
        values = [self.rows.get(key, values_of(key, BEGIN)) for key in keys.tolist()]
        return Weights(keys, np.array(values, np.float32).reshape(len(keys), 4), dict(self.dense))

    def change(self, changes: list[tuple[int, int]], moves_dense: bool, number: int) -> np.ndarray:
        touched = []
        for at, what in changes:
            key = int(KEYS[at])
            touched.append(key)
            if what == BEGIN and number % 2:
                self.rows.pop(key, None)  # Expired.
            else:
                self.rows[key] = values_of(key, what)
        if moves_dense:
            self.dense = {n: (a + np.float32(0.001) * (1 + number)).astype(np.float32) for n, a in self.dense.items()}
        return np.unique(np.array(touched, np.int64))


class Replica:
    """A server's region that takes what a trainer sends."""

    def __init__(self, folder: str, snapshot: Weights) -> None:
        self.shared = SharedModel(Path(folder) / "m", dim=RECIPE.dim, rows_max=64, create=True)
        self.sum, self.step = row_sum(snapshot.keys_K, snapshot.values_KV), 0
        self.shared.load_snapshot(snapshot, self.meta())

    def meta(self) -> Meta:
        manifest = Manifest(kind="delta", model="m", run="r", step=self.step, version=f"r-{self.step}")
        return Meta(manifest, "r-0", "{}", "{}", SHAPES)

    def take(self, data: bytes) -> str:
        held = self.shared.held()
        update, manifest = decode_update(data)
        weights = update.weights(dense_bits(held, SHAPES).copy())
        self.sum, self.step = sum_after(self.sum, held, weights), manifest.step
        self.shared.check_fits(weights, self.meta(), weights.gone_K, fresh=False)
        self.shared.apply_delta(weights, self.meta(), weights.gone_K)
        return served_digest(self.sum.text, update.dense.sha256)

    def digest(self) -> str:
        held = self.shared.held()
        return served_digest(sum_held(held, width=1 + RECIPE.dim).text, sha256_of(dense_bits(held, SHAPES)))


def encoded(served: ServedRows, weights: Weights, step: int, rows: str) -> tuple[bytes, str]:
    change = served.change(weights)
    manifest = Manifest(
        kind="delta", model="m", run="r", step=step, version=f"r-{step}", format=FORMAT, rows=rows, served=change.served
    )
    data = encode_weights(change.weights, manifest, change.dense)
    served.take(change)
    return data, change.served


@settings(max_examples=60, deadline=None)
@given(
    st.lists(STEP, min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from(["float32", "float16"]),
)  # fmt: skip
def test_any_split_into_deltas_gives_what_a_snapshot_gives(steps: list, sends: list[bool], rows: str):
    model, served = Model(), ServedRows(RECIPE, rows)
    model.change([(0, 1), (1, 2)], True, 0)
    served.take(served.change(model.weights()))
    touched = np.empty(0, np.int64)
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(folder, as_snapshot(model.weights(), RECIPE, rows))
        for number, (changes, moves_dense) in enumerate(steps, 1):
            touched = np.union1d(touched, model.change(changes, moves_dense, number))
            if not sends[number - 1] and number < len(steps):
                continue
            data, said = encoded(served, model.weights(touched), number, rows)
            touched = np.empty(0, np.int64)
            whole = as_snapshot(model.weights(), RECIPE, rows)
            assert said == digest_of(whole, change_of(whole.dense)[0].sha256)
            assert replica.take(data) == said == replica.digest()
            assert len(served) == replica.shared.rows == len(whole.keys_K)
            looked = replica.shared.read(
                lambda view: view.lookup(KEYS, seed=RECIPE.seed, scale=RECIPE.row_scale)
            )[0]  # fmt: skip
            wanted = {k: as_served(v[None], rows)[0] for k, v in model.rows.items() if k in whole.keys_K}
            np.testing.assert_array_equal(looked, [wanted.get(k, values_of(k, BEGIN)) for k in KEYS.tolist()])


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=2, max_size=8), st.data())
def test_a_skipped_delta_a_lost_row_and_a_forgotten_removal_are_seen(steps: list, data: st.DataObject):
    model, served = Model(), ServedRows(RECIPE, "float32")
    model.change([(at, 1) for at in range(5)], True, 0)
    served.take(served.change(model.weights()))
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(folder, as_snapshot(model.weights(), RECIPE, "float32"))
        sent = []
        for number, (changes, _) in enumerate(steps, 1):
            touched = model.change(changes, False, number)
            sent.append(encoded(served, model.weights(touched), number, "float32"))
        bad = data.draw(st.integers(0, len(sent) - 1))
        update, manifest = decode_update(sent[bad][0])
        named = len(update.keys_K) + len(update.gone_K)
        assume(named > 0)
        lost = data.draw(st.integers(-1, named - 1))
        kept = np.arange(named) != lost
        less = Weights(
            update.keys_K[kept[: len(update.keys_K)]], update.values_KV[kept[: len(update.keys_K)]], dict(model.dense),
            update.gone_K[kept[len(update.keys_K) :]],
        )  # fmt: skip
        for number, (delta, said) in enumerate(sent):
            if number == bad and lost >= 0:
                assert replica.take(encode_weights(less, manifest)) != said
                return
            if number == bad:
                assert replica.sum != row_sum(*rows_after(model, sent, bad)), "skipped"
                return
            assert replica.take(delta) == said


def rows_after(model: Model, sent: list[tuple[bytes, str]], upto: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as a dictionary holds them after the first deltas, the last of `upto` among them."""
    rows = {int(KEYS[at]): values_of(int(KEYS[at]), 1) for at in range(5)}
    for data, _ in sent[: upto + 1]:
        update, _ = decode_update(data)
        rows |= dict(zip(update.keys_K.tolist(), update.values_KV, strict=True))
        rows = {k: v for k, v in rows.items() if k not in update.gone_K}
    return np.array(list(rows), np.int64), np.array(list(rows.values()), np.float32).reshape(len(rows), 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 3), st.integers(0, 31))
def test_a_bit_that_flips_in_memory_is_seen(row: int, number: int, bit: int):
    model = Model()
    model.change([(at, 1) for at in range(5)], True, 0)
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(folder, as_snapshot(model.weights(), RECIPE, "float32"))
        before = replica.digest()
        replica.shared.held().values_RV[row, number : number + 1].view(np.uint32)[:] ^= np.uint32(1 << bit)
        assert replica.digest() != before


def test_only_what_changed_as_it_travels_is_sent():
    model, served = Model(), ServedRows(RECIPE, "float16")
    model.change([(0, 1), (1, 1), (2, BEGIN)], True, 0)
    first = served.change(model.weights())
    assert sorted(first.weights.keys_K) == [1, 2], "a row at its first values needs no place"
    served.take(first)
    model.rows[1] = model.rows[1] * np.float32(1 + 1e-7)  # The same number in float16.
    model.rows[2] = values_of(2, BEGIN)
    model.rows.pop(3)
    change = served.change(model.weights(np.array([1, 2, 3], np.int64)))
    assert change.weights.keys_K.tolist() == [] and change.weights.gone_K.tolist() == [2]
    assert change.dense.how == SAME and change.dense.data == b""


def test_dense_weights_travel_as_what_changed_and_arrive_with_the_same_bits():
    rng = np.random.default_rng(1)
    old = {"w": rng.normal(size=(300, 20)).astype(np.float32), "b": np.zeros(7, np.float32)}
    new = {name: array * np.float32(1.001) for name, array in old.items()}
    whole, bits = change_of(old)
    assert whole.how == PLAIN and np.array_equal(whole.bits(), bits)
    change, new_bits = change_of(new, bits)
    assert change.how == XOR_ZSTD and len(change.data) < 0.8 * len(whole.data)
    assert np.array_equal(change.bits(bits), new_bits)
    np.testing.assert_array_equal(change.dense(bits)["w"], new["w"])
    with pytest.raises(WrongBase, match="base was another"):
        change.bits(new_bits)
    with pytest.raises(WrongBase, match="another model"):
        change.bits(bits[1:])
    with pytest.raises(WrongBase, match="base was another"):
        msgspec.structs.replace(change, how=SAME).bits(bits)


def test_float16_keeps_three_digits_and_is_never_infinite():
    values = np.array([[1.0001, 1e9, -1e9, 1e-9]], np.float32)
    np.testing.assert_array_equal(as_served(values, "float16"), np.array([[1.0, 65504, -65504, 0]], np.float32))
    assert as_served(values, "float32") is values
    assert np.isnan(as_served(np.array([[np.nan]], np.float32), "float16")).all()
