"""Goal: README, docs/ and docstrings tell the tree as it is. Method: every path, module, link, verb and target that
they name is looked up; README's own project is run."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from headrace.cli.main import VERBS
from headrace.contract.config import IngestConfig
from headrace.contract.project import Project

CHECKOUT = Path(__file__).resolve().parents[2]
README = CHECKOUT / "README.md"
PAGES = [README, *sorted((CHECKOUT / "docs").glob("*.md"))]
README_LINES_MAX, README_WIDTH_MAX, ROOM_ENTRIES_MAX = 210, 120, 16
ROOMS = ("headrace", "ingest", "stream", "trainer", "serving", "replay", "deploy", "examples", "bench", "tests")
AT_THE_TOP = ROOMS[1:-2]
"""Rooms that are installed as `headrace.<room>`."""

PATH = re.compile(rf"(?<![\w/.:$<>-])(?:{'|'.join(ROOMS)}|docs|\.ci)/[\w./*-]*")
PYTHON_FILE = re.compile(r"(?<![\w/.*])\w+\.py\b")
MODULE = re.compile(r"(?<![\w/.-])headrace\.[a-z][a-z0-9_.]*[a-z0-9_]")
REFERENCE = re.compile(
    r"`((?:headrace\.)?(?:contract|backends|cli|ingest|stream|trainer|serving|replay|deploy|examples)(?:\.[A-Za-z_]+)+)`"
)
"""A module in a docstring, often without `headrace.`, or a name within it."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NO_FILES = {"stream.py"}
"""Named as a user's file."""
NO_MODULES = {"headrace.js", "headrace.toml", "headrace.track", "headrace.push", "headrace.stats"}
"""Named as files, and as functions of the browser's snippet."""


def tracked() -> list[str]:
    """Return the repository's files, new ones that are not ignored too."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (CHECKOUT / name).exists()]


FILES = tracked()
SETTINGS = {f"ingest.{name}" for name in IngestConfig.__struct_fields__}
"""Keys that read like modules: of all tables of `headrace.toml` only [ingest] is called as a room."""


def page_name(path: Path) -> str:
    """Return a name for the test's list."""
    return path.name


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = [heading.lower() for heading in HEADING.findall(FENCED.sub("", text))]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading)).replace(" ", "-") for heading in headings}


def module_exists(name: str) -> bool:
    """Say whether `headrace.x.y` is a module or a package of the tree."""
    parts = name.split(".")[1:]
    folder = CHECKOUT if parts[0] in AT_THE_TOP else CHECKOUT / "headrace"
    path = folder.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def reference_exists(reference: str) -> bool:
    """Say whether a reference is a module, a name within one (a class, its member), or a setting's key."""
    if reference in SETTINGS or reference.endswith(".py"):
        return True
    parts = ["headrace", *reference.removeprefix("headrace.").split(".")]
    for inside in range(len(parts) - 1):
        module, names = ".".join(parts[: len(parts) - inside]), parts[len(parts) - inside :]
        if module_exists(module):
            folder = CHECKOUT if parts[1] in AT_THE_TOP else CHECKOUT / "headrace"
            file = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
            return not names or (file.is_file() and bool(re.search(rf"\b{names[0]}\b", file.read_text())))
    return False


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_and_module_exists(page: Path) -> None:
    text = page.read_text()
    paths = {path.rstrip(".") for path in PATH.findall(text)}
    gone = sorted(path for path in paths if not list(CHECKOUT.glob(path.rstrip("/"))))
    names = {Path(file).name for file in FILES}
    gone += sorted(set(PYTHON_FILE.findall(text)) - names - NO_FILES)
    gone += sorted(name for name in set(MODULE.findall(text)) - NO_MODULES if not module_exists(name))
    assert not gone, f"{page.name} names what the tree does not have; name what it is called now"


def test_the_shops_table_names_files_of_the_shop() -> None:
    text = (CHECKOUT / "docs" / "project.md").read_text().partition("## The demo shop")[2]
    named = set(re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE))
    assert named and not {name for name in named if f"examples/shop/{name}" not in FILES}


def test_code_names_what_the_tree_has() -> None:
    gone = []
    for name in FILES:
        if name.endswith((".py", ".toml", ".conf", ".yaml")) and name != "tests/tidy/test_docs.py":
            text = (CHECKOUT / name).read_text()
            paths = [path for path in set(PATH.findall(text)) if not list(CHECKOUT.glob(path.rstrip("./")))]
            modules = [ref for ref in set(REFERENCE.findall(text)) if not reference_exists(ref)]
            gone += [f"{name}: {each}" for each in (*paths, *modules)]
    assert not gone, "a docstring, comment or message names what the tree does not have"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_resolves(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if "://" in link:
            continue
        if not path.exists() or (anchor and anchor not in slugs(path.read_text())):
            broken.append(link)
    assert not broken, "correct the link, or the heading that it points at"


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= README_LINES_MAX, "README has what a newcomer needs; move the rest to docs/"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > README_WIDTH_MAX]
    assert not wide, f"lines of README with more than {README_WIDTH_MAX} characters"


def test_every_page_is_reached_from_readme() -> None:
    links = {page.name: {link.partition("#")[0] for link in LINK.findall(page.read_text())} for page in PAGES}
    reached, ahead = {"README.md"}, ["README.md"]
    while ahead:
        for target in links[ahead.pop()]:
            name = Path(target).name
            if name in links and name not in reached:
                reached.add(name)
                ahead.append(name)
    assert not {page.name for page in PAGES} - reached, "link it from README or from a page that README links"


def test_every_verb_and_target_is_told() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    targets = re.findall(r"^([a-z-]+):.*## ", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 10
    untold = [f"headrace {verb}" for verb in VERBS if not re.search(rf"(?:headrace|make) {verb}\b", text)]
    untold += [f"make {target}" for target in targets if not re.search(rf"make {target}\b", text)]
    assert not untold, "tell what it does in docs/operations.md or on the page of its stage"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    told = README.read_text().partition("## Why each dependency")[2]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted}
    untold = sorted(name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", told))
    assert not untold, "say in README why it is there, or do without it"


def test_every_alert_is_told() -> None:
    told = (CHECKOUT / "docs" / "operations.md").read_text()
    rules = "\n".join(path.read_text() for path in (CHECKOUT / "deploy" / "prometheus").glob("*.rules.yaml"))
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert alerts
    assert {name for name in alerts if f"`{name}`" not in told} == set(), "say in docs/operations.md when it fires"


def test_the_layers_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " -> ".join(next(each["layers"] for each in contracts if each["type"] == "layers"))
    told = " ".join((CHECKOUT / "docs" / "CONTRIBUTING.md").read_text().split())
    assert f"`{layers}`" in told, f"docs/CONTRIBUTING.md tells other layers than {layers}"


def test_the_tree_in_readme_names_every_room() -> None:
    tree = README.read_text().partition("## The tree")[2].partition("\n## ")[0]
    folders = {Path(name).parent for name in FILES if name.endswith(".py")}
    folders = {folder for folder in folders if folder.parts and folder.parts[0] in ROOMS[:-1]}
    # A folder without modules of its own, such as examples/, is told by those below it.
    missing = sorted(str(each) for each in folders if has_modules(each) and not re.search(rf"[`/]{each.name}`", tree))
    assert not missing, "say in README's tree, in a phrase, what the room is"


def has_modules(folder: Path) -> bool:
    """Say whether a room holds modules, and not only rooms."""
    return any(path.name != "__init__.py" for path in (CHECKOUT / folder).glob("*.py"))


def test_a_room_shows_few_names() -> None:
    rooms = {str(Path(name).parent) for name in FILES if name.endswith(".py") and name.split("/")[0] in ROOMS}
    entries: Counter[str] = Counter()
    for room in rooms:
        entries[room] = len({name[len(room) + 1 :].split("/")[0] for name in FILES if name.startswith(f"{room}/")})
    large = {room: count for room, count in entries.items() if count > ROOM_ENTRIES_MAX}
    assert not large, f"{large}: part a room where its subjects part"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_in_pages_is_python(page: Path) -> None:
    for block in PYTHON.findall(page.read_text()):
        ast.parse(block)


def test_readmes_project_is_a_project() -> None:
    blocks = [block for block in PYTHON.findall(README.read_text()) if "PROJECT" in block]
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert isinstance(names["PROJECT"], Project)
    names["PROJECT"].checked()
