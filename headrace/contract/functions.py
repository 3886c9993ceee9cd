"""Features that a user writes: plain functions on Arrow columns, known by name and version. No I/O.

    @feature_function("title_length", version=1)
    def title_length(title: pa.Array) -> pa.Array:
        return pc.utf8_length(title)

Written in the project's Python file, which every stage loads first, they are found by stream, trainer, serving and
replay alike. A function must be pure and look at each row alone, since batches are cut anywhere; `split_check` in
`headrace.stream.features.featurize` tries that. Old versions stay in the file while samples or models name them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from headrace.contract.errors import ConfigRejected

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

_FUNCTIONS: dict[tuple[str, int], Function] = {}


def feature_function(name: str, *, version: int) -> Callable[[F], F]:
    """Return a decorator that makes a function known as (name, version).

    The function gets one Arrow array for each of `Custom.fields` and returns an Arrow or NumPy array: one value a
    row, a list a row, or [rows, width]. To say the same function again is harmless (a file may be loaded twice).

    Raises `ConfigRejected` when another function has this name and version.
    """

    def register(function: F) -> F:
        known = _FUNCTIONS.get((name, version))
        if known is not None and not _same(known, function):
            raise ConfigRejected(
                f"feature function {name!r} version {version} is declared twice with different code. What a version "
                "returns never changes: give the changed function a new version."
            )
        _FUNCTIONS[name, version] = function
        return function

    return register


def function_of(name: str, version: int) -> Function:
    """Return the function. Raises `ConfigRejected` with what is known instead."""
    try:
        return _FUNCTIONS[name, version]
    except KeyError:
        known = sorted(v for n, v in _FUNCTIONS if n == name)
        raise ConfigRejected(
            f"no feature function {name!r} of version {version} is declared; versions of that name: {known}. Declare "
            "it with @feature_function in the project's Python file."
        ) from None


def _same(one: Function, other: Function) -> bool:
    left, right = getattr(one, "__code__", None), getattr(other, "__code__", None)
    return one is other or (left is not None and left == right)
