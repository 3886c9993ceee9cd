"""Goal: modules stay small, named for what they hold, and free of this machine. Method: read every file of the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from headrace.contract import config, metrics
from headrace.contract.checks.names import VARIANTS_MAX

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "examples", "deploy", "bench", "docs")
SOURCES = sorted(p for room in ROOMS for p in (CHECKOUT / room).rglob("*.py") if "__pycache__" not in p.parts)
LINES_MAX, FUNCTION_LINES_MAX = 500, 70
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "data2", "base"}


def short(path: Path) -> str:
    """Return a name for the test's list."""
    return str(path.relative_to(CHECKOUT))


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_module_is_small_named_and_finished(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= LINES_MAX, f"{lines} lines; split it where its two subjects part"
    assert path.stem not in VAGUE, "name it after what it holds"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), "finish it, or open an issue"
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "open with what the module promises"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines; move a loop into a leaf"


def test_a_wheel_holds_every_package() -> None:
    """An editable install finds a folder that is not named; a wheel leaves it out."""
    setuptools = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = {place: name for name, place in setuptools["package-dir"].items()}
    folders = {path.parent.relative_to(CHECKOUT) for path in SOURCES}
    names = {".".join((tops[each.parts[0]], *each.parts[1:])) for each in folders if each.parts[0] in tops}
    assert set(setuptools["packages"]) == names


def test_no_file_names_this_machine_or_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout
    wrong = []
    for name in listed.splitlines():
        path = CHECKOUT / name
        if path.suffix in {".bin", ".png", ".gz"} or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_text(errors="replace")
        found = re.search(r"/opt/hr|/root/|/work/main|repo\.maven|files\.pythonhosted|download\.pytorch", text)
        if found:
            wrong.append(f"{name}: {found[0]}")
    assert not wrong, "say it by a variable or a relative path"


def test_the_demo_shops_events_stand_in_the_demo_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout
    own = [name for name in listed.splitlines() if not name.startswith(("examples/shop/", "tests/", "bench/"))]
    wrong = []
    for name in own:
        path = CHECKOUT / name
        if path.suffix in {".bin", ".png", ".gz"} or not path.is_file() or name == "docs/CHANGELOG.md":
            continue
        found = re.search(r"\bshop\.(impression|click|dwell|purchase)|web-dwells|spool/shop\"", path.read_text())
        wrong += [f"{name}: {found[0]}"] if found else []
    assert not wrong, "show README's project, store: a user's own project meets this text"


def test_pins_are_versions_and_nothing_else() -> None:
    lines = [line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+]+", line) for line in lines)


def test_every_stage_has_a_metrics_port_of_its_own() -> None:
    assert len(set(config.PORTS.values())) == len(config.PORTS)
    stages = {name.removeprefix("metrics_") for name in config.PORTS if name.startswith("metrics_")}
    beside = {f"train_{number}" for number in range(1, VARIANTS_MAX + 1)}
    assert stages == set(get_args(metrics.Stage)) | beside


def test_every_setting_has_a_default() -> None:
    msgspec.toml.decode(b"", type=config.Config)
