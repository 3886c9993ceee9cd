"""Goal: the learner is a function of what it is given, bit for bit. Method: hypothesis draws batches and seeds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import twin_logits
from trainer_world import as_one_blob

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Cursor
from headrace.contract.project import Recipe
from headrace.contract.spec import PAD, Categorical, FeatureSpec, Numeric
from headrace.trainer.commit.checkpoint import Checkpoint, Meta, decode_whole
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.digest import digest
from headrace.trainer.model.learner import TableLearner, make_learner
from headrace.trainer.model.scoring import sigmoid
from headrace.trainer.model.tables.table import KeyIndex, Table, initial_values

SPEC = FeatureSpec(features=(*(Categorical(field=f) for f in "abc"), *(Numeric(field=f) for f in "xy")))
RECIPE = Recipe(dim=4, hidden=(8, 4), init_scale=0.3, lr_table=0.1, lr_dense=0.01)
seeds = st.integers(0, 2**31)


def batch(seed: int, rows: int = 24, keys: int = 10) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.integers(0, keys, (rows, 3)) * 3 + np.arange(3) - 70,
        rng.normal(size=(rows, 2)).astype(np.float32),
        rng.integers(0, 2, rows).astype(np.float32),
        rng.random(rows).astype(np.float32) + 0.5,
        rng.integers(0, 1_000, rows),
    )


def trained(seed: int, steps: int = 4) -> TableLearner:
    learner = make_learner(RECIPE, SPEC)
    for i in range(steps):
        learner.learn(batch(seed + i))
    return learner


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_equal_seeds_give_equal_bits(seed):
    assert trained(seed).digest() == trained(seed).digest()
    assert trained(seed).digest() != trained(seed + 1).digest()


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_checkpoint_gives_back_the_bits_and_the_future(seed):
    learner = trained(seed)
    meta = Meta(run="r1", step=4, steps_offset=9, recipe="x", cursor=Cursor({"0": [1, 2]}, {"0": 3}))
    data = as_one_blob(Checkpoint(meta, learner.state(), {}))
    back = decode_whole(data)
    assert back is not None and back.meta == meta
    other = make_learner(RECIPE, SPEC)
    other.load(back.learner)
    assert other.digest() == learner.digest()
    other.learn(batch(seed + 99))
    learner.learn(batch(seed + 99))
    assert other.digest() == learner.digest()


def test_a_damaged_checkpoint_is_not_read():
    meta = Meta(run="r1", step=1, steps_offset=0, recipe="x", cursor=Cursor())
    data = bytearray(as_one_blob(Checkpoint(meta, trained(1).state(), {})))
    data[len(data) // 2] ^= 1
    assert decode_whole(bytes(data)) is None
    assert decode_whole(bytes(data[:100])) is None


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_numpy_scores_as_torch_does(seed):
    learner, b = trained(seed), batch(seed + 50)
    said = learner.predict(b)
    ids = learner.table.distinct_ids(b.slots_BF)
    wanted = sigmoid(learner.net.forward(learner.table.gather(ids), ids, b.numeric_BD))[:, 0]
    np.testing.assert_allclose(said, wanted, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_the_score_reported_is_that_of_before(seed):
    learner, b = trained(seed), batch(seed + 50)
    before = learner.predict(b)
    np.testing.assert_allclose(learner.learn(b).prediction_B, before, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_rows_learn_like_a_dense_twin(seed):
    """One step equals autograd through a dense embedding, summed by row, then row-wise Adagrad."""
    learner, b = make_learner(RECIPE, SPEC), batch(seed)
    keys, which = np.unique(b.slots_BF, return_inverse=True)
    start = initial_values(keys, dim=RECIPE.dim, seed=RECIPE.seed, scale=RECIPE.init_scale)
    dense = torch.from_numpy(start.copy()).requires_grad_(True)
    logits = twin_logits(RECIPE, learner.net.flat.weights, dense[torch.from_numpy(which.reshape(24, 3))], b)[:, 0]
    torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(b.label_B), weight=torch.from_numpy(b.weight_B), reduction="sum"
    ).backward()
    grad = dense.grad.numpy()
    wanted = start.copy()
    wanted[:, 0] -= RECIPE.lr_table * grad[:, 0] / (np.abs(grad[:, 0]) + 1e-6)
    norm = np.sqrt((grad[:, 1:] ** 2).mean(axis=1, keepdims=True))
    wanted[:, 1:] -= RECIPE.lr_table * grad[:, 1:] / (norm + 1e-6)
    learner.learn(b)
    # Adagrad's first step has the size lr whatever the gradient: a gradient near 0 turns its rounding into a step.
    clear = (np.abs(grad[:, 0]) > 1e-4) & (norm[:, 0] > 1e-5)
    np.testing.assert_allclose(learner.table.lookup(keys)[clear], wanted[clear], atol=2e-4)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_arrival_order_of_keys_does_not_matter(seed):
    keys = np.unique(np.random.default_rng(seed).integers(-(2**62), 2**62, 3_000))
    shuffled = np.random.default_rng(seed + 1).permutation(keys)
    tables = [Table(dim=4, seed=7, scale=0.1) for _ in range(2)]
    tables[0].rows_for(keys)
    for part in np.array_split(shuffled, 7):
        tables[1].rows_for(part)
    states = [{f"table.{n}": a for n, a in t.state().items()} for t in tables]
    assert digest(states[0]) == digest(states[1])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1).filter(lambda key: key != PAD), max_size=4_000))
def test_the_index_never_confuses_keys(keys):
    index, model = KeyIndex(), {}
    for part in np.array_split(np.array(keys, np.int64), 5):
        for key, row in zip(part.tolist(), index.insert(part).tolist(), strict=True):
            assert model.setdefault(key, row) == row
    assert len(index) == len(model) == len(set(model.values()))
    assert index.find(np.array(list(model), np.int64)).tolist() == list(model.values())


def test_refusals_leave_the_rest_alone():
    """NaN and infinity are refused row by row; the rest learns as if they had not been there."""
    clean, dirty = batch(3), batch(3)
    dirty.numeric_BD[4, 0] = np.nan
    dirty.label_B[5] = 2
    dirty.weight_B[6] = -1
    keep = np.ones(24, bool)
    keep[4:7] = False
    one, two = make_learner(RECIPE, SPEC), make_learner(RECIPE, SPEC)
    report = one.learn(dirty)
    two.learn(clean.where(keep))
    assert (report.learnt, report.refused) == (21, 3)
    assert np.isnan(report.prediction_B).tolist() == (~keep).tolist()
    assert one.digest() == two.digest()


def test_a_batch_of_another_spec_is_refused():
    b = batch(1)
    with pytest.raises(InvariantBroken, match="another specification"):
        make_learner(RECIPE, SPEC).learn(
            Batch(b.slots_BF[:, :2], b.numeric_BD, b.label_B, b.weight_B, b.event_time_ms_B)
        )


def test_scoring_does_not_import_torch():
    modules = "headrace.trainer.model.scoring, headrace.trainer.model.tables.table"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
