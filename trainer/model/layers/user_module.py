"""The user's own torch.nn.Module as the dense part: forward and backward by autograd, Adam as everywhere.

Imported only where a recipe names one; serving scores with it through torch too. Parameters are the module's, by their
names. See `ModelShape` for what a module gets and must be.

Axes: B samples, F slots, U distinct ids (see `DistinctIds`), V = 1 + E values of a row, D numbers, T tasks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from headrace.contract.errors import ConfigRejected
from headrace.contract.functions import ModelShape, model_of
from headrace.contract.recipe import Recipe
from headrace.contract.spec import FeatureSpec
from headrace.trainer.model.layers.adam import FlatWeights
from headrace.trainer.model.layers.first_layer import Rows, norm_of
from headrace.trainer.model.layers.norms import Norms
from headrace.trainer.model.scoring import Dense, Float32s, Shapes
from headrace.trainer.model.tables.distinct_ids import DistinctIds

_BUILDING = threading.Lock()


def build(recipe: Recipe, shape: ModelShape) -> torch.nn.Module:
    """Return the user's module as it begins. Raises `ConfigRejected` where it is none, or has buffers."""
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        module = model_of(recipe.module, recipe.module_version)(shape)
    if not isinstance(module, torch.nn.Module):
        raise ConfigRejected(
            f"model function {recipe.module!r} returned {type(module).__name__}, not a torch.nn.Module."
        )
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise ConfigRejected(
            f"module {recipe.module!r} has buffers {buffers}, which move outside of its parameters and so are neither "
            "published nor checkpointed: use layers without them (no batch normalization)."
        )
    return module.float()


def module_shapes(recipe: Recipe, features: FeatureSpec) -> Shapes:
    """Return the shapes of the module's parameters by name."""
    module = build(recipe, _shape(recipe, features.slots, features.numerics))
    return {name: list(weight.shape) for name, weight in module.named_parameters()}


def module_logits(recipe: Recipe, values_BFV: Float32s, numeric_BD: Float32s, dense: Dense) -> Float32s:
    """Return the log-odds of each task, float32 [B, T], with these weights."""
    module = _for_scoring(recipe.module, recipe.module_version, recipe.seed, _shape_of(recipe, values_BFV, numeric_BD))
    names = [name for name, _ in module.named_parameters()]
    weights = {name: torch.from_numpy(np.array(dense[name], np.float32)) for name in names}
    with torch.no_grad():
        values = torch.from_numpy(np.array(values_BFV, np.float32))
        inputs = (values[:, :, 1:], values[:, :, 0], torch.from_numpy(np.array(numeric_BD, np.float32)))
        out = torch.func.functional_call(module, weights, inputs)
    logits_BT: Float32s = out.reshape(len(values_BFV), len(recipe.heads)).numpy()
    return logits_BT


@lru_cache(maxsize=8)
def _for_scoring(name: str, version: int, seed: int, shape: ModelShape) -> torch.nn.Module:
    return build(Recipe(model="module", module=name, module_version=version, seed=seed), shape)


def _shape(recipe: Recipe, slots: int, numerics: int) -> ModelShape:
    return ModelShape(slots, numerics, recipe.dim, len(recipe.heads))


def _shape_of(recipe: Recipe, values_BFV: Float32s, numeric_BD: Float32s) -> ModelShape:
    return _shape(recipe, values_BFV.shape[1], numeric_BD.shape[1])


class UserModule:
    """The user's own module, with the methods of `DeepModel`."""

    def __init__(self, recipe: Recipe, features: FeatureSpec, *, device: str) -> None:
        self.tasks, self.device = len(recipe.heads), device
        self._module = build(recipe, _shape(recipe, features.slots, features.numerics)).to(device)
        begin = {name: weight.detach().clone() for name, weight in self._module.named_parameters()}
        shapes = {name: list(w.shape) for name, w in begin.items()}
        self.flat = FlatWeights(shapes, lr=recipe.lr_dense, rate_rows=recipe.rate_rows, device=device)
        for name, weight in begin.items():
            self.flat.weights[name].copy_(weight)

    def forward(self, values_UV: Rows, ids: DistinctIds, numeric_BD: Float32s) -> Float32s:
        """Return the log-odds of each task, float32 [B, T], and keep what `backward` needs."""
        self._came_from_host = not isinstance(values_UV, torch.Tensor)
        self._values_UV = torch.as_tensor(values_UV, device=self.device).requires_grad_(True)
        values_BFV = self._values_UV[torch.from_numpy(ids.index_FB).to(self.device).t()]
        self._leaves = {name: w.detach().requires_grad_(True) for name, w in self.flat.weights.items()}
        inputs = (values_BFV[:, :, 1:], values_BFV[:, :, 0], torch.from_numpy(numeric_BD).to(self.device))
        out = torch.func.functional_call(self._module, self._leaves, inputs)
        if out.numel() != len(numeric_BD) * self.tasks:
            raise ConfigRejected(
                f"the module returned {list(out.shape)} for {len(numeric_BD)} samples of {self.tasks} tasks: "
                "return [B, tasks] log-odds."
            )
        self._logits = out.reshape(len(numeric_BD), self.tasks)
        logits_BT: Float32s = self._logits.detach().cpu().numpy()
        return logits_BT

    def backward(self, grad_BT: Float32s) -> tuple[Rows, Norms]:
        """Return the gradients of the rows, float32 [U, V], where the rows were, and the norms."""
        grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
            self._logits,
            [self._values_UV, *self._leaves.values()],
            torch.from_numpy(grad_BT).to(self.device),
            allow_unused=True,
        )
        for target, grad in zip(self.flat.grads.values(), grads[1:], strict=True):
            if grad is None:
                target.zero_()
            else:
                target.copy_(grad)
        grad_UV = torch.zeros_like(self._values_UV) if grads[0] is None else grads[0]
        norms = Norms(norm_of(grad_UV), self.flat.norm())
        return (grad_UV.cpu().numpy() if self._came_from_host else grad_UV), norms

    def update(self, samples: int) -> None:
        """Apply the gradients that `backward` kept."""
        self.flat.update(samples)

    def dense(self) -> dict[str, Float32s]:
        """Return copies of the parameters by name."""
        return self.flat.dense()

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return copies of parameters, moments and step."""
        return self.flat.state()

    def load(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Replace everything by what `state` returned."""
        self.flat.load(state)
