"""Goal: the pages that are made from code say what the code says. Method: make each again and compare; look at every
setting by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
UNITS = {"_ms": "ms", "_bytes": "bytes", "_bytes_max": "bytes", "_rows": "rows"}
"""End of a number's name -> how its unit begins."""


def generator() -> ModuleType:
    """Return docs/generate.py as a module; docs/ is no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", CHECKOUT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GENERATE = generator()
SETTINGS = list(GENERATE.settings())


@pytest.mark.parametrize("name", GENERATE.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    there = (CHECKOUT / "docs" / name).read_text()
    assert there == GENERATE.PAGES[name](), f"docs/{name} is not what the code says: run `make docs`"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda each: f"{each.table}.{each.key}")
def test_every_setting_is_told_with_its_unit(setting: object) -> None:
    assert setting.text, "write a docstring under the field in headrace/contract/config.py, then `make docs`"
    assert not setting.number or setting.unit, "end the docstring of a number with its unit, such as `Unit: ms.`"
    for ending, unit in UNITS.items():
        if setting.key.endswith(ending):
            assert setting.unit.startswith(unit), f"a name that ends in {ending} is counted in {unit}"


def test_every_table_of_the_file_has_settings() -> None:
    assert {setting.table for setting in SETTINGS} == set(GENERATE.tables())
