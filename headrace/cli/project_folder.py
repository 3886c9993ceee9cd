"""Finds the user's folder, and loads what it declares: headrace.toml and the Project that it names."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from headrace.cli.project_lines import failed, line_of, other_calls
from headrace.contract.config import Config, decode_config
from headrace.contract.errors import ConfigRejected
from headrace.contract.project import Project

SHOP = "headrace.examples.shop"
DEMO_FILE = "shop.py"
"""What declares the demo shop."""
WRONG_MAX = 20
"""Faults of a project that are told at once."""


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
    """Return the decoded headrace.toml and the checked Project that it names.

    Raises `ConfigRejected` with all that was found wrong, a paragraph each.
    """
    config, project, wrong = look_at(folder)
    if wrong or config is None or project is None:
        raise ConfigRejected("\n".join(bounded(wrong)))
    return config, project.checked()


def bounded(wrong: Sequence[str]) -> list[str]:
    """Return the first `WRONG_MAX` of what is wrong, and how many more there are."""
    more = len(wrong) - WRONG_MAX
    return [*wrong[:WRONG_MAX], *([f"and {more} more: correct these, and look again."] if more > 0 else [])]


def look_at(folder: Path) -> tuple[Config | None, Project | None, list[str]]:
    """Return a project's settings and declarations, None where they cannot be read, and all that is wrong in them, each
    with its file, line or field, and remedy."""
    file, wrong = folder / "headrace.toml", list[str]()
    config: Config | None = None
    try:
        if folder.is_file():
            raise ConfigRejected(f"{folder} is a file; name the folder that holds it: {folder.parent}")
        if not folder.is_dir():
            raise ConfigRejected(f"{folder} is no folder; --project or HEADRACE_PROJECT names the one of a project.")
        if not file.exists():
            raise ConfigRejected(
                f"{file} does not exist; --project or HEADRACE_PROJECT names the folder that holds it. It may be "
                f"empty: touch {file}"
            )
        config = decode_config(_read(file), where=str(file))
    except ConfigRejected as error:
        wrong += [str(error), *map(str, error.others)]
        if not (folder / Config().module).is_file():
            return None, None, wrong
    # Where the settings are wrong, the usual file is looked at all the same.
    settings = config or Config()
    try:
        project = _declared(folder, settings)
    except ConfigRejected as error:
        return config, None, [*wrong, str(error), *map(str, error.others)]
    module_file = folder / settings.module
    if project.variant:
        fault = ConfigRejected(f"variant {project.variant!r}: nobody declares it. Recipes beside go into `variants`.")
        wrong.append(_placed(fault, module_file, settings.object))
    wrong += [_placed(fault, module_file, settings.object) for fault in project.faults()]
    return config, project, wrong


def _declared(folder: Path, config: Config) -> Project:
    """Return what the project's Python file declares, unchecked. Raises `ConfigRejected`."""
    file, module_file = folder / "headrace.toml", folder / config.module
    spec = importlib.util.spec_from_file_location("headrace_project", module_file)
    if spec is None or spec.loader is None or not module_file.is_file():
        there = " or ".join(f'module = "{path.name}"' for path in sorted(folder.glob("*.py")))
        raise ConfigRejected(
            f"{file}: module {config.module!r} is no Python file in {folder}"
            + (f"; name the one that declares the Project: {there}." if there else ", and no other is there.")
        )
    _read(module_file)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("headrace_project", module)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        # What the file prints is no part of what a verb says, which may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except ConfigRejected as error:
        first = _placed(error, module_file, config.object, error)
        raise ConfigRejected(
            first, others=[ConfigRejected(_placed(one, module_file, config.object)) for one in error.others]
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        others = other_calls(error, module_file, vars(module))
        raise ConfigRejected(
            failed(error, module_file, vars(module)), others=[ConfigRejected(text) for text in others]
        ) from error
    return _project(module, config.object, module_file)


def _read(file: Path) -> bytes:
    """Return a file's bytes. Raises `ConfigRejected` for one that cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigRejected(
            f"{file} cannot be read: {error.strerror}. Give it to this user: chmod u+r {file}, or sudo chown."
        ) from error


def _placed(error: ConfigRejected, file: Path, name: str, raised: BaseException | None = None) -> str:
    """Return a refusal with the file and, where it is found, the line of the declaration."""
    frames = [f.lineno for f in traceback.extract_tb(raised.__traceback__) if f.filename == str(file)] if raised else []
    line = (frames[-1] if frames else 0) or line_of(file, name, error.at, str(error))
    return f"{file}{f', line {line}' if line else ''}: {error}"


def _project(module: ModuleType, name: str, file: Path) -> Project:
    found = getattr(module, name, None)
    if isinstance(found, Project):
        return found
    there = " or ".join(f'object = "{other}"' for other, value in vars(module).items() if isinstance(value, Project))
    raise ConfigRejected(
        f"{file} has no Project named {name!r}; "
        + (
            f"say in headrace.toml which one is meant: {there}."
            if there
            else f"it declares none: write {name} = Project(...), see docs/project.md."
        )
    )
