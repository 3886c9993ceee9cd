"""Goal: memory, bounds and formulas of the tables are as stated. Method: torch's optimizers, the papers' algorithms
written out, counts of bytes and of sightings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.contract.errors import ConfigRejected, Overloaded
from headrace.contract.spec import PAD
from headrace.trainer.model.digest import digest
from headrace.trainer.model.tables.admission import Admission
from headrace.trainer.model.tables.group import SlotTable, Tables
from headrace.trainer.model.tables.optimizers import Optimizer
from headrace.trainer.model.tables.row_index import SWEEPS, RowIndex
from headrace.trainer.model.tables.table import Table, initial_values

ROWS, DIM, STEPS = 20, 6, 30
KEYS = np.arange(1, ROWS + 1)


def learnt(optimizer: Optimizer, grads: np.ndarray) -> np.ndarray:
    """Return the rows' values after one step a gradient [S, R, V]."""
    table = Table(dim=DIM, seed=3, scale=0.5, optimizer=optimizer)
    for step, grad_RV in enumerate(grads):
        times_B = np.full(ROWS, step * 1_000)
        table.update(table.rows_for(KEYS[:, None], times_B), grad_RV[:, None], times_B)
    return table.lookup(KEYS)


def gradients(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(STEPS, ROWS, 1 + DIM)).astype(np.float32)


@pytest.mark.parametrize(
    ("optimizer", "twin"),
    [
        (Optimizer("adagrad", lr=0.1, l2=0.02), lambda w: torch.optim.Adagrad([w], 0.1, eps=1e-6, weight_decay=0.02)),
        (Optimizer("adam", lr=0.01), lambda w: torch.optim.Adam([w], 0.01)),
        (Optimizer("adam", lr=0.01, beta1=0.5, beta2=0.9), lambda w: torch.optim.Adam([w], 0.01, betas=(0.5, 0.9))),
    ],
)
def test_rows_learn_as_torch_does(optimizer, twin):
    grads = gradients()
    weight = torch.from_numpy(initial_values(KEYS, dim=DIM, seed=3, scale=0.5)).requires_grad_(True)
    steps = twin(weight)
    for grad in grads:
        weight.grad = torch.from_numpy(grad)
        steps.step()
    np.testing.assert_allclose(learnt(optimizer, grads), weight.detach().numpy(), atol=2e-5)


def test_ftrl_is_algorithm_1_of_its_paper():
    """Weights are worked out from z and n alone, in float64, before each gradient, as the paper writes it."""
    alpha, beta, l1, l2 = 0.2, 0.7, 1.5, 0.3
    grads = gradients(2)
    start = initial_values(KEYS, dim=DIM, seed=3, scale=0.5).astype(np.float64)
    z, n = -start * (beta / alpha + l2) - np.sign(start) * l1, np.zeros_like(start)

    def weights() -> np.ndarray:
        shrunk = -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / alpha + l2)
        return np.where(np.abs(z) <= l1, 0.0, shrunk)

    for g in grads.astype(np.float64):
        w = weights()
        sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / alpha
        z += g - sigma * w
        n += g * g
    found = learnt(Optimizer("ftrl", lr=alpha, beta=beta, l1=l1, l2=l2), grads)
    np.testing.assert_allclose(found, weights(), atol=1e-4)
    assert 0 < (found == 0).sum() < found.size and not found[np.abs(z) < l1 - 1e-3].any()


def test_ftrl_begins_where_the_others_do():
    table = Table(dim=DIM, seed=3, scale=0.5, optimizer=Optimizer("ftrl", l1=0.4))
    rows = table.rows_for(KEYS[:, None], np.zeros(ROWS, np.int64))
    start = initial_values(KEYS, dim=DIM, seed=3, scale=0.5)
    np.testing.assert_array_equal(table.gather(rows)[:, 0], start)
    table.update(rows, np.zeros((ROWS, 1, 1 + DIM), np.float32), np.zeros(ROWS, np.int64))
    np.testing.assert_allclose(table.lookup(KEYS), start, atol=1e-6)


@pytest.mark.parametrize("kind", ["adagrad", "adagrad_row"])
def test_squares_halve_in_their_half_life(kind):
    """One step, an idle hour of two half-lives, another step: the second sum is a quarter of the first and new."""
    table = Table(dim=1, seed=3, scale=0.5, optimizer=Optimizer(kind, half_life_ms=1_800_000))
    for now_ms, squares in ((1_000, 4.0), (3_601_000, 4.0 / 4 + 4.0)):
        times_B = np.full(1, now_ms)
        rows = table.rows_for(KEYS[:1, None], times_B)
        table.update(rows, np.full((1, 1, 2), 2.0, np.float32), times_B)
        assert table.states_RS[rows[0, 0]].tolist() == [squares, squares]
    with pytest.raises(ConfigRejected, match="half_life_ms"):
        Optimizer("ftrl", half_life_ms=5)


@pytest.mark.parametrize(("kind", "numbers"), [("adagrad_row", 2), ("adagrad", 9), ("ftrl", 18), ("adam", 19)])
def test_memory_is_as_stated(kind, numbers):
    """Payload: key 8, last use 4, 9 values, the optimizer's numbers; all else is at most a quarter of it."""
    table = Table(dim=8, seed=1, scale=0.1, optimizer=Optimizer(kind))
    assert table.bytes_per_row == 8 + 4 + 4 * 9 + 4 * numbers
    for total in range(5_000, 60_000, 1_700):
        table.rows_for(np.arange(1, total) << 20)
        assert table.bytes_per_row <= table.nbytes / len(table) <= 1.25 * table.bytes_per_row


def test_torch_sees_the_rows_themselves():
    table = Table(dim=4, seed=1, scale=0.1)
    rows = table.rows_for(KEYS)
    seen = torch.from_numpy(table.values_RV)
    assert seen.shape == (ROWS, 5) and seen.data_ptr() == table.values_RV.ctypes.data
    seen[int(rows[3])] = 5.0
    assert (table.lookup(KEYS[3:4]) == 5.0).all()


def test_growing_moves_no_row():
    table = Table(dim=4, seed=1, scale=0.1)
    table.rows_for(KEYS)
    place = table.values_RV.ctypes.data
    table.rows_for(np.arange(1, 50_000))
    assert table.values_RV.ctypes.data == place and len(table) == 49_999


def test_the_sketch_errs_as_seldom_as_stated():
    """Every key is seen once; at most 2 % may pass for seen twice. A key seen twice in a row always passes."""
    table = Table(dim=1, seed=1, scale=0.1, admission=Admission(2, "sketch"))
    keys = np.random.default_rng(1).integers(1, 2**62, 1_000_000)
    early = sum(int((table.rows_for(part) >= 0).sum()) for part in np.array_split(keys, 50))
    assert early <= 0.02 * len(keys) and table.nbytes < 5_000_000 + 100 * max(early, 1_000)
    some = np.arange(5, 500)
    table.rows_for(some)
    assert (table.rows_for(some) >= 0).all()


@pytest.mark.parametrize("by", ["exact", "sketch"])
def test_who_waits_scores_as_never_learnt_and_learns_nothing(by):
    table = Table(dim=4, seed=1, scale=0.1, admission=Admission(3, by), expire_after_ms=10_000)
    keys_BF, times_B, grad = KEYS[:, None], np.full(ROWS, 50_000), np.ones((ROWS, 1, 5), np.float32)
    for _ in range(2):
        rows = table.rows_for(keys_BF, times_B)
        assert (rows == -1).all() and len(table.update(rows, grad, times_B)) == 0
        np.testing.assert_array_equal(table.gather(rows, keys_BF)[:, 0], initial_values(KEYS, dim=4, seed=1, scale=0.1))
    other = Table(dim=4, seed=1, scale=0.1, admission=Admission(3, by), expire_after_ms=10_000)
    other.load(table.state())
    assert digest(other.state()) == digest(table.state())
    assert (other.rows_for(keys_BF, times_B) >= 0).all()


def test_an_expired_key_begins_anew_and_is_told():
    table = Table(dim=4, seed=1, scale=0.1, expire_after_ms=60_000)
    times_B, grad = np.full(ROWS, 1_000_000), np.ones((ROWS, 1, 5), np.float32)
    rows = table.rows_for(KEYS[:, None], times_B)
    table.update(rows, grad, times_B)
    for part in range(SWEEPS):
        assert len(table.expire(1_060_000)) == 0, f"part {part}: exactly the time is not beyond it"
    again = table.rows_for(KEYS[:5, None], np.full(5, 1_061_000))
    np.testing.assert_array_equal(table.gather(again)[:, 0], initial_values(KEYS[:5], dim=4, seed=1, scale=0.1))
    told = np.concatenate([table.expire(1_061_000) for _ in range(SWEEPS)])
    assert sorted(told.tolist()) == KEYS.tolist() and sorted(table.keys().tolist()) == KEYS[:5].tolist()
    table.rows_for(KEYS + 1_000, np.full(ROWS, 1_061_000))
    assert table.index.high == ROWS + 5, "freed rows are used again"


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigRejected, match="only ftrl knows l1"):
        Optimizer("adam", l1=0.1)
    with pytest.raises(ConfigRejected, match="not one of"):
        Optimizer("sgd")
    with pytest.raises(ConfigRejected, match=r"1\.\.255"):
        Admission(0)
    with pytest.raises(ConfigRejected, match="in seconds"):
        Table(dim=1, seed=1, scale=0.1, expire_after_ms=10)
    with pytest.raises(ConfigRejected, match="tables of 2 slots"):
        Tables([SlotTable(1, Optimizer()), SlotTable(2, Optimizer())], seed=1, scale=0.1).distinct_ids(KEYS[:, None])


def test_a_full_index_takes_nothing():
    index = RowIndex(words=1, rows_max=1_000)
    index.insert(np.arange(990))
    with pytest.raises(Overloaded, match="expire_after_ms"):
        index.insert(np.arange(2_000, 2_020))
    assert len(index) == 990 and (index.find(np.arange(2_000, 2_020)) < 0).all()
    assert (index.insert(np.arange(2_000, 2_010))[0] >= 0).all()


@pytest.mark.long
def test_millions_of_rows_come_and_go():
    """3 million keys, more than 4,096 segments, so that the sweep takes several segments a part."""
    table = Table(dim=0, seed=1, scale=0.1, expire_after_ms=1_000)
    keys = np.unique(np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 3_000_000))
    keys = keys[keys != PAD]
    for part in np.array_split(keys, 100):
        table.rows_for(part, np.full(1, 5_000))
    assert len(table) == len(keys) and (table.keys_of(table.rows_for(keys)) == keys).all()
    kept = keys[::3]
    table.update(table.rows_for(kept[:, None]), np.zeros((len(kept), 1, 1), np.float32), np.full(1, 9_000))
    told = np.concatenate([table.expire(9_000) for _ in range(SWEEPS)])
    assert np.sort(told).tolist() == np.setdiff1d(keys, kept).tolist()
    assert len(table) == len(kept) and (table.index.find(kept) >= 0).all() and (table.index.find(told) < 0).all()
