"""The forward pass of every model in NumPy: what serving scores with. Imports no torch, but for a user's own module.

    logistic  logit_t = bias_t + x . numeric_t + sum_f w_ft
    fm        logit_t = bias_t + x . numeric_t + mix_0t sum_f w_f + mix_1t FM(v)
    deepfm    that of fm + MLP(x0)_t
    dcn       bias_t + x . numeric_t + mix_0t sum_f w_f + x_L . cross_t + MLP(x0)_t

    x0 = [v_1 .. v_F, x],  FM(v) = 1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2)
    x_(l+1) = x0 * (W_l x_l + b_l) + x_l,  W_l of full rank, or U_l V_l of `cross_rank`

w_f and v_f are a row's linear weight and embedding, x the D numbers, t a task. With one task `mix` is 1 and left out;
with several the tables, the pairs and the hidden layers are shared. `shapes_of` names the dense weights. What
learns (`layers/`) computes the same in torch or compiled; both agree within 1e-5.
What is said from the log-odds is told in `objectives`; numbers are standardized first where the recipe says so
(`moments`).

Axes: B samples, F slots, V = 1 + dim values of a row, E = dim, D numbers, X = F * E + D, T tasks.

Source: Rendle, "Factorization machines", ICDM 2010; Guo et al., "DeepFM", IJCAI 2017; Wang et al., "DCN V2", WWW 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numba
import numpy as np
import numpy.typing as npt

from headrace.contract.recipe import Recipe, slot_labels
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.moments import NUMBERS, TARGETS, as_learnt
from headrace.trainer.model.objectives import LOG_LOSS, Int8s, kinds_of, values_said

Float32s = npt.NDArray[np.float32]
Lookup = Callable[[npt.NDArray[np.int64]], Float32s]
"""Gives the values of keys: int64 [K] to float32 [K, 1 + dim]."""
Dense = Mapping[str, Float32s]
Shapes = dict[str, list[int]]

PLATT = "platt"
"""Name of the dense weights [2, T] that calibrate: scale and offset of the log-odds."""
BESIDE = frozenset({PLATT, NUMBERS, TARGETS})
"""Dense weights that the dense part does not learn; see `moments` for the last two."""


def shapes_of(recipe: Recipe, features: FeatureSpec) -> Shapes:
    """Return the shape of each dense weight by name, in the order in which they are kept."""
    tasks, numerics = len(recipe.heads), features.numerics
    if recipe.model == "module":
        from headrace.trainer.model.layers.user_module import (
            module_shapes,  # torch: only where the user's module needs it
        )

        shapes = module_shapes(recipe, features)
    else:
        shapes = {"bias": [tasks], "numeric": [numerics, tasks]}
        if tasks > 1 and recipe.model != "logistic":
            shapes["mix"] = [1 if recipe.model == "dcn" else 2, tasks]
        width = features.slots * recipe.dim + numerics
        if recipe.model == "dcn":
            for i in range(recipe.cross_layers):
                shapes |= _cross_shapes(i, width, recipe.cross_rank)
            shapes["cross"] = [width, tasks]
        if recipe.model in ("deepfm", "dcn"):
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise([width, *recipe.hidden, tasks])):
                shapes[f"w{i}"], shapes[f"b{i}"] = [fan_in, fan_out], [fan_out]
    if recipe.calibrate:
        shapes[PLATT] = [2, tasks]
    if recipe.has_moments:
        shapes[TARGETS] = [2, tasks]
    if recipe.standardize:
        shapes[NUMBERS] = [2, numerics]
    return shapes


def _cross_shapes(layer: int, width: int, rank: int) -> Shapes:
    matrices = {f"cross_u{layer}": [width, rank], f"cross_v{layer}": [rank, width]}
    return (matrices if rank else {f"cross_w{layer}": [width, width]}) | {f"cross_b{layer}": [width]}


def logits(recipe: Recipe, values_BFV: Float32s, numeric_BD: Float32s, dense: Dense) -> Float32s:
    """Return the log-odds of each task: float32 [B, T]."""
    if recipe.model == "module":
        from headrace.trainer.model.layers.user_module import module_logits  # as above

        return module_logits(recipe, values_BFV, numeric_BD, dense)
    batch, slots, width = values_BFV.shape
    out_BT: Float32s = numeric_BD @ dense["numeric"] + dense["bias"]
    if recipe.model == "logistic":
        out_BT += values_BFV.sum(axis=1)
        return out_BT
    embedding_BFE = values_BFV[:, :, 1:]
    linear_B1 = values_BFV[:, :, 0].sum(axis=1)[:, None]
    out_BT += linear_B1 * dense["mix"][0] if "mix" in dense else linear_B1
    if recipe.model != "dcn":
        sum_BE = embedding_BFE.sum(axis=1)
        squares_B = (embedding_BFE * embedding_BFE).sum(axis=(1, 2))
        pairs_B1 = (0.5 * ((sum_BE * sum_BE).sum(axis=1) - squares_B))[:, None]
        out_BT += pairs_B1 * dense["mix"][1] if "mix" in dense else pairs_B1
    if recipe.model == "fm":
        return out_BT
    x_BX = np.concatenate([embedding_BFE.reshape(batch, slots * (width - 1)), numeric_BD], axis=1)
    if recipe.model == "dcn":
        out_BT += _crossed(x_BX, recipe.cross_layers, dense) @ dense["cross"]
    out_BT += _deep(x_BX, len(recipe.hidden), dense)
    return out_BT


def _crossed(x_BX: Float32s, layers: int, dense: Dense) -> Float32s:
    last_BX = x_BX
    for i in range(layers):
        if f"cross_w{i}" in dense:
            mixed_BX = last_BX @ dense[f"cross_w{i}"]
        else:
            mixed_BX = (last_BX @ dense[f"cross_u{i}"]) @ dense[f"cross_v{i}"]
        last_BX = x_BX * (mixed_BX + dense[f"cross_b{i}"]) + last_BX
    return last_BX


def _deep(x_BX: Float32s, layers: int, dense: Dense) -> Float32s:
    for i in range(layers):
        x_BX = np.maximum(x_BX @ dense[f"w{i}"] + dense[f"b{i}"], 0)
    out_BT: Float32s = x_BX @ dense[f"w{layers}"] + dense[f"b{layers}"]
    return out_BT


def sigmoid(logits_N: Float32s) -> Float32s:
    """Return probabilities without overflow: float32, shaped as the log-odds."""
    out_N = np.empty(logits_N.shape, np.float32)
    _sigmoid(np.ascontiguousarray(logits_N, np.float32).reshape(-1), out_N.reshape(-1))
    return out_N


@numba.njit(cache=True)
def _sigmoid(logits_N: Float32s, out_N: Float32s) -> None:
    one = np.float32(1.0)
    for i in range(logits_N.shape[0]):
        small = np.exp(-abs(logits_N[i]))
        out_N[i] = one / (one + small) if logits_N[i] >= 0 else small / (one + small)


def said(
    recipe: Recipe, logits_NT: Float32s, *, platt_2T: Float32s | None, targets_2T: Float32s | None, kind_T: Int8s
) -> Float32s:
    """Return what the model says from its log-odds: probabilities, and of value tasks values; float32 [..., T].

    With delayed `fake_negative_calibrated` the log-odds are those of b = q / (1 + q), so q = exp(logit), at most 1.
    With `calibrate` they are scaled and moved first by `platt_2T`, which is None without it.

    Args:
        targets_2T: `moments.TARGETS`, None where the recipe has none.
        kind_T: see `objectives.kinds_of`.
    """
    raw_NT = logits_NT
    if targets_2T is not None:
        logits_NT = (logits_NT + np.where(kind_T == LOG_LOSS, targets_2T[0], 0)).astype(np.float32)
    if recipe.delayed == "fake_negative_calibrated":
        out_NT: Float32s = np.exp(np.minimum(logits_NT, 0)).astype(np.float32)
        return out_NT
    out_NT = sigmoid(logits_NT if platt_2T is None else logits_NT * platt_2T[0] + platt_2T[1])
    if targets_2T is not None and (kind_T != LOG_LOSS).any():
        out_NT = np.where(kind_T == LOG_LOSS, out_NT, values_said(kind_T, raw_NT, targets_2T))
    return out_NT


def dims_of(recipe: Recipe, features: FeatureSpec) -> npt.NDArray[np.int64]:
    """Return how many numbers of an embedding each slot uses: int64 [F]."""
    return np.array([recipe.slot_dims.get(label, recipe.row_dim) for label in slot_labels(features)], np.int64)


def score(
    recipe: Recipe,
    features: FeatureSpec,
    slots_BF: npt.NDArray[np.int64],
    numeric_BD: Float32s,
    *,
    lookup: Lookup,
    dense: Dense,
) -> Float32s:
    """Return what the model says of each task, in the order of `recipe.heads`: float32 [B, T]. That is the probability
    of a positive, or the expected value for a task that learns one."""
    batch, slots = slots_BF.shape
    values_NV = lookup(np.ascontiguousarray(slots_BF).reshape(-1))
    values_BFV = values_NV.reshape(batch, slots, values_NV.shape[-1])
    if recipe.slot_dims:
        used_FV = np.arange(values_BFV.shape[2])[None, :] <= dims_of(recipe, features)[:, None]
        values_BFV = np.where(used_FV, values_BFV, np.float32(0))
    with np.errstate(over="ignore", invalid="ignore"):  # Numbers that no model takes score as NaN.
        if NUMBERS in dense:
            numeric_BD = as_learnt(numeric_BD, dense[NUMBERS])
        logits_BT = logits(recipe, values_BFV, numeric_BD, dense)
        return said(
            recipe, logits_BT, platt_2T=dense.get(PLATT), targets_2T=dense.get(TARGETS), kind_T=kinds_of(recipe)
        )
