"""Goal: a pad weighs nothing, learns nothing. Method: padded batches against a model with those ids cut out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.contract.formats.snapshot import Manifest
from headrace.contract.project import Recipe
from headrace.contract.spec import PAD, Categorical, FeatureSpec, MultiValued, Numeric
from headrace.serving.model.shared_region import Meta, SharedModel
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import gradients
from headrace.trainer.model.learner import make_learner
from headrace.trainer.model.scoring import score, sigmoid
from headrace.trainer.model.tables.table import Table

SPEC = FeatureSpec(
    features=(Categorical(field="a"), MultiValued(field="b", values_max=3), Numeric(field="x"), Numeric(field="y"))
)
RECIPE = Recipe(dim=4, hidden=(8, 4), init_scale=0.3, lr_table=0.1, lr_dense=0.01)
seeds = st.integers(0, 2**31)


def padded(seed: int, rows: int = 24) -> Batch:
    rng = np.random.default_rng(seed)
    slots = rng.integers(1, 30, (rows, 4))
    slots[np.arange(4)[None, :] > rng.integers(0, 4, rows)[:, None]] = PAD
    return Batch(
        slots,
        rng.normal(size=(rows, 2)).astype(np.float32),
        rng.integers(0, 2, rows).astype(np.float32),
        np.ones(rows, np.float32),
        rng.integers(0, 100_000, rows),
    )


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_pad_never_gets_a_row_nor_is_published(seed):
    learner = make_learner(RECIPE, SPEC)
    for step in range(4):
        report = learner.learn(padded(seed + step))
        assert report.learnt == 24 and PAD not in report.touched_K
    assert PAD not in learner.table.state()["0.keys"] and PAD not in learner.weights().keys_K
    assert not learner.table.lookup(np.array([PAD])).any()
    other = make_learner(RECIPE, SPEC)
    other.load(learner.state())
    assert other.learn(padded(seed + 9)).touched_K.tolist() == learner.learn(padded(seed + 9)).touched_K.tolist()
    assert other.digest() == learner.digest()


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_other_rows_learn_as_if_pads_were_cut_out(seed):
    """One step of the torch twin whose pads are constant zeros gives the same gradients to every row."""
    learner, batch = make_learner(RECIPE, SPEC), padded(seed)
    ids = learner.table.distinct_ids(batch.slots_BF)
    values_UV, index_BF = learner.table.gather(ids), ids.index_FB.T
    assert not values_UV[index_BF][batch.slots_BF == PAD].any()
    logits_BT = learner.net.forward(values_UV, ids, batch.numeric_BD)
    grad_UV, _ = learner.net.backward(gradients(RECIPE, logits_BT[:, 0], batch.label_B, batch.weight_B)[:, None])
    before = learner.table.tables[0].values_RV.copy()
    touched = learner.table.update(ids, grad_UV, batch.event_time_ms_B)
    assert sorted(touched.tolist()) == sorted(set(batch.slots_BF[batch.slots_BF != PAD].tolist()))
    sums = np.zeros((len(learner.table), 5), np.float32)
    has = ids.rows_U >= 0
    np.add.at(sums, ids.rows_U[has], grad_UV[has])
    wanted = before[: len(sums), 0] - 0.1 * sums[:, 0] / (np.abs(sums[:, 0]) + 1e-6)
    clear = np.abs(sums[:, 0]) > 1e-4
    np.testing.assert_allclose(learner.table.tables[0].values_RV[: len(sums), 0][clear], wanted[clear], atol=2e-4)
    used_s = learner.table.tables[0].last_s_R[ids.rows_U[has]]
    assert (used_s == batch.event_time_ms_B.max() // 1_000).all()


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_trainer_and_serving_score_pads_alike(seed):
    learner, batch = make_learner(RECIPE, SPEC), padded(seed)
    learner.learn(padded(seed + 1))
    weights = learner.weights()
    shapes = {name: list(array.shape) for name, array in weights.dense.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = SharedModel(Path(folder) / "m", dim=4, rows_max=1_000, create=True)
        meta = Meta(Manifest(kind="snapshot", model="m", run="r", step=1, version="r-1"), "r-1", "{}", "{}", shapes)
        model.load_snapshot(weights, meta)
        served, _ = model.read(
            lambda view: score(
                RECIPE,
                SPEC,
                batch.slots_BF,
                batch.numeric_BD,
                lookup=lambda keys: view.lookup(keys, seed=RECIPE.seed, scale=RECIPE.init_scale),
                dense=view.dense(),
            )
        )
    np.testing.assert_array_equal(served[:, 0], learner.predict(batch))
    ids = learner.table.distinct_ids(batch.slots_BF)
    twin = sigmoid(learner.net.forward(learner.table.gather(ids), ids, batch.numeric_BD))
    np.testing.assert_allclose(served, twin, atol=1e-5)


def test_a_table_of_pads_alone_stays_empty():
    table = Table(dim=2, seed=1, scale=0.1)
    rows = table.rows_for(np.full((3, 2), PAD))
    assert (rows == -1).all() and len(table) == 0 and not table.gather(rows).any()
    assert len(table.update(rows, np.ones((3, 2, 3), np.float32), np.arange(3))) == 0
