"""Goal: each promise of README and of docs/how-it-stays-exact.md is followed by a test that holds it. Method: the table
there is read: what it quotes still stands on the page, and each test that it names is one that `make test` runs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
README, PAGE = CHECKOUT / "README.md", CHECKOUT / "docs" / "how-it-stays-exact.md"
HEADING = "## Each promise and its test"
ROW = re.compile(r"^\| \"(.+?)\" \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")

TEXT, _, REST = PAGE.read_text().partition(HEADING)
TABLE, _, BEHIND = REST.partition("\n## ")
ROWS = ROW.findall(TABLE)


def plain(text: str) -> str:
    """Return a page as it reads: links as their words, one space between words."""
    return " ".join(LINK.sub(r"\1", text).split())


SAID = plain(README.read_text()) + "\n" + plain(TEXT + BEHIND)


@cache
def held_in(name: str) -> dict[str, bool]:
    """Return the tests of a file, and whether each runs in `make test`."""
    tree = ast.parse((CHECKOUT / name).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    whole = [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ]
    marks = {node.name: [*whole, *map(ast.unparse, node.decorator_list)] for node in functions}
    left_out = re.compile(r"pytestmark.*mark\.(long|skip)\b|^pytest\.mark\.(long|skip)\b(?!if)")
    return {each: not any(left_out.search(mark) for mark in found) for each, found in marks.items()}


def test_the_table_is_there_and_every_line_of_it_is_a_promise() -> None:
    lines = [line for line in TABLE.splitlines() if line.startswith("|")]
    assert len(ROWS) == len(lines) - 2 > 20, "a row is: quoted promise, tests in backquotes, what they show"


@pytest.mark.parametrize(("promise", "tests", "shown"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_a_promise_stands_where_it_is_made_and_its_tests_run(promise: str, tests: str, shown: str) -> None:
    assert plain(promise) in SAID, (
        "the page says it in other words now: quote those, and look whether the tests hold them"
    )
    named = TEST.findall(tests)
    assert named and not TEST.sub("", tests).strip(" ,"), "tests in backquotes, with commas between"
    gone = [f"{file}::{name}" for file, name in named if not (CHECKOUT / file).is_file() or name not in held_in(file)]
    assert not gone, "name what the test is called now, or write it"
    assert all(held_in(file)[name] for file, name in named), "a promise is held by what `make test` runs"
    assert len(shown) > 20, "say what the tests show, and what they do not"


def test_readme_says_where_the_proofs_are() -> None:
    anchor = HEADING.removeprefix("## ").lower().replace(" ", "-")
    assert f"docs/how-it-stays-exact.md#{anchor}" in README.read_text()
