"""The first layer of a deep model. It reads the rows: it sums linear weights, takes FM's pairs and the first layer's
product, gives x0 to cross layers, and returns the gradients of all of them.

`HostFirstLayer` multiplies each distinct id of a batch once, in compiled passes. `DeviceFirstLayer` multiplies the ids
of every sample, in torch: on a device multiplying is cheap and gathering is dear. A test compares the two.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), V = 1 + E values of a row, D numbers, X = F * E + D,
H the first layer's width.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

from headrace.trainer.model.layers.kernels import collect, collect_spread, project, spread, squares_of
from headrace.trainer.model.scoring import Float32s
from headrace.trainer.model.tables.distinct_ids import DistinctIds

Rows = Float32s | torch.Tensor
"""Values or gradients of rows: an array, or a tensor where rows are kept on the device."""


def norm_of(grad_UV: Rows) -> float:
    """Return the Euclidean norm, which is not finite where a number is not."""
    if isinstance(grad_UV, torch.Tensor):
        return float(torch.linalg.vector_norm(grad_UV))
    return math.sqrt(squares_of(grad_UV))


class Read(NamedTuple):
    """What the layers above take, or the gradients of that."""

    linear_B: torch.Tensor
    pairs_B: torch.Tensor
    first_BH: torch.Tensor
    """The first layer's sums, before the activation."""
    x_BX: torch.Tensor | None
    """x0 where there are cross layers."""


class FirstLayerWeights(NamedTuple):
    """The first layer's weights, and where their gradients go."""

    weight_XH: torch.Tensor
    bias_H: torch.Tensor
    grad_XH: torch.Tensor
    grad_H: torch.Tensor


class FirstLayer(Protocol):
    """Reads the rows of a batch. Call `forward`, then `backward`; their results hold until the next `forward`."""

    def forward(self, values_UV: Rows, ids: DistinctIds, numeric_BD: torch.Tensor) -> Read:
        """Read a batch's rows."""

    def backward(self, grads: Read) -> Rows:
        """Return the gradients of the rows, float32 [U, V], where the rows are, and write those of the layer."""


class HostFirstLayer:
    """On the CPU, compiled, single-threaded: equal batches give equal bits."""

    def __init__(self, layer: FirstLayerWeights, *, has_crosses: bool) -> None:
        self._layer, self._has_crosses = layer, has_crosses
        self._weight_XH, self._grad_XH = layer.weight_XH.numpy(), layer.grad_XH.numpy()

    def forward(self, values_UV: Rows, ids: DistinctIds, numeric_BD: torch.Tensor) -> Read:
        """Read a batch's rows."""
        assert isinstance(values_UV, np.ndarray), "DeviceFirstLayer reads rows that are on a device"
        samples, width = len(numeric_BD), values_UV.shape[1] - 1
        self._values_UV, self._ids, self._numeric_BD = values_UV, ids, numeric_BD
        first_BH = torch.addmm(self._layer.bias_H, numeric_BD, self._layer.weight_XH[self._embedded :])
        linear_B, pairs_B = np.empty(samples, np.float32), np.empty(samples, np.float32)
        self._sum_BE = np.empty((samples, width), np.float32)
        project(
            *(values_UV, ids.begin_F, ids.index_FB, self._weight_XH),
            *(first_BH.numpy(), linear_B, pairs_B, self._sum_BE),
        )
        x_BX = None
        if self._has_crosses:
            x_BX = torch.empty(samples, len(self._weight_XH))
            spread(values_UV, ids.index_FB, numeric_BD.numpy(), x_BX.numpy())
        return Read(torch.from_numpy(linear_B), torch.from_numpy(pairs_B), first_BH, x_BX)

    def backward(self, grads: Read) -> Rows:
        """Return the gradients of the rows, float32 [U, V], and write the layer's."""
        torch.sum(grads.first_BH, 0, out=self._layer.grad_H)
        torch.mm(self._numeric_BD.t(), grads.first_BH, out=self._layer.grad_XH[self._embedded :])
        grad_UV = np.empty(self._values_UV.shape, np.float32)
        collect(
            *(self._values_UV, self._ids.begin_F, self._ids.index_FB, self._weight_XH),
            *(grads.first_BH.numpy(), grads.linear_B.numpy(), grads.pairs_B.numpy(), self._sum_BE),
            *(self._grad_XH, grad_UV),
        )
        if grads.x_BX is not None:
            collect_spread(grads.x_BX.numpy(), self._ids.index_FB, grad_UV)
        return grad_UV

    @property
    def _embedded(self) -> int:
        return len(self._weight_XH) - self._numeric_BD.shape[1]


class DeviceFirstLayer:
    """On any device of torch's. `index_put_` adds up the gradients of each id; it adds in a fixed order on CUDA too."""

    def __init__(self, layer: FirstLayerWeights, *, has_crosses: bool) -> None:
        self._layer, self._has_crosses = layer, has_crosses

    def forward(self, values_UV: Rows, ids: DistinctIds, numeric_BD: torch.Tensor) -> Read:
        """Read a batch's rows."""
        self._index_BF = torch.from_numpy(ids.index_FB).to(numeric_BD.device).t().long()
        self._values_UV = values_UV
        values_BFV = torch.as_tensor(values_UV, device=numeric_BD.device)[self._index_BF]
        self._embedding_BFE = values_BFV[:, :, 1:]
        self._sum_BE = self._embedding_BFE.sum(1)
        pairs_B = 0.5 * ((self._sum_BE**2).sum(1) - (self._embedding_BFE**2).sum((1, 2)))
        self._x_BX = torch.cat([self._embedding_BFE.flatten(1), numeric_BD], 1)
        first_BH = torch.addmm(self._layer.bias_H, self._x_BX, self._layer.weight_XH)
        return Read(values_BFV[:, :, 0].sum(1), pairs_B, first_BH, self._x_BX if self._has_crosses else None)

    def backward(self, grads: Read) -> Rows:
        """Return the gradients of the rows, float32 [U, V], where the rows are, and write those of the layer."""
        torch.sum(grads.first_BH, 0, out=self._layer.grad_H)
        torch.mm(self._x_BX.t(), grads.first_BH, out=self._layer.grad_XH)
        x_BX = grads.first_BH @ self._layer.weight_XH.t()
        if grads.x_BX is not None:
            x_BX += grads.x_BX
        samples, slots, width = self._embedding_BFE.shape
        grad_BFV = torch.empty(samples, slots, 1 + width, device=x_BX.device)
        grad_BFV[:, :, 0] = grads.linear_B[:, None]
        grad_BFV[:, :, 1:] = x_BX[:, : slots * width].view(samples, slots, width)
        grad_BFV[:, :, 1:] += grads.pairs_B[:, None, None] * (self._sum_BE[:, None] - self._embedding_BFE)
        grad_UV = torch.zeros(tuple(self._values_UV.shape), device=x_BX.device)
        grad_UV.index_put_((self._index_BF,), grad_BFV, accumulate=True)
        return grad_UV if isinstance(self._values_UV, torch.Tensor) else grad_UV.cpu().numpy()
