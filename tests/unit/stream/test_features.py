"""Goal: examples in the documentation are true, and every kind has one. Method: run the doctests of the featurizer."""

from __future__ import annotations

import doctest
import importlib
import typing

import pyarrow.compute as pc
import pytest

from headrace.contract import spec
from headrace.contract.functions import feature_function
from headrace.stream.features import show

NAMES = ("counters", "featurize", "show", "sketch", "transforms", "values")
MODULES = ("contract.spec", *(f"stream.features.{name}" for name in NAMES))


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name):
    module = importlib.import_module(f"headrace.{name}")
    known = {**vars(spec), **vars(module), "feature_function": feature_function, "pc": pc}
    result = doctest.testmod(module, globs=known)
    assert result.failed == 0 and result.attempted > 0


def test_every_kind_has_an_example():
    kinds = [kind.__name__ for kind in typing.get_args(spec.Feature)]
    assert len(kinds) == 14
    assert [kind for kind in kinds if f"{kind}(" not in (show.__doc__ or "")] == []
