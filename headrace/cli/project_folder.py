"""Finds the user's folder, and loads what it declares: headrace.toml and the Project that it names."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from headrace.contract.config import Config, decode_config
from headrace.contract.errors import ConfigRejected
from headrace.contract.project import Project

SHOP = "headrace.examples.shop"
DEMO_FILE = "shop.py"
"""What declares the demo shop."""


def find_project(named: str) -> Path:
    """Return the user's folder: the one that was named, else `examples/shop` here, else the installed shop."""
    if named:
        return Path(named).absolute()
    here = Path.cwd() / "examples" / "shop"
    if (here / "headrace.toml").exists():
        return here
    spec = importlib.util.find_spec(SHOP)
    if spec is None or spec.origin is None:
        raise ConfigRejected(f"{SHOP} is not installed; --project or HEADRACE_PROJECT names the folder of a project.")
    return Path(spec.origin).parent


def is_demo(folder: Path) -> bool:
    """Say whether this is the demo shop's folder, or a copy of it with settings of its own: the same declarations."""
    demo = find_project("")
    if folder.resolve() == demo.resolve():
        return True
    return (folder / DEMO_FILE).is_file() and (folder / DEMO_FILE).read_bytes() == (demo / DEMO_FILE).read_bytes()


def load_project(folder: Path) -> tuple[Config, Project]:
    """Return the decoded headrace.toml and the checked Project that it names. Raises `ConfigRejected`."""
    file = folder / "headrace.toml"
    if not file.exists():
        raise ConfigRejected(f"{file} does not exist; --project or HEADRACE_PROJECT names the folder that holds it.")
    config = decode_config(file.read_bytes(), where=str(file))
    module_file = folder / config.module
    spec = importlib.util.spec_from_file_location("headrace_project", module_file)
    if spec is None or spec.loader is None or not module_file.exists():
        there = " or ".join(f'module = "{path.name}"' for path in sorted(folder.glob("*.py")))
        raise ConfigRejected(
            f"{file}: module {config.module!r} is no Python file in {folder}"
            + (f"; name the one that declares the Project: {there}." if there else ", and no other is there.")
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("headrace_project", module)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        spec.loader.exec_module(module)
    except ConfigRejected:
        raise
    except Exception as error:
        at = f"{module_file}, line {_line(error, module_file)}"
        raise ConfigRejected(f"{at}: {type(error).__name__}: {error}") from error
    return config, _project(module, config.object, module_file).checked()


def _project(module: ModuleType, name: str, file: Path) -> Project:
    found = getattr(module, name, None)
    if isinstance(found, Project):
        return found
    there = " or ".join(f'object = "{other}"' for other, value in vars(module).items() if isinstance(value, Project))
    raise ConfigRejected(
        f"{file} has no Project named {name!r}; "
        + (f"say in headrace.toml which one is meant: {there}." if there else "it declares none.")
    )


def _line(error: Exception, file: Path) -> int:
    """Return the line of the user's file at which it failed: the innermost one, or that of its own wrong syntax."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return (lines[-1] if lines else None) or 1
