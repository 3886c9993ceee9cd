"""What serving computes, as one torch module that torch's exporters take: ids and numbers in, an answer a task out.

It is `headrace.trainer.model.scoring` and the look-up of serving again, in operations that ONNX has. Rows lie in the
module, sorted by key; an id is found by halving, in as many steps as the row count has bits. An id without a row has
the first values of its key, as serving gives it, and `PAD` nothing. Without rows the module takes their values in the
place of ids, and whoever calls it looks them up.

Axes: N rows of a call, F slots, E embedding numbers, V = 1 + E values of a row, D numbers, K keys, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.contract.formats.snapshot import Weights
from headrace.contract.functions import ModelShape
from headrace.contract.hashing import mix64
from headrace.contract.recipe import Recipe
from headrace.contract.spec import PAD, FeatureSpec
from headrace.trainer.model.moments import CLIP, NUMBERS, TARGETS
from headrace.trainer.model.objectives import LOG_LOSS, TWEEDIE, WEIGHTED, Z_HIGH, Z_LOW, kinds_of
from headrace.trainer.model.scoring import BESIDE, PLATT, dims_of

SLOTS, VALUES, NUMERIC = "slots", "values", "numeric"
"""Names of the inputs: ids int64 [N, F], or in their place values float32 [N, F, V]; numbers float32 [N, D]."""


def _signed(bits: int) -> int:
    """Return 64 bits as torch writes them: it has no unsigned integers that ONNX knows how to multiply."""
    return bits - 2**64 if bits >= 2**63 else bits


# SplitMix64, see `headrace.contract.hashing.mix64`.
_GOLDEN, _MIX1, _MIX2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_TWO_UNITS = 2.0 / 9007199254740992.0


class TorchScorer(torch.nn.Module):
    """Scores with fixed weights; gives a dictionary of float32 [N] by task, in the order of `recipe.heads`."""

    def __init__(self, recipe: Recipe, features: FeatureSpec, weights: Weights, *, has_rows: bool) -> None:
        """Take the weights; with `has_rows` the table too, whose keys must ascend."""
        super().__init__()
        self.recipe, self.features = recipe, features
        self.inputs = (SLOTS if has_rows else VALUES, NUMERIC)
        self.width = 1 + recipe.row_dim
        self.layers = _user_module(recipe, features, weights) if recipe.model == "module" else None
        own = BESIDE if self.layers is not None else weights.dense.keys()
        self._shapes = {name: weights.dense[name].shape for name in sorted(own & weights.dense.keys())}
        # An array without numbers is left out: torch's file format does not take it.
        self._names = frozenset(name for name in self._shapes if weights.dense[name].size)
        for name in sorted(self._names):
            self._keep(name, weights.dense[name])
        self._has_keys = has_rows and len(weights.keys_K) > 0
        if self._has_keys:
            self._keep("keys", weights.keys_K)
            self._keep("rows", weights.values_KV)
        if recipe.slot_dims and features.slots:
            used_FV = np.arange(self.width)[None, :] <= dims_of(recipe, features)[:, None]
            self._keep("used", used_FV.astype(np.float32))
        kind_T = kinds_of(recipe)
        self._is_value = bool((kind_T != LOG_LOSS).any())
        self._keep("is_log_loss", kind_T == LOG_LOSS)
        self._keep("is_exponential", (kind_T == WEIGHTED) | (kind_T == TWEEDIE))

    def _keep(self, name: str, array: npt.NDArray[np.generic]) -> None:
        self.register_buffer(f"kept_{name}", torch.from_numpy(np.array(array)))

    def _kept(self, name: str) -> Tensor:
        kept: Tensor = getattr(self, f"kept_{name}")
        return kept

    def forward(self, of_slots: Tensor, numeric: Tensor) -> dict[str, Tensor]:
        """Return what the model says of each task, by its name: float32 [N]."""
        values_NFV = of_slots if self.inputs[0] == VALUES else self._look_up(of_slots)
        if self.recipe.slot_dims and self.features.slots:
            values_NFV = values_NFV * self._kept("used")
        if NUMBERS in self._names:
            mean_D, inverse_D = self._kept(NUMBERS)
            # The last term is 0, and NaN where a number is not finite.
            numeric = torch.clamp((numeric - mean_D) * inverse_D, -CLIP, CLIP) + (numeric - numeric)
        if self.layers is None:
            logits_NT = self._logits(values_NFV, numeric)
        else:
            out = self.layers(values_NFV[:, :, 1:], values_NFV[:, :, 0], numeric)
            logits_NT = out.reshape(of_slots.shape[0], len(self.recipe.heads))
        said_NT = self._said(logits_NT)
        return {name: said_NT[:, t] for t, name in enumerate(self.recipe.heads)}

    def _look_up(self, slots_NF: Tensor) -> Tensor:
        """Return the values of each id: float32 [N, F, V]."""
        first_NFV = self._first_values(slots_NF)
        if not self._has_keys:
            return first_NFV
        keys_K, rows_KV = self._kept("keys"), self._kept("rows")
        keys = keys_K.shape[0]
        below_NF = torch.zeros_like(slots_NF)  # How many keys are not above an id.
        step = 1 << (keys.bit_length() - 1)
        while step:
            next_NF = below_NF + step
            here_NF = torch.clamp(next_NF, max=keys) - 1
            fits_NF = (next_NF <= keys) & (_taken(keys_K, here_NF) <= slots_NF)
            below_NF = torch.where(fits_NF, next_NF, below_NF)
            step >>= 1
        row_NF = torch.clamp(below_NF - 1, min=0)
        is_known_NF1 = (_taken(keys_K, row_NF) == slots_NF).unsqueeze(-1)
        return torch.where(is_known_NF1, torch.nn.functional.embedding(row_NF, rows_KV), first_NFV)

    def _first_values(self, slots_NF: Tensor) -> Tensor:
        """Return what a row that was never learnt holds; see `headrace.trainer.model.tables.table.initial_values`."""
        scale = float(np.float32(self.recipe.row_scale))
        zero_NF = torch.zeros(slots_NF.shape, dtype=torch.float32)
        if not scale or self.width == 1:
            return zero_NF.unsqueeze(-1).expand(-1, -1, self.width)
        seed = int(mix64(np.array([self.recipe.seed % 2**64], np.uint64)).view(np.int64)[0])
        state_NF, columns = _mixed(slots_NF ^ seed), [zero_NF]
        for _ in range(1, self.width):
            state_NF = _mixed(state_NF)
            columns.append(((_shifted(state_NF, 11).to(torch.float64) * _TWO_UNITS - 1.0) * scale).to(torch.float32))
        is_id_NF1 = (slots_NF != PAD).unsqueeze(-1)
        return torch.where(is_id_NF1, torch.stack(columns, -1), torch.zeros((), dtype=torch.float32))

    def _logits(self, values_NFV: Tensor, numeric_ND: Tensor) -> Tensor:
        """Return log-odds [N, T], as `headrace.trainer.model.scoring.logits` does."""
        recipe, bias_T = self.recipe, self._kept("bias")
        out_NT = bias_T + self._times(numeric_ND, "numeric")
        if recipe.model == "logistic":
            return out_NT + values_NFV.sum(1)
        mix_2T = self._kept("mix") if "mix" in self._names else None
        embedding_NFE, linear_N1 = values_NFV[:, :, 1:], values_NFV[:, :, 0].sum(1, keepdim=True)
        out_NT = out_NT + (linear_N1 if mix_2T is None else linear_N1 * mix_2T[0])
        if recipe.model != "dcn":
            sum_NE = embedding_NFE.sum(1)
            squares_N1 = (embedding_NFE * embedding_NFE).sum((1, 2)).unsqueeze(-1)
            pairs_N1 = 0.5 * ((sum_NE * sum_NE).sum(1, keepdim=True) - squares_N1)
            out_NT = out_NT + (pairs_N1 if mix_2T is None else pairs_N1 * mix_2T[1])
        if recipe.model == "fm":
            return out_NT
        x_NX = embedding_NFE.flatten(1)
        if self.features.numerics:
            x_NX = torch.cat([x_NX, numeric_ND], dim=1)
        if recipe.model == "dcn":
            out_NT = out_NT + self._times(self._crossed(x_NX), "cross")
        return out_NT + self._deep(x_NX)

    def _times(self, left_NX: Tensor, name: str) -> Tensor:
        """Return the product with the weights of that name; zeros where there is nothing to add up."""
        if name in self._names:
            return left_NX @ self._kept(name)
        return torch.zeros(left_NX.shape[0], self._shapes[name][1])

    def _crossed(self, x_NX: Tensor) -> Tensor:
        last_NX = x_NX
        if not x_NX.shape[1]:
            return x_NX
        for i in range(self.recipe.cross_layers):
            if f"cross_w{i}" in self._names:
                mixed_NX = last_NX @ self._kept(f"cross_w{i}")
            else:
                mixed_NX = (last_NX @ self._kept(f"cross_u{i}")) @ self._kept(f"cross_v{i}")
            last_NX = x_NX * (mixed_NX + self._kept(f"cross_b{i}")) + last_NX
        return last_NX

    def _deep(self, x_NX: Tensor) -> Tensor:
        last = len(self.recipe.hidden)
        for i in range(last):
            x_NX = torch.relu(self._times(x_NX, f"w{i}") + self._kept(f"b{i}"))
        return self._times(x_NX, f"w{last}") + self._kept(f"b{last}")

    def _said(self, logits_NT: Tensor) -> Tensor:
        """Return probabilities, and of value tasks values, as `headrace.trainer.model.scoring.said` does."""
        z_NT, has_targets = logits_NT, TARGETS in self._names
        targets_2T = self._kept(TARGETS) if has_targets else torch.zeros(2, 1)
        if has_targets:
            z_NT = z_NT + targets_2T[0]  # A value task's is not used.
        if self.recipe.delayed == "fake_negative_calibrated":
            return torch.exp(torch.clamp(z_NT, max=0.0))
        if PLATT in self._names:
            platt_2T = self._kept(PLATT)
            z_NT = z_NT * platt_2T[0] + platt_2T[1]
        out_NT = _sigmoid(z_NT)
        if has_targets and self._is_value:
            mean_T, scale_T = targets_2T[0], targets_2T[1]
            grown_NT = mean_T * torch.exp(torch.clamp(logits_NT, float(Z_LOW), float(Z_HIGH)))
            value_NT = torch.where(self._kept("is_exponential"), grown_NT, mean_T + scale_T * logits_NT)
            out_NT = torch.where(self._kept("is_log_loss"), out_NT, value_NT)
        return out_NT


def _taken(keys_K: Tensor, at_NF: Tensor) -> Tensor:
    return torch.index_select(keys_K, 0, at_NF.reshape(-1)).reshape(at_NF.shape)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return 64 bits moved to the right, zeros from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    z = bits + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _MIX1
    z = (z ^ _shifted(z, 27)) * _MIX2
    return z ^ _shifted(z, 31)


def _sigmoid(z: Tensor) -> Tensor:
    """Return probabilities that are as exact where they are small: torch's own, in onnxruntime, is an approximation."""
    small = torch.exp(-z.abs())
    return torch.where(z >= 0, torch.ones(()), small) / (1.0 + small)


def _user_module(recipe: Recipe, features: FeatureSpec, weights: Weights) -> torch.nn.Module:
    from headrace.trainer.model.layers.user_module import build

    module = build(recipe, ModelShape(features.slots, features.numerics, recipe.dim, len(recipe.heads)))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(weights.dense[name], np.float32)))
    return module.requires_grad_(False)


def example_inputs(scorer: TorchScorer, rows: int, keys_K: npt.NDArray[np.int64]) -> Sequence[Tensor]:
    """Return inputs of the right shapes, of `rows` rows, with some of these keys."""
    slots, numerics = scorer.features.slots, scorer.features.numerics
    numeric_ND = torch.linspace(-1.0, 1.0, rows * numerics).reshape(rows, numerics)
    if scorer.inputs[0] == VALUES:
        return torch.linspace(-0.1, 0.1, rows * slots * scorer.width).reshape(rows, slots, scorer.width), numeric_ND
    return torch.from_numpy(np.resize(np.append(keys_K[: rows * slots], [PAD, 1]), (rows, slots))), numeric_ND
