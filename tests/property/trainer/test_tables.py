"""Goal: rows, admission and expiry are what they promise, whatever comes. Method: against a model of plain dicts.

The model looks keys up in a dict, counts in another, forgets by comparing times, and learns with NumPy as the
optimizers' formulas say. Tables take the same batches; now and then one is replaced by what its state gives back.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.spec import PAD
from headrace.trainer.model.digest import digest
from headrace.trainer.model.tables.admission import Admission
from headrace.trainer.model.tables.distinct_ids import DistinctIds
from headrace.trainer.model.tables.group import SlotTable, Tables
from headrace.trainer.model.tables.optimizers import Optimizer
from headrace.trainer.model.tables.row_index import SWEEPS, RowIndex
from headrace.trainer.model.tables.table import Table, initial_values

DIM, SEED, SCALE, SLOTS = 3, 7, 0.3, 4
OPTIMIZERS = {
    "adagrad_row": Optimizer("adagrad_row", lr=0.1, l2=0.01),
    "adagrad": Optimizer("adagrad", lr=0.1, l2=0.01),
    "ftrl": Optimizer("ftrl", lr=0.1, l1=0.5, l2=0.1),
    "adam": Optimizer("adam", lr=0.01),
}
seeds = st.integers(0, 2**31)


class Twin:
    """One row learnt in NumPy, in float32 like the kernels."""

    def __init__(self, key: int, optimizer: Optimizer) -> None:
        self.o = optimizer
        self.w = initial_values(np.array([key]), dim=DIM, seed=SEED, scale=SCALE)[0]
        self.n = np.zeros(1 + DIM, np.float32)
        self.z = (
            -self.w * np.float32(self.o.beta / self.o.lr + self.o.l2) - np.sign(self.w) * np.float32(self.o.l1)
        ).astype(np.float32)
        self.m, self.t = np.zeros(1 + DIM, np.float32), 0

    def learn(self, g: np.ndarray) -> None:
        o, f = self.o, np.float32
        if o.kind == "ftrl":
            root = np.sqrt(self.n + g * g)
            self.z += g - (root - np.sqrt(self.n)) / f(o.lr) * self.w
            self.n += g * g
            w = -(self.z - np.sign(self.z) * f(o.l1)) / ((f(o.beta) + root) / f(o.lr) + f(o.l2))
            self.w = np.where(np.abs(self.z) <= f(o.l1), f(0), w)
            return
        g = g + f(o.l2) * self.w
        if o.kind == "adam":
            self.t += 1
            self.m = f(o.beta1) * self.m + (1 - f(o.beta1)) * g
            self.n = f(o.beta2) * self.n + (1 - f(o.beta2)) * g * g
            rate = o.lr * np.sqrt(1 - o.beta2**self.t) / (1 - o.beta1**self.t)
            self.w = self.w - f(rate) * self.m / (np.sqrt(self.n) + f(1e-8))
            return
        squares = g * g
        if o.kind == "adagrad_row":
            squares[1:] = squares[1:].mean()
        self.n += squares
        self.w = self.w - f(o.lr) * g / (np.sqrt(self.n) + f(1e-6))


class Model:
    """What the table promises, in dicts."""

    def __init__(self, optimizer: Optimizer, after: int, expire_s: int) -> None:
        self.optimizer, self.after, self.expire_s, self.now_s = optimizer, after, expire_s, 0
        self.rows: dict[int, Twin] = {}
        self.used: dict[int, int] = {}
        self.seen: dict[int, tuple[int, int]] = {}

    def advance(self, now_s: int) -> None:
        """Move time on and forget."""
        self.now_s = max(self.now_s, now_s)
        if self.expire_s:
            for key in [k for k, used in self.used.items() if used < self.now_s - self.expire_s]:
                self.rows.pop(key, None)
                self.used.pop(key)

    def step(self, keys_BF: np.ndarray, grad_BFV: np.ndarray, now_s: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which ids have a row, and the values that they had before."""
        self.advance(now_s)
        known = set(self.rows)
        has, before, sums = np.zeros(keys_BF.shape, bool), np.zeros(grad_BFV.shape, np.float32), {}
        for (b, f), key in np.ndenumerate(keys_BF):
            key = int(key)
            if key == PAD:
                continue
            if key not in known:
                count, last_s = self.seen.get(key, (0, self.now_s))
                count = 1 if self.expire_s and last_s < self.now_s - self.expire_s else count + 1
                self.seen[key] = count, self.now_s
                if count >= self.after and key not in self.rows:
                    self.rows[key] = Twin(key, self.optimizer)
            has[b, f] = key in self.rows
            before[b, f] = self.rows[key].w if has[b, f] else Twin(key, self.optimizer).w
            if has[b, f]:
                sums[key] = sums[key] + grad_BFV[b, f] if key in sums else grad_BFV[b, f].copy()
        for key, total in sums.items():
            self.rows[key].learn(total)
            self.used[key] = self.now_s
            self.seen.pop(key, None)
        return has, before


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    after=st.sampled_from([1, 1, 2, 5]),
    expire_s=st.sampled_from([0, 3, 20]),
    keys=st.sampled_from([8, 60, 700]),
)
def test_a_table_does_as_plain_dicts_do(seed, kind, after, expire_s, keys):
    rng, optimizer = np.random.default_rng(seed), OPTIMIZERS[kind]
    ids = rng.integers(-(2**63), 2**63 - 1, keys)
    ids[0] = PAD

    def new() -> Table:
        return Table(
            dim=DIM,
            seed=SEED,
            scale=SCALE,
            optimizer=optimizer,
            admission=Admission(after),
            expire_after_ms=expire_s * 1_000,
        )

    table, model, now_s, forgotten = new(), Model(optimizer, after, expire_s), 1_700_000_000, set()
    for _ in range(12):
        now_s += int(rng.integers(-2, 8))
        keys_BF = ids[rng.integers(0, keys, (6, SLOTS))]
        grad_BFV = rng.normal(size=(6, SLOTS, 1 + DIM)).astype(np.float32)
        times_B = now_s * 1_000 - np.sort(rng.integers(0, 900, 6))
        alive = set(model.rows)
        has, before = model.step(keys_BF, grad_BFV, int(times_B.max()) // 1_000)
        rows_BF = table.rows_for(keys_BF, times_B)
        np.testing.assert_array_equal(rows_BF >= 0, has)
        assert (table.keys_of(rows_BF[has]) == keys_BF[has]).all()
        # 1e-5: NumPy adds the mean of squares in another order.
        np.testing.assert_allclose(table.gather(rows_BF, keys_BF), before, rtol=1e-5, atol=1e-5)
        touched = table.keys_of(table.update(rows_BF, grad_BFV, times_B))
        assert touched.tolist() == list(dict.fromkeys(keys_BF[has].tolist()))
        for _ in range(SWEEPS if rng.random() < 0.2 else 1):
            forgotten.update(table.expire(now_s * 1_000).tolist())
        if expire_s:
            model.advance(now_s)
        assert set(model.rows) <= set(table.keys().tolist())
        assert alive - set(model.rows) <= set(table.keys().tolist()) | forgotten
        if rng.random() < 0.3:
            copy, state = new(), table.state()
            copy.load(state)
            assert digest(copy.state()) == digest(state) and copy.nbytes <= table.nbytes + 8
            table = copy
    for _ in range(SWEEPS):
        table.expire(now_s * 1_000)
    wanted = sorted(model.rows)
    assert sorted(table.keys().tolist()) == wanted and len(table) == len(wanted)
    learnt = table.lookup(np.array(wanted, np.int64))
    np.testing.assert_allclose(learnt, [model.rows[key].w for key in wanted] or np.zeros((0, 1 + DIM)), atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(["exact", "sketch"]))
def test_how_batches_are_cut_does_not_change_who_is_admitted(seed, by):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 40, 400)
    found = []
    for cuts in ([], sorted(rng.integers(0, 400, 7))):
        table = Table(dim=1, seed=1, scale=0.1, admission=Admission(4, by))
        found.append(np.concatenate([table.rows_for(part) >= 0 for part in np.split(keys, cuts)]))
    np.testing.assert_array_equal(*found)
    for key in np.unique(keys):
        assert found[0][keys == key].tolist() == [i >= 3 for i in range((keys == key).sum())]


@settings(max_examples=4, deadline=None)
@given(seeds)
def test_what_is_learnt_does_not_depend_on_rows_or_on_the_sweep(seed):
    """Two tables take equal batches; one sweeps all each step, and is made anew from its state each time."""
    rng, tables = np.random.default_rng(seed), []
    steps = [(rng.integers(0, 50, (5, 3)), rng.normal(size=(5, 3, 3)).astype(np.float32), t) for t in range(1, 60, 5)]
    for sweeps in (0, SWEEPS):
        table = Table(dim=2, seed=1, scale=0.1, expire_after_ms=9_000)
        for keys_BF, grad_BFV, now_s in steps:
            times_B = np.full(5, now_s * 1_000)
            table.update(table.rows_for(keys_BF, times_B), grad_BFV, times_B)
            for _ in range(sweeps):
                table.expire(now_s * 1_000)
            if sweeps:
                other = Table(dim=2, seed=1, scale=0.1, expire_after_ms=9_000)
                other.load(table.state())
                table = other
        for _ in range(SWEEPS):
            table.expire(60_000)
        table._part = 0
        tables.append(table)
    assert digest(tables[0].state()) == digest(tables[1].state())


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(1, 60_000))
def test_the_index_splits_and_empties_without_a_mistake(seed, count):
    """Insert, remove half, insert others, remove all: each key is found exactly while it is there."""
    rng = np.random.default_rng(seed)
    keys = np.unique(rng.integers(-(2**63), 2**63 - 1, count))
    keys = rng.permutation(keys[keys != PAD])
    index = RowIndex(words=2)
    rows, fresh = index.insert(np.concatenate([keys, keys[:100]]))
    assert fresh.tolist() == list(range(len(keys))) and (rows[len(keys) :] == rows[: min(100, len(keys))]).all()
    gone, kept = np.split(keys, [len(keys) // 2])
    assert index.remove(np.concatenate([gone, gone])) == len(gone)
    assert (index.find(gone) < 0).all() and (index.keys_R[index.find(kept)] == kept).all()
    others = gone ^ 1
    others = others[(others != PAD) & ~np.isin(others, keys)]
    rows, fresh = index.insert(others)
    assert index.high == max(len(keys), len(kept) + len(others)), "freed rows are used first"
    assert (index.keys_R[index.find(others)] == others).all() and len(index) == len(kept) + len(others)
    index.arrays.words_RW[: index.high, 2] = 5
    swept = [index.sweep(part, oldest=6) for part in range(SWEEPS)]
    assert sorted(np.concatenate(swept).tolist()) == sorted([*kept.tolist(), *others.tolist()]) and len(index) == 0
    lines = index.arrays.lines_B[: 64 * int(index.arrays.head[3])]
    assert not lines[:, 15].any() and not index.arrays.keys_S.any(), "counts of entries and of passers-by end at 0"


def _alone(tables: list[Table], key: int) -> np.ndarray:
    return next(t.lookup(np.array([key]))[0] for t in tables if t.index.find(np.array([key]))[0] >= 0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 3), st.sampled_from(["exact", "sketch"]))
def test_distinct_ids_learn_as_all_places_do(seed, after, by):
    """Two slots share ids; with counted sightings an id may be admitted within a batch."""
    rng, admission = np.random.default_rng(seed), Admission(after, by)
    slots = [SlotTable(DIM, OPTIMIZERS["adagrad"])] * SLOTS
    several = Tables(slots, seed=SEED, scale=SCALE, admission=admission, expire_after_ms=3_000)
    one = Table(
        dim=DIM,
        seed=SEED,
        scale=SCALE,
        optimizer=OPTIMIZERS["adagrad"],
        admission=admission,
        expire_after_ms=3_000,
    )
    for step in range(8):
        keys_BF = rng.integers(0, 9, (7, SLOTS))
        keys_BF[rng.random(keys_BF.shape) < 0.1] = PAD
        grad_BFV = rng.normal(size=(7, SLOTS, 1 + DIM)).astype(np.float32)
        times_B = np.full(7, step * 1_000)
        rows_BF, ids = one.rows_for(keys_BF, times_B), several.distinct_ids(keys_BF, times_B)
        np.testing.assert_array_equal(ids.keys_U[ids.index_FB.T], keys_BF)
        np.testing.assert_array_equal(ids.rows_U[ids.index_FB.T] >= 0, rows_BF >= 0)
        for f in range(SLOTS):
            first, end = ids.begin_F[f : f + 2]
            entries = list(zip(ids.keys_U[first:end], ids.rows_U[first:end] >= 0, strict=True))
            assert len(set(entries)) == len(entries) and set(ids.index_FB[f]) == set(range(first, end))
        values_BFV = several.gather(ids)[ids.index_FB.T]
        np.testing.assert_allclose(values_BFV, one.gather(rows_BF, keys_BF), atol=1e-5)
        touched = one.keys_of(one.update(rows_BF, grad_BFV, times_B))
        assert set(several.update(ids, summed(ids, grad_BFV), times_B).tolist()) == set(touched.tolist())
        assert several.expire(step * 1_000).tolist() == one.expire(step * 1_000).tolist()
    keys = np.arange(9)
    np.testing.assert_allclose(several.lookup(keys), one.lookup(keys), atol=1e-5)


def summed(ids: DistinctIds, grad_BFV: np.ndarray) -> np.ndarray:
    """Return the gradients of distinct ids."""
    grad_UV = np.zeros((len(ids.keys_U), grad_BFV.shape[2]), np.float32)
    np.add.at(grad_UV, ids.index_FB.T, grad_BFV)
    return grad_UV


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_tables_by_slot_are_tables_side_by_side(seed):
    rng = np.random.default_rng(seed)
    wide, narrow = SlotTable(4, OPTIMIZERS["adagrad"]), SlotTable(0, OPTIMIZERS["ftrl"])
    both = Tables([wide, narrow, wide], seed=SEED, scale=SCALE, expire_after_ms=5_000)
    alone = [
        Table(dim=kind.dim, seed=SEED, scale=SCALE, optimizer=kind.optimizer, expire_after_ms=5_000)
        for kind in (wide, narrow)
    ]
    for step in range(8):
        keys_BF = rng.integers(0, 12, (5, 3)) * 3 + np.arange(3)
        keys_BF[0, step % 3] = PAD
        grad_BFV = rng.normal(size=(5, 3, 5)).astype(np.float32)
        times_B = np.full(5, step * 4_000)
        ids = both.distinct_ids(keys_BF, times_B)
        assert (ids.keys_U[ids.index_FB.T] == keys_BF).all()
        values_BFV = both.gather(ids)[ids.index_FB.T]
        assert not values_BFV[:, 1, 1:].any()
        looked = both.masked(both.lookup(keys_BF.reshape(-1)).reshape(5, 3, 5))
        np.testing.assert_array_equal(looked, values_BFV)
        touched = both.update(ids, summed(ids, grad_BFV), times_B)
        wanted = []
        for table, columns in zip(alone, ([0, 2], [1]), strict=True):
            rows = table.rows_for(keys_BF[:, columns], times_B)
            np.testing.assert_array_equal(table.gather(rows), values_BFV[:, columns, : 1 + table.dim])
            wanted.append(table.keys_of(table.update(rows, grad_BFV[:, columns, : 1 + table.dim], times_B)))
        assert sorted(touched.tolist()) == sorted(np.concatenate(wanted).tolist())
        np.testing.assert_allclose(both.lookup(touched)[:, 0], [_alone(alone, key)[0] for key in touched], atol=1e-5)
        gone = np.concatenate([table.expire(step * 4_000) for table in alone])
        assert both.expire(step * 4_000).tolist() == gone.tolist()
    again = Tables([wide, narrow, wide], seed=SEED, scale=SCALE, expire_after_ms=5_000)
    again.load(both.state())
    assert digest(again.state()) == digest(both.state()) and len(again) == len(both) == sum(map(len, alone))
    assert sorted(both.keys().tolist()) == sorted(np.concatenate([t.keys() for t in alone]).tolist())


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_equal_batches_give_equal_bits(kind):
    found = set()
    for _ in range(2):
        rng, table = np.random.default_rng(5), Table(dim=5, seed=3, scale=0.1, optimizer=OPTIMIZERS[kind])
        for step in range(10):
            rows_BF, times_B = table.rows_for(rng.integers(0, 500, (64, 4)), np.full(64, step)), np.full(64, step)
            table.update(rows_BF, rng.normal(size=(64, 4, 6)).astype(np.float32), times_B)
        found.add(digest(table.state()))
    assert len(found) == 1
