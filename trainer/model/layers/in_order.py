"""Sample after sample: `logistic` and `fm` where each sample is scored with what those before it have taught.

How a stream is cut into batches changes nothing but roundings then, and the model is never a batch behind. One
compiled pass does all of it, on the rows where they lie. Formulas are those of `scoring`.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), V = 1 + E values of a row, D numbers,
P = 1 + D dense weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

from headrace.contract.recipe import Recipe
from headrace.trainer.model.batch import Batch
from headrace.trainer.model.calibration import Bools, corrections, gradient_of
from headrace.trainer.model.layers.kernels import BETA1, BETA2, adam_step
from headrace.trainer.model.layers.linear_models import LinearModel
from headrace.trainer.model.layers.norms import Norms
from headrace.trainer.model.tables.distinct_ids import DistinctIds
from headrace.trainer.model.tables.group import Tables
from headrace.trainer.model.tables.optimizers import KINDS, step_adagrad, step_adagrad_row, step_adam, step_ftrl
from headrace.trainer.model.tables.row_index import HEADER_WORDS, Float32s, Int32s, Int64s

_ADAGRAD_ROW, _ADAGRAD, _FTRL = KINDS.index("adagrad_row"), KINDS.index("adagrad"), KINDS.index("ftrl")


class Outcome(NamedTuple):
    """What came of a batch. A sample whose gradients overflow is refused by itself."""

    logit_B: Float32s
    """Each made before its sample was learnt, after those before it."""
    learnt_B: Bools
    touched_K: Int64s
    norms: Norms
    """Of all samples' gradients side by side."""


def learn_in_order(
    recipe: Recipe, tables: Tables, net: LinearModel, batch: Batch, ids: DistinctIds, prior_B: Float32s
) -> Outcome:
    """Score and learn each sample in turn, `prior_B` added to its log-odds.

    The tables must be of one kind and the recipe of one task.
    """
    table, samples = tables.tables[0], len(batch)
    logit_B, learnt_B = np.empty(samples, np.float32), np.empty(samples, np.bool_)
    learnt_U = np.zeros(len(ids.keys_U), np.bool_)
    offset, is_weighted = corrections(recipe)
    table.index.changing(ids.rows_U)
    rows, dense = _learn(
        table.index.arrays.words_RW,
        table.index.floats_RW,
        ids.rows_U,
        ids.index_FB,
        tables.gather(ids),
        np.ascontiguousarray(batch.numeric_BD),
        batch.label_B,
        batch.weight_B,
        prior_B,
        offset,
        is_weighted,
        recipe.model == "fm",
        KINDS.index(table.optimizer.kind),
        table.optimizer.numbers(),
        table.now_s,
        net.weight_P,
        net.first_P,
        net.second_P,
        np.float32(net.lr),
        net.step,
        logit_B,
        learnt_B,
        learnt_U,
    )
    net.step += int(learnt_B.sum())
    touched_R = table.optimizer.touch(
        table.index.arrays.words_RW, np.where(learnt_U, ids.rows_U, -1), now_s=table.now_s
    )
    return Outcome(logit_B, learnt_B, table.keys_of(touched_R), Norms(math.sqrt(rows), math.sqrt(dense)))


@numba.njit(cache=True, fastmath={"contract"})
def _learn(
    words_RW: Int32s, floats_RW: Float32s, rows_U: Int64s, index_FB: Int32s, values_UV: Float32s,
    numeric_BD: Float32s, label_B: Float32s, weight_B: Float32s, prior_B: Float32s, offset: np.float32,
    is_weighted: bool, is_fm: bool, kind: int, numbers: Float32s, now_s: int, weight_P: Float32s, first_P: Float32s,
    second_P: Float32s, lr: np.float32, steps: int, logit_B: Float32s, learnt_B: Bools, learnt_U: Bools,
) -> tuple[float, float]:  # fmt: skip
    """Write log-odds, what was learnt, and the weights; `values_UV` serves ids without a row.

    Returns the sums of the squares of the rows' and of the dense weights' gradients.
    """
    (slots, samples), values = index_FB.shape, values_UV.shape[1]
    rows_F, value_FV = np.empty(slots, np.int64), np.empty((slots, values), np.float32)
    grad_FV, sums_FV = np.empty((slots, values), np.float32), np.empty((slots, values), np.float32)
    touched_F, used_F = np.empty(slots + 1, np.int64), np.empty(slots, np.uint32)
    sum_V, grad_P = np.empty(values, np.float32), np.empty(weight_P.shape[0], np.float32)
    power1, power2 = BETA1**steps, BETA2**steps
    all_rows, all_dense = 0.0, 0.0
    for b in range(samples):
        logit = (
            prior_B[b]
            + weight_P[0]
            + _read(floats_RW, rows_U, values_UV, index_FB[:, b], is_fm, rows_F, value_FV, sum_V)
        )
        for d in range(numeric_BD.shape[1]):
            logit += numeric_BD[b, d] * weight_P[1 + d]
        logit_B[b] = logit
        g = gradient_of(logit, label_B[b], weight_B[b], offset, is_weighted)
        grad_P[0] = g
        for d in range(numeric_BD.shape[1]):
            grad_P[1 + d] = g * numeric_BD[b, d]
        for f in range(slots):
            grad_FV[f, 0] = g
            for v in range(1, values):
                grad_FV[f, v] = g * (sum_V[v] - value_FV[f, v])
        rows, dense = np.sum(grad_FV * grad_FV), np.sum(grad_P * grad_P)
        learnt_B[b] = np.isfinite(rows) and np.isfinite(dense) and np.isfinite(logit)
        if not learnt_B[b]:
            continue
        all_rows += np.float64(rows)
        all_dense += np.float64(dense)
        if kind == _ADAGRAD_ROW:
            step_adagrad_row(words_RW, floats_RW, rows_F, grad_FV, touched_F, used_F, sums_FV, now_s, numbers)
        elif kind == _ADAGRAD:
            step_adagrad(words_RW, floats_RW, rows_F, grad_FV, touched_F, used_F, sums_FV, now_s, numbers)
        elif kind == _FTRL:
            step_ftrl(words_RW, floats_RW, rows_F, grad_FV, touched_F, used_F, sums_FV, now_s, numbers)
        else:
            step_adam(words_RW, floats_RW, rows_F, grad_FV, touched_F, used_F, sums_FV, now_s, numbers)
        for f in range(slots):
            learnt_U[index_FB[f, b]] = True
        power1 *= BETA1
        power2 *= BETA2
        rate = lr * np.float32(math.sqrt(1.0 - power2) / (1.0 - power1))
        adam_step(weight_P, grad_P, first_P, second_P, rate, np.float32(1.0))
    return all_rows, all_dense


@numba.njit(cache=True, fastmath={"contract"})
def _read(
    floats_RW: Float32s,
    rows_U: Int64s,
    values_UV: Float32s,
    index_F: Int32s,
    is_fm: bool,
    rows_F: Int64s,
    value_FV: Float32s,
    sum_V: Float32s,
) -> np.float32:
    """Write a sample's rows, their values and the sum of these; return what they add to the log-odds."""
    squares = np.float32(0.0)
    sum_V[:] = np.float32(0.0)
    for f in range(index_F.shape[0]):
        row = rows_F[f] = rows_U[index_F[f]]
        for v in range(sum_V.shape[0]):
            value = floats_RW[row, HEADER_WORDS + v] if row >= 0 else values_UV[index_F[f], v]
            value_FV[f, v] = value
            sum_V[v] += value
            squares += value * value if v else np.float32(0.0)
    pairs = np.float32(0.0)
    if is_fm:
        pairs -= squares
        for v in range(1, sum_V.shape[0]):
            pairs += sum_V[v] * sum_V[v]
    return np.float32(sum_V[0] + np.float32(0.5) * pairs)
