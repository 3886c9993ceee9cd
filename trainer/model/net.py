"""The dense half of `deepfm` and `dcn` in torch, forward and backward written out. Formulas are those of `scoring`.

Written out instead of recorded by autograd, it keeps its buffers and leaves no graph behind; a test holds it against
autograd. One thread, fixed order: equal batches give equal bits.

Axes: B samples, F slots, V = 1 + E values of a row, D numbers, X = F * E + D, T tasks, H a hidden layer's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.adam import Flat
from headrace.trainer.model.kernels import collect, spread
from headrace.trainer.model.norms import Norms
from headrace.trainer.model.scoring import PLATT, Float32s, shapes_of

_relu_backward = torch.ops.aten.threshold_backward.grad_input


class Net:
    """Dense weights of `deepfm` and `dcn`. `forward`, then `backward`, then perhaps `update`."""

    def __init__(self, recipe: Recipe, features: FeatureSpec, *, device: str) -> None:
        self.device = device
        self.slots, self.numerics, self.dim = features.slots, features.numerics, recipe.row_dim
        self.tasks = len(recipe.heads)
        self.layers = len(recipe.hidden) + 1
        self.crosses = recipe.cross_layers if recipe.model == "dcn" else 0
        self.width = self.slots * self.dim + self.numerics
        shapes = {name: shape for name, shape in shapes_of(recipe, features).items() if name != PLATT}
        self.flat = Flat(shapes, lr=recipe.lr_dense, device=device)
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
        """Return a kept buffer of the batch's rows; it is made anew, wider, when a batch is larger than all before."""
        have = self._buffers.get((name, width))
        if have is None or len(have) < self._rows:
            have = torch.empty(max(self._rows, 64), width, device=self.device)
            self._buffers[name, width] = have
        return have[: self._rows]

    def forward(self, values_BFV: Float32s, numeric_BD: Float32s) -> Float32s:
        """Return the log-odds of each task, float32 [B, T], and keep what `backward` needs."""
        self._rows, w = len(values_BFV), self.flat.weights
        self._values_BFV = values_BFV
        self._numeric_BD = self._sent(numeric_BD)
        out_BT = torch.addmm(w["bias"], self._numeric_BD, w["numeric"])
        linear_B, pairs_B = np.empty(self._rows, np.float32), np.empty(self._rows, np.float32)
        self._sum_BE = np.empty((self._rows, self.dim), np.float32)
        # On the CPU x0 is written where the layers read it.
        home = self._buffer("x", self.width)
        x_BX = home.numpy() if self.device == "cpu" else np.empty((self._rows, self.width), np.float32)
        spread(values_BFV, numeric_BD, linear_B, pairs_B, self._sum_BE, x_BX)
        if self.device != "cpu":
            home.copy_(torch.from_numpy(x_BX))
        self._linear_B1, self._pairs_B1 = self._sent(linear_B)[:, None], self._sent(pairs_B)[:, None]
        out_BT += self._linear_B1 * w["mix"][0] if "mix" in w else self._linear_B1
        if not self.crosses:
            out_BT += self._pairs_B1 * w["mix"][1] if "mix" in w else self._pairs_B1
        if self.crosses:
            out_BT.addmm_(self._cross_forward(home), w["cross"])
        out_BT += self._deep_forward(home)
        return self._fetched(out_BT)

    def backward(self, grad_BT: Float32s) -> tuple[Float32s, Norms]:
        """Return the gradients of the rows from those of the log-odds, float32 [B, F, V], and the norms.

        The dense weights' gradients, summed over the batch, are kept for `update`.
        """
        w, grads = self.flat.weights, self.flat.grads
        g_BT = self._sent(grad_BT)
        torch.mm(self._numeric_BD.t(), g_BT, out=grads["numeric"])
        torch.sum(g_BT, 0, out=grads["bias"])
        grad_BFV = np.empty(self._values_BFV.shape, np.float32)
        has_pairs = not self.crosses
        if "mix" in w:
            grads["mix"][0] = (g_BT * self._linear_B1).sum(0)
            linear_B = self._fetched(g_BT @ w["mix"][0])
            if has_pairs:
                grads["mix"][1] = (g_BT * self._pairs_B1).sum(0)
            pairs_B = self._fetched(g_BT @ w["mix"][1]) if has_pairs else np.zeros_like(linear_B)
        else:
            linear_B = np.ascontiguousarray(grad_BT[:, 0])
            pairs_B = linear_B if has_pairs else np.zeros_like(linear_B)
        gradient_BX = self._deep_backward(g_BT)
        if self.crosses:
            gradient_BX = self._cross_backward(g_BT, gradient_BX)
        grad_x = self._fetched(gradient_BX)
        squares = collect(self._values_BFV, self._sum_BE, linear_B, pairs_B, grad_x, grad_BFV)
        return grad_BFV, Norms(math.sqrt(squares), self.flat.norm())

    def _deep_forward(self, x_BX: torch.Tensor) -> torch.Tensor:
        w = self.flat.weights
        self._outputs = [x_BX]
        for i in range(self.layers - 1):
            hidden_BH = self._buffer(f"h{i}", w[f"b{i}"].shape[0])
            torch.addmm(w[f"b{i}"], self._outputs[-1], w[f"w{i}"], out=hidden_BH).relu_()
            self._outputs.append(hidden_BH)
        last = self.layers - 1
        return torch.addmm(w[f"b{last}"], self._outputs[-1], w[f"w{last}"])

    def _deep_backward(self, grad_BT: torch.Tensor) -> torch.Tensor:
        w, grads, gradient = self.flat.weights, self.flat.grads, grad_BT
        for i in range(self.layers - 1, -1, -1):
            input_BH = self._outputs[i]
            torch.mm(input_BH.t(), gradient, out=grads[f"w{i}"])
            torch.sum(gradient, 0, out=grads[f"b{i}"])
            into = self._buffer(f"g{i}", input_BH.shape[1])
            torch.mm(gradient, w[f"w{i}"].t(), out=into)
            if i:
                _relu_backward(into, input_BH, 0, grad_input=into)
            gradient = into
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

    def _cross_backward(self, grad_BT: torch.Tensor, first_BX: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x0: `first_BX`, which is added to, and the cross layers'."""
        w, grads, x_BX = self.flat.weights, self.flat.grads, self._crossed[0]
        torch.mm(self._crossed[-1].t(), grad_BT, out=grads["cross"])
        gradient_BX = grad_BT @ w["cross"].t()
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
