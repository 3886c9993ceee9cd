"""Dense weights that lie in one flat tensor and learn by Adam. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from headrace.trainer.model.layers.kernels import BETA1, BETA2, StepSizes, adam
from headrace.trainer.model.scoring import Float32s, Shapes

_EPSILON = 1e-8


class FlatWeights:
    """Weights, gradients and moments of one model, each one flat float32 tensor on `device` with named views."""

    def __init__(self, shapes: Shapes, *, lr: float, rate_rows: int = 0, device: str) -> None:
        self.shapes, self.device, self.step, self.sizes = shapes, device, 0, StepSizes(lr, rate_rows)
        size = sum(math.prod(shape) for shape in shapes.values())
        self.weight, self.grad, self._first, self._second = (torch.zeros(size, device=device) for _ in range(4))
        self.weights, self.grads = self._views(self.weight), self._views(self.grad)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        views, at = {}, 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            views[name] = flat[at : at + count].view(shape)
            at += count
        return views

    def norm(self) -> float:
        """Return the Euclidean norm of the gradients; not finite where one of them is not."""
        return float(torch.linalg.vector_norm(self.grad))

    def update(self, samples: int) -> None:
        """Take one step along the gradients' mean over so many samples.

        Source: Kingma, Ba, "Adam", ICLR 2015, Algorithm 1.
        """
        self.step += 1
        flat = (self.weight, self.grad, self._first, self._second)
        lr, count = self.sizes.next(samples, self.step)
        if self.device == "cpu":
            adam(*(tensor.numpy() for tensor in flat), lr=lr, step=self.step, samples=count)
            return
        rate = lr * math.sqrt(1 - BETA2**self.step) / (1 - BETA1**self.step)
        self._first.mul_(BETA1).add_(self.grad, alpha=(1 - BETA1) / count)
        self._second.mul_(BETA2).addcmul_(self.grad, self.grad, value=(1 - BETA2) / count**2)
        self.weight.addcdiv_(self._first, self._second.sqrt().add_(_EPSILON), value=-rate)

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the weights by name, in a fixed order."""
        flat, out, at = self.weight.cpu().numpy().copy(), {}, 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            out[name] = flat[at : at + count].reshape(shape)
            at += count
        return out

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of weights, moments and step; `load` reads them."""
        return self.sizes.state() | {
            "step": np.array([self.step], np.int64),
            "weight": self.weight.cpu().numpy().copy(),
            "first": self._first.cpu().numpy().copy(),
            "second": self._second.cpu().numpy().copy(),
        }

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.step = int(state["step"][0])
        self.sizes.load(state)
        for name, target in (("weight", self.weight), ("first", self._first), ("second", self._second)):
            target.copy_(torch.from_numpy(np.array(state[name], np.float32)))
