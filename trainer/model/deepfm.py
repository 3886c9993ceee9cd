"""The dense half of DeepFM in torch: forward, backward, Adam. The only module of `trainer.model` that imports torch.

Weights and the formula are those of `scoring`. Axes: B samples, F slots, V = 1 + dim, D dense numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from headrace.trainer.model.scoring import Float32s

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class DeepFM:
    """Dense weights and their Adam moments; rows of the tables come in with each batch and their gradients go out."""

    def __init__(self, *, slots: int, numerics: int, dim: int, hidden: tuple[int, ...], lr: float, seed: int) -> None:
        self.lr, self.step = lr, 0
        widths = [slots * dim + numerics, *hidden, 1]
        self.layers = len(widths) - 1
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, torch.Tensor] = {"bias": torch.zeros(1), "numeric": torch.zeros(numerics)}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            # He's scale for ReLU layers; the last one begins small, so that the first answers are the linear part's.
            scale = math.sqrt(2 / max(fan_in, 1)) * (0.1 if i == self.layers - 1 else 1.0)
            self.weights[f"w{i}"] = torch.randn(fan_in, fan_out, generator=generator) * scale
            self.weights[f"b{i}"] = torch.zeros(fan_out)
        self._first = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self._second = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)

    def logits(self, values_BFV: torch.Tensor, numeric_BD: torch.Tensor) -> torch.Tensor:
        """Return float32 [B]; see `scoring` for the formula."""
        w = self.weights
        embedding_BFE = values_BFV[:, :, 1:]
        sum_BE = embedding_BFE.sum(dim=1)
        fm_B = 0.5 * ((sum_BE * sum_BE).sum(dim=1) - (embedding_BFE * embedding_BFE).sum(dim=(1, 2)))
        x_BX = torch.cat([embedding_BFE.flatten(1), numeric_BD], dim=1)
        for i in range(self.layers):
            x_BX = x_BX @ w[f"w{i}"] + w[f"b{i}"]
            if i < self.layers - 1:
                x_BX = torch.relu(x_BX)
        return values_BFV[:, :, 0].sum(dim=1) + numeric_BD @ w["numeric"] + w["bias"] + fm_B + x_BX[:, 0]

    def gradients(
        self, values_BFV: Float32s, numeric_BD: Float32s, label_B: Float32s, weight_B: Float32s
    ) -> tuple[Float32s, Float32s, dict[str, torch.Tensor]]:
        """Return logits [B], gradients of the rows [B, F, V] and of the dense weights.

        Rows get the gradient of the sum of the weighted log losses, so that a row's step does not depend on how many
        others share its batch; dense weights get that of the mean.
        """
        values = torch.from_numpy(values_BFV).requires_grad_(True)
        logits = self.logits(values, torch.from_numpy(numeric_BD))
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.from_numpy(label_B), weight=torch.from_numpy(weight_B), reduction="sum"
        )
        grads = torch.autograd.grad(losses, [values, *self.weights.values()])
        dense = {name: g / len(label_B) for name, g in zip(self.weights, grads[1:], strict=True)}
        return logits.detach().numpy(), grads[0].numpy(), dense

    def update(self, grads: Mapping[str, torch.Tensor]) -> None:
        """Apply one Adam step. Source: Kingma, Ba, "Adam", ICLR 2015, Algorithm 1."""
        self.step += 1
        rate = self.lr * math.sqrt(1 - _BETA2**self.step) / (1 - _BETA1**self.step)
        with torch.no_grad():
            for name, weight in self.weights.items():
                g, first, second = grads[name], self._first[name], self._second[name]
                first.mul_(_BETA1).add_(g, alpha=1 - _BETA1)
                second.mul_(_BETA2).addcmul_(g, g, value=1 - _BETA2)
                weight.addcdiv_(first, second.sqrt().add_(_EPSILON), value=-rate)

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the weights by name, in a fixed order."""
        return {name: w.detach().numpy().copy() for name, w in self.weights.items()}

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return weights, moments and step; `load` reads them."""
        out: dict[str, npt.NDArray[np.generic]] = {"step": np.array([self.step], np.int64)}
        for name, weight in self.weights.items():
            out[f"weight.{name}"] = weight.detach().numpy().copy()
            out[f"first.{name}"] = self._first[name].numpy().copy()
            out[f"second.{name}"] = self._second[name].numpy().copy()
        return out

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.step = int(state["step"][0])
        with torch.no_grad():
            for name, weight in self.weights.items():
                for target, kind in ((weight, "weight"), (self._first[name], "first"), (self._second[name], "second")):
                    target.copy_(torch.from_numpy(np.array(state[f"{kind}.{name}"], np.float32)))
