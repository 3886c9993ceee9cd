"""The dense part of the deep models, `deepfm` and `dcn`, in torch. Formulas are those of `scoring`.

Forward and backward are written out instead of recorded by autograd, so that buffers are kept and no graph is built; a
test compares them with autograd. One thread, in a fixed order: equal batches give equal bits.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), V = 1 + E values of a row, D numbers,
X = F * E + D, T tasks, H a hidden layer's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.layers.adam import FlatWeights
from headrace.trainer.model.layers.first_layer import (
    DeviceFirstLayer,
    FirstLayer,
    FirstLayerWeights,
    HostFirstLayer,
    Read,
    Rows,
    norm_of,
)
from headrace.trainer.model.layers.norms import Norms
from headrace.trainer.model.scoring import BESIDE, Float32s, shapes_of
from headrace.trainer.model.tables.distinct_ids import DistinctIds

_relu_backward = torch.ops.aten.threshold_backward.grad_input


class DeepModel:
    """Dense weights of `deepfm` and `dcn`. Call `forward`, then `backward`, then perhaps `update`."""

    def __init__(self, recipe: Recipe, features: FeatureSpec, *, device: str, reads_device: bool = False) -> None:
        """Make the first weights; with `reads_device` rows come as tensors on the device, which may be the CPU."""
        self.device = device
        self.layers = len(recipe.hidden) + 1
        self.crosses = recipe.cross_layers if recipe.model == "dcn" else 0
        shapes = {name: shape for name, shape in shapes_of(recipe, features).items() if name not in BESIDE}
        self.flat = FlatWeights(shapes, lr=recipe.lr_dense, rate_rows=recipe.rate_rows, device=device)
        first = FirstLayerWeights(
            *(by_name[name] for by_name in (self.flat.weights, self.flat.grads) for name in ("w0", "b0"))
        )
        make = HostFirstLayer if device == "cpu" and not reads_device else DeviceFirstLayer
        self._first: FirstLayer = make(first, has_crosses=self.crosses > 0)
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._begin(recipe.seed)

    def _begin(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.flat.weights.items():
            if name == "mix":
                weight.fill_(1.0)
            elif name.startswith("w"):
                # He's scale for ReLU layers; the last one begins small: the first answers are the linear part's.
                scale = math.sqrt(2 / max(weight.shape[0], 1)) * (0.1 if name == f"w{self.layers - 1}" else 1.0)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif name.startswith(("cross_w", "cross_u", "cross_v")) or name == "cross":
                # Small beside x_l, so that a cross layer begins as the identity.
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 / math.sqrt(weight.shape[0])))

    def _buffer(self, name: str, width: int) -> torch.Tensor:
        """Return a buffer of the batch's rows that is kept; a batch larger than all before gets a new, larger one."""
        have = self._buffers.get((name, width))
        if have is None or len(have) < self._rows:
            have = torch.empty(max(self._rows, 64), width, device=self.device)
            self._buffers[name, width] = have
        return have[: self._rows]

    def forward(self, values_UV: Rows, ids: DistinctIds, numeric_BD: Float32s) -> Float32s:
        """Return the log-odds of each task, float32 [B, T], and keep what `backward` needs."""
        self._rows, w = len(numeric_BD), self.flat.weights
        self._numeric_BD = self._sent(numeric_BD)
        out_BT = torch.addmm(w["bias"], self._numeric_BD, w["numeric"])
        read = self._first.forward(values_UV, ids, self._numeric_BD)
        self._linear_B1, self._pairs_B1 = read.linear_B[:, None], read.pairs_B[:, None]
        out_BT += self._linear_B1 * w["mix"][0] if "mix" in w else self._linear_B1
        if read.x_BX is None:
            out_BT += self._pairs_B1 * w["mix"][1] if "mix" in w else self._pairs_B1
        else:
            out_BT.addmm_(self._cross_forward(read.x_BX), w["cross"])
        out_BT += self._deep_forward(read.first_BH)
        return self._fetched(out_BT)

    def backward(self, grad_BT: Float32s) -> tuple[Rows, Norms]:
        """Return the gradients of the rows from those of the log-odds, float32 [U, V], and the norms.

        The dense weights' gradients, summed over the batch, are kept for `update`.
        """
        w, grads = self.flat.weights, self.flat.grads
        g_BT = self._sent(grad_BT)
        torch.mm(self._numeric_BD.t(), g_BT, out=grads["numeric"])
        torch.sum(g_BT, 0, out=grads["bias"])
        has_pairs = not self.crosses
        linear_B = pairs_B = g_BT[:, 0].contiguous()
        if "mix" in w:
            grads["mix"][0] = (g_BT * self._linear_B1).sum(0)
            linear_B = g_BT @ w["mix"][0]
            if has_pairs:
                grads["mix"][1] = (g_BT * self._pairs_B1).sum(0)
                pairs_B = g_BT @ w["mix"][1]
        if not has_pairs:
            pairs_B = torch.zeros_like(linear_B)
        x_BX = self._cross_backward(g_BT) if self.crosses else None
        grad_UV = self._first.backward(Read(linear_B, pairs_B, self._deep_backward(g_BT), x_BX))
        return grad_UV, Norms(norm_of(grad_UV), self.flat.norm())

    def _deep_forward(self, first_BH: torch.Tensor) -> torch.Tensor:
        """Return the last layer's sums from the first layer's sums, over which its outputs are written."""
        w = self.flat.weights
        self._outputs = [first_BH]
        for i in range(1, self.layers):
            self._outputs[-1].relu_()
            sums_BH = self._buffer(f"h{i}", len(w[f"b{i}"]))
            self._outputs.append(torch.addmm(w[f"b{i}"], self._outputs[-1], w[f"w{i}"], out=sums_BH))
        return self._outputs[-1]

    def _deep_backward(self, grad_BT: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the first layer's sums."""
        w, grads, gradient = self.flat.weights, self.flat.grads, grad_BT
        for i in range(self.layers - 1, 0, -1):
            input_BH = self._outputs[i - 1]
            torch.mm(input_BH.t(), gradient, out=grads[f"w{i}"])
            torch.sum(gradient, 0, out=grads[f"b{i}"])
            into = self._buffer(f"g{i}", input_BH.shape[1])
            torch.mm(gradient, w[f"w{i}"].t(), out=into)
            gradient = _relu_backward(into, input_BH, 0, grad_input=into)
        return gradient

    def _cross_forward(self, x_BX: torch.Tensor) -> torch.Tensor:
        w = self.flat.weights
        self._crossed, self._mixed, self._low = [x_BX], [], []
        for i in range(self.crosses):
            last_BX = self._crossed[-1]
            if f"cross_w{i}" in w:
                mixed_BX = torch.addmm(w[f"cross_b{i}"], last_BX, w[f"cross_w{i}"])
            else:
                self._low.append(last_BX @ w[f"cross_u{i}"])
                mixed_BX = torch.addmm(w[f"cross_b{i}"], self._low[-1], w[f"cross_v{i}"])
            self._mixed.append(mixed_BX)
            self._crossed.append(torch.addcmul(last_BX, x_BX, mixed_BX))
        return self._crossed[-1]

    def _cross_backward(self, grad_BT: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x0."""
        w, grads, x_BX = self.flat.weights, self.flat.grads, self._crossed[0]
        torch.mm(self._crossed[-1].t(), grad_BT, out=grads["cross"])
        gradient_BX = grad_BT @ w["cross"].t()
        first_BX = torch.zeros_like(x_BX)
        for i in range(self.crosses - 1, -1, -1):
            first_BX.addcmul_(gradient_BX, self._mixed[i])
            mixed_BX = gradient_BX * x_BX
            torch.sum(mixed_BX, 0, out=grads[f"cross_b{i}"])
            if f"cross_w{i}" in w:
                torch.mm(self._crossed[i].t(), mixed_BX, out=grads[f"cross_w{i}"])
                gradient_BX.addmm_(mixed_BX, w[f"cross_w{i}"].t())
            else:
                torch.mm(self._low[i].t(), mixed_BX, out=grads[f"cross_v{i}"])
                low_BR = mixed_BX @ w[f"cross_v{i}"].t()
                torch.mm(self._crossed[i].t(), low_BR, out=grads[f"cross_u{i}"])
                gradient_BX.addmm_(low_BR, w[f"cross_u{i}"].t())
        return first_BX.add_(gradient_BX)

    def _sent(self, array: Float32s) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _fetched(self, tensor: torch.Tensor) -> Float32s:
        out: Float32s = tensor.cpu().numpy()
        return out

    def update(self, samples: int) -> None:
        """Apply the gradients that `backward` kept."""
        self.flat.update(samples)

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the weights by name."""
        return self.flat.dense()

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of weights, moments and step."""
        return self.flat.state()

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.flat.load(state)
