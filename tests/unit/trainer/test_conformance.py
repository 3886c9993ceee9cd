"""Goal: every learner keeps the contract of `trainer.model.learner.Learner`. Method: one suite over all of them: each
model that a recipe can name with each optimizer, with several tasks, with each choice of a recipe; and River's."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import pytest
import torch
from learner_world import RECIPES, SPEC, batch_of, recipe_of, twin_logits
from river_learner import RiverLearner

from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.contract.interfaces.blobs import whole
from headrace.contract.recipe import Model, Optimizer
from headrace.contract.spec import PAD
from headrace.trainer.commit.parts import decode_part, encode_part
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.learner import device_of, make_learner
from headrace.trainer.model.moments import NUMBERS, as_learnt
from headrace.trainer.model.objectives import kinds_of, value_tasks
from headrace.trainer.model.scoring import PLATT, TARGETS, logits, said, shapes_of
from headrace.trainer.model.tables.distinct_ids import DistinctIds, distinct

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))]
# Rows on the device: all kinds of rows and of dense parts, a cache that is too small for what comes.
CACHED = {
    f"{name}-cached": recipe
    for name, recipe in RECIPES.items()
    if recipe.model in ("deepfm", "dcn", "module")
    and (recipe.optimizer != "adagrad_row" or name.split("-")[1] in ("slots", "admitted", "average", "half"))
}
RECIPES = RECIPES | CACHED
MAKERS = {
    **{
        name: lambda device, r=recipe, rows=11 if name in CACHED else 0: make_learner(
            r, SPEC, device=device, device_rows=rows, ordered=r.heads if r.ordered_from_ms else ()
        )
        for name, recipe in RECIPES.items()
    },
    "river": lambda device: RiverLearner(recipe_of("logistic"), SPEC),
}
IN_ORDER = {name: recipe.updates == "sample" for name, recipe in RECIPES.items()} | {"river": True}
TASKS = {name: len(recipe.heads) for name, recipe in RECIPES.items()} | {"river": 1}

every = pytest.mark.parametrize("name", list(MAKERS))
ours = pytest.mark.parametrize("name", list(RECIPES))
on = pytest.mark.parametrize("device", DEVICES)


def trained(name: str, device: str, seed: int = 1, steps: int = 4):
    learner = MAKERS[name](device)
    for i in range(steps):
        learner.learn(batch_of(seed + i, tasks=TASKS[name]))
    return learner


def test_every_model_and_optimizer_is_in_the_suite():
    assert {(r.model, r.optimizer) for r in RECIPES.values()} >= {
        (model, kind) for model in get_args(Model) for kind in get_args(Optimizer)
    }


@every
@on
def test_equal_batches_give_equal_bits_and_others_do_not(name, device):
    assert trained(name, device).digest() == trained(name, device).digest()
    assert trained(name, device).digest() != trained(name, device, seed=2).digest()


@ours
@on
def test_another_seed_begins_elsewhere(name, device):
    if RECIPES[name].model == "logistic":
        return  # begins at zero whatever the seed
    recipe = RECIPES[name]
    other = make_learner(
        type(recipe)(**({f: getattr(recipe, f) for f in recipe.__struct_fields__} | {"seed": 8})), SPEC
    )
    keys = np.arange(10)
    assert not np.array_equal(other.weights(keys).values_KV, MAKERS[name](device).weights(keys).values_KV)


@every
@on
def test_the_order_within_a_batch_matters_as_rounding_the_order_of_batches_does(name, device):
    """Tables step once a batch, so samples within one may trade places up to the order of float sums. (Where each
    sample is a step, as with River, and where a row's admission counts sightings, order within a batch counts.)"""
    one, two, three = (MAKERS[name](device) for _ in range(3))
    first, second = batch_of(1, tasks=TASKS[name]), batch_of(2, tasks=TASKS[name])
    order = np.random.default_rng(3).permutation(len(first))
    for learner, batches in ((one, (first, second)), (two, (second, first))):
        for batch in batches:
            learner.learn(batch)
    assert one.digest() != two.digest()
    if IN_ORDER[name] or RECIPES[name].admit_after > 1:
        return
    three.learn(Batch(*(getattr(first, f)[order] for f in Batch.__dataclass_fields__)))
    alone = MAKERS[name](device)
    alone.learn(first)
    keys = np.unique(first.slots_BF[first.slots_BF != PAD])
    # A first step of Adagrad or Adam has the size lr whatever the gradient: rounding near 0 may become a step.
    away = np.abs(alone.weights(keys).values_KV - three.weights(keys).values_KV) > 1e-3
    assert away.mean() < 0.02


@every
@on
def test_scoring_changes_nothing_and_learning_reports_the_score_of_before(name, device):
    learner, batch = trained(name, device), batch_of(50, tasks=TASKS[name])
    before, digest = learner.predict(batch), learner.digest()
    assert before.dtype == np.float32 and before.shape == (len(batch),) and learner.digest() == digest
    value_T = value_tasks(RECIPES[name]) if name in RECIPES else np.zeros(1, bool)
    assert ((before >= 0) & (before <= 1) | value_T[batch.task_B]).all() and np.isfinite(before).all()
    told = 1 if IN_ORDER[name] and name != "river" else len(batch)
    np.testing.assert_allclose(learner.learn(batch).prediction_B[:told], before[:told], atol=1e-5)
    assert learner.digest() != digest


@pytest.mark.parametrize("name", [name for name in RECIPES if IN_ORDER[name]])
def test_sample_after_sample_is_batches_of_one(name):
    """The same recipe learning by batch, one sample each; and however a batch is cut."""
    recipe = RECIPES[name]
    alone = make_learner(msgspec.structs.replace(recipe, updates="batch"), SPEC)
    whole, cut = make_learner(recipe, SPEC), make_learner(recipe, SPEC)
    for seed in range(4):
        batch = batch_of(seed, from_ms=seed * 1_000)
        # Within a batch time stands still, and so it does for batches of one.
        batch.event_time_ms_B[:] = seed * 1_000
        said = whole.learn(batch).prediction_B
        parts = [batch.where(np.arange(len(batch)) == i) for i in range(len(batch))]
        if not recipe.calibrate:  # The calibration learns from the mean of a batch.
            wanted = np.concatenate([alone.learn(part).prediction_B for part in parts])
            np.testing.assert_allclose(said, wanted, atol=1e-5)
            some = np.arange(len(batch)) < 7
            found = [cut.learn(batch.where(keep)).prediction_B for keep in (some, ~some)]
            np.testing.assert_allclose(np.concatenate(found), said, atol=1e-5)
    if not recipe.calibrate:
        keys = np.sort(whole.weights().keys_K)
        for other in (alone, cut):
            np.testing.assert_array_equal(np.sort(other.weights().keys_K), keys)
            np.testing.assert_allclose(other.weights(keys).values_KV, whole.weights(keys).values_KV, atol=1e-4)
            np.testing.assert_allclose(other.dense()["numeric"], whole.dense()["numeric"], atol=1e-5)


@every
@on
def test_a_checkpoint_gives_back_the_bits_and_the_future(name, device):
    learner = trained(name, device)
    other = MAKERS[name](device)
    other.load(decode_part(whole(encode_part("r1", learner.state()).pieces)))
    assert other.digest() == learner.digest() and other.step == 4 and other.rows == learner.rows
    for seed in (98, 99):
        reports = [x.learn(batch_of(seed, tasks=TASKS[name])) for x in (learner, other)]
        assert sorted(reports[0].touched_K.tolist()) == sorted(reports[1].touched_K.tolist())
    assert other.digest() == learner.digest()


@every
@on
def test_what_is_not_finite_is_refused_counted_and_never_learnt(name, device):
    tasks = TASKS[name]
    dirty = batch_of(3, tasks=tasks)
    dirty.numeric_BD[4, 0], dirty.numeric_BD[5, 1] = np.nan, np.inf
    too_much = np.inf if name in RECIPES and RECIPES[name].values else 2
    dirty.label_B[6], dirty.label_B[7], dirty.label_B[8] = too_much, np.nan, -np.inf
    dirty.weight_B[9], dirty.weight_B[10], dirty.weight_B[11] = -1, np.nan, np.inf
    dirty.task_B[12] = tasks
    keep = np.ones(len(dirty), bool)
    keep[4:13] = False
    one, two = trained(name, device), trained(name, device)
    report = one.learn(dirty)
    two.learn(batch_of(3, tasks=tasks).where(keep))
    assert (report.learnt + report.sampled_out, report.refused) == (len(dirty) - 9, 9)
    assert np.isnan(report.prediction_B).tolist() == (~keep).tolist()
    assert one.digest() == two.digest()
    nothing = one.learn(dirty.where(~keep))
    assert (nothing.learnt, nothing.refused, len(nothing.touched_K)) == (0, 9, 0)


@ours
@on
def test_a_batch_whose_gradients_overflow_is_refused_whole(name, device):
    """And each of its samples, where each is a step."""
    learner, batch = trained(name, device), batch_of(7, tasks=TASKS[name])
    batch.numeric_BD[3, 0] = 3e38
    batch.weight_B[:] = 3e38
    batch.label_B[:] = 1 - np.round(learner.predict(batch))
    keys = np.unique(batch.slots_BF)
    before = learner.weights(keys)
    report = learner.learn(batch)
    after = learner.weights(keys)
    assert report.learnt == 0 and report.refused == len(batch) - report.sampled_out and not len(report.touched_K)
    np.testing.assert_array_equal(before.values_KV, after.values_KV)
    assert all(np.array_equal(before.dense[n], after.dense[n]) for n in before.dense)


@every
@on
def test_touched_keys_are_all_that_changed_and_pads_never_are(name, device):
    learner, batch = trained(name, device), batch_of(60, keys=30, tasks=TASKS[name])
    keys = np.unique(np.concatenate([learner.weights().keys_K, batch.slots_BF.reshape(-1)]))
    before = learner.weights(keys).values_KV
    touched = learner.learn(batch).touched_K
    changed = keys[(learner.weights(keys).values_KV != before).any(axis=1)]
    assert set(changed.tolist()) <= set(touched.tolist()) <= set(batch.slots_BF.reshape(-1).tolist())
    assert PAD not in touched and PAD not in learner.weights().keys_K


@every
@on
def test_new_ids_appear(name, device):
    learner = trained(name, device)
    before = learner.rows
    for seed in (70, 71, 72, 73):
        batch = batch_of(seed, keys=3, tasks=TASKS[name])
        learner.learn(
            Batch(batch.slots_BF + 1_000_000, *(getattr(batch, f) for f in list(Batch.__dataclass_fields__)[1:]))
        )
    assert learner.rows > before


@on
@pytest.mark.parametrize("name", ["deepfm-admitted", "fm-sketch"])
def test_ids_are_admitted_by_sightings_and_vanish_unused(name, device):
    learner, after = MAKERS[name](device), RECIPES[name].admit_after
    for i in range(1, after + 1):
        assert learner.rows == 0
        one = batch_of(5, rows=1)
        assert not len(learner.learn(one).touched_K) or i == after
    assert learner.rows == len(np.unique(one.slots_BF[one.slots_BF != PAD]))
    initial = MAKERS[name](device).weights(one.slots_BF[0]).values_KV
    assert not np.array_equal(learner.weights(one.slots_BF[0]).values_KV, initial)
    gone: set[int] = set()
    for i in range(4_096):
        touched = learner.learn(batch_of(6, rows=1, from_ms=10_000 + i)).touched_K
        gone |= set(touched.tolist())
    assert set(one.slots_BF[one.slots_BF != PAD].tolist()) <= gone
    np.testing.assert_array_equal(learner.weights(one.slots_BF[0]).values_KV, initial)


@on
@pytest.mark.parametrize("model", get_args(Model))
def test_memory_is_bounded_where_unused_ids_expire(model, device):
    """Ids of 50 times the rows that are in use at once pass through."""
    learner = make_learner(recipe_of(model, expire_after_ms=1_000), SPEC, device=device)
    most = 0
    for i in range(60):
        batch = batch_of(i, keys=50, from_ms=i * 1_000)
        learner.learn(
            Batch(batch.slots_BF + 1_000 * i, *(getattr(batch, f) for f in list(Batch.__dataclass_fields__)[1:]))
        )
        learner.table.expire(0)
        for _ in range(4_095):
            learner.table.expire(i * 1_000)
        most = max(most, learner.rows)
    assert most < 50 * SPEC.slots * 5 and learner.table.nbytes < 2_000_000


@on
@pytest.mark.parametrize(
    "name", [n for n, r in RECIPES.items() if r.model != "module" and r.optimizer == "adagrad_row"]
)
def test_gradients_are_those_of_autograd_on_a_dense_twin(name, device):
    recipe, learner = RECIPES[name], trained(name, device)
    batch = batch_of(80, tasks=TASKS[name])
    ids = learner.table.distinct_ids(batch.slots_BF, batch.event_time_ms_B)
    values_UV = learner.table.gather(ids)
    logits_BT = learner.net.forward(values_UV, ids, batch.numeric_BD)
    # Any gradient of the log-odds will do, and this one is not symmetric in the tasks.
    grad_BT = np.random.default_rng(81).normal(size=logits_BT.shape).astype(np.float32)
    grad_UV, norms = learner.net.backward(grad_BT)
    grad_UV = torch.as_tensor(grad_UV).cpu().numpy()
    twin = torch.as_tensor(values_UV).cpu().double().requires_grad_(True)
    weights = {n: torch.from_numpy(w).double().requires_grad_(True) for n, w in learner.net.dense().items()}
    exact = Batch(batch.slots_BF, batch.numeric_BD.astype(np.float64), *(getattr(batch, f) for f in ["label_B"] * 3))
    wanted = twin_logits(recipe, weights, twin[torch.from_numpy(ids.index_FB).T], exact)
    wanted.backward(torch.from_numpy(grad_BT.astype(np.float64)))
    np.testing.assert_allclose(norms.rows, np.linalg.norm(grad_UV), rtol=1e-4)
    np.testing.assert_allclose(logits_BT, wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_UV, twin.grad.numpy(), rtol=1e-4, atol=1e-4)
    is_linear = recipe.model in ("logistic", "fm")
    grads = (
        learner.net.named(learner.net.grad_P) if is_linear else {k: g.cpu() for k, g in learner.net.flat.grads.items()}
    )
    for key, weight in weights.items():
        np.testing.assert_allclose(grads[key], weight.grad, rtol=1e-4, atol=1e-4, err_msg=key)


@ours
def test_serving_scores_without_torch_as_the_trainer_does(name):
    recipe, learner = RECIPES[name], trained(name, "cpu")
    batch = batch_of(90, tasks=TASKS[name])
    weights = learner.weights()
    assert {n: list(a.shape) for n, a in weights.dense.items()} == shapes_of(recipe, SPEC)
    values_BFV = learner.table.lookup(batch.slots_BF.reshape(-1)).reshape(*batch.slots_BF.shape, -1)
    numeric_BD = as_learnt(batch.numeric_BD, weights.dense[NUMBERS]) if recipe.standardize else batch.numeric_BD
    newest_BT = logits(recipe, values_BFV, numeric_BD, learner.net.dense())
    keys_U, index_FB, begin_F = distinct(batch.slots_BF)
    values_UV, ids = learner.table.lookup(keys_U), DistinctIds(keys_U, np.full(len(keys_U), -1), index_FB, begin_F)
    np.testing.assert_allclose(newest_BT, learner.net.forward(values_UV, ids, numeric_BD), atol=1e-5)
    # What is published: positives that wait are felt in it.
    served_BFV = learner.lookup(batch.slots_BF.reshape(-1)).reshape(values_BFV.shape)
    said_BT = logits(recipe, served_BFV, numeric_BD, weights.dense)
    beside = {"platt_2T": weights.dense.get(PLATT), "targets_2T": weights.dense.get(TARGETS)}
    own_B = said(recipe, said_BT, **beside, kind_T=kinds_of(recipe))[np.arange(len(batch)), batch.task_B]
    np.testing.assert_allclose(own_B, learner.predict(batch), atol=1e-6)


@pytest.mark.parametrize("model", get_args(Model))
def test_a_task_trains_its_own_head_and_the_shared_rows(model):
    learner = make_learner(recipe_of(model, tasks=("click", "like", "dwell")), SPEC)
    batch = batch_of(1)
    of_like = Batch(*(getattr(batch, f) for f in list(Batch.__dataclass_fields__)[:5]), np.ones(len(batch), np.int8))
    before = learner.dense()
    for _ in range(3):
        learner.learn(of_like)
    after = learner.dense()
    last = "last.bias" if model == "module" else "bias"
    moved = after[last] != before[last]
    assert moved.tolist() == [False, True, False]
    assert learner.rows > 0 and (learner.predict(batch) != learner.predict(of_like)).all()


def test_a_batch_of_another_spec_is_refused():
    b = batch_of(1)
    with pytest.raises(InvariantBroken, match="another specification"):
        make_learner(recipe_of("fm"), SPEC).learn(
            Batch(b.slots_BF[:, :2], b.numeric_BD, b.label_B, b.weight_B, b.event_time_ms_B)
        )


def test_the_device_is_what_there_is():
    assert device_of("cpu") == "cpu" and device_of("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigRejected, match=r"train\.device"):
            device_of("cuda")
