"""Functions that a user writes: features on Arrow columns, and a torch module. Each has a name and a version.

    @feature_function("title_length", version=1)
    def title_length(title: pa.Array) -> pa.Array:
        return pc.utf8_length(title)

    @model_function("two_towers", version=1)
    def two_towers(shape: ModelShape) -> torch.nn.Module: ...

They stand in the project's Python file, which every stage loads first, so that stream, trainer, serving and replay find
them alike. A feature function must be pure and look at each row alone, since batches are cut anywhere; `split_check` in
`headrace.stream.features.featurize` tries that. Old versions stay in the file while samples or models name them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from headrace.contract.errors import ConfigRejected, listed

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)


class ModelShape(NamedTuple):
    """The shape of the model that a user's module is built for.

    Its `forward(embedding_BFE, linear_BF, numeric_BD)` gets float32 tensors, embeddings [B, slots, dim], linear weights
    [B, slots] and numbers [B, numerics], and returns the log-odds of each task, [B, tasks], or [B] of a single one. It
    must be a pure function of its inputs and parameters: no dropout, no batch statistics, no buffers that move.
    """

    slots: int
    numerics: int
    dim: int
    tasks: int


class _Registry:
    def __init__(self, what: str, decorator: str) -> None:
        self._what, self._decorator = what, decorator
        self._known: dict[tuple[str, int], Function] = {}

    def add(self, name: str, version: int, function: Function) -> None:
        known = self._known.get((name, version))
        if known is not None and not _same(known, function):
            raise ConfigRejected(
                f"{self._what} {name!r} version {version} is declared twice with different code. What a version "
                "returns never changes: give the changed function a new version."
            )
        self._known[name, version] = function

    def get(self, name: str, version: int) -> Function:
        try:
            return self._known[name, version]
        except KeyError:
            known = sorted(v for n, v in self._known if n == name)
            raise ConfigRejected(
                f"no {self._what} {name!r} of version {version} is declared; versions of that name: {listed(known)}. "
                f"Declare it with @{self._decorator} in the project's Python file."
            ) from None


_FEATURES = _Registry("feature function", "feature_function")
_MODELS = _Registry("model function", "model_function")


def feature_function(name: str, *, version: int) -> Callable[[F], F]:
    """Return a decorator that makes a function known as (name, version).

    The function gets one Arrow array for each of `Custom.fields` and returns an Arrow or NumPy array: one value a
    row, a list a row, or [rows, width]. To say the same function again is harmless (a file may be loaded twice).

    Raises `ConfigRejected` when another function has this name and version.
    """

    def register(function: F) -> F:
        _FEATURES.add(name, version, function)
        return function

    return register


def model_function(name: str, *, version: int) -> Callable[[F], F]:
    """Return a decorator that makes a function known that builds a torch.nn.Module from a `ModelShape`.

    It must set the parameters from a seed of its own choice, or leave them to `torch.manual_seed`, which is called
    with the recipe's seed before it. The file should import torch inside the function: the stream has no use for it.

    Raises `ConfigRejected` when another function has this name and version.
    """

    def register(function: F) -> F:
        _MODELS.add(name, version, function)
        return function

    return register


def function_of(name: str, version: int) -> Function:
    """Return the feature function. Raises `ConfigRejected` with what is known instead."""
    return _FEATURES.get(name, version)


def model_of(name: str, version: int) -> Function:
    """Return the model function. Raises `ConfigRejected` with what is known instead."""
    return _MODELS.get(name, version)


def _same(one: Function, other: Function) -> bool:
    left, right = getattr(one, "__code__", None), getattr(other, "__code__", None)
    return one is other or (left is not None and left == right)
