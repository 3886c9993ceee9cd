"""Make the folder of a new project: headrace.toml, project.py, and traffic.py for a try.

Without --like it is the smallest project, a store with clicks. `--like ads` has several ads a request, a hashed key,
two tasks and corrections; `--like fraud` has labels that come hours late; `--like shop` is the demo shop, with settings
of your own. Change what you like: nothing but these files is yours, and nothing is sent before you start `headrace
traffic`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

from headrace.cli.project_folder import load_project
from headrace.cli.tools.example_request import example_request
from headrace.contract.config import port
from headrace.contract.errors import ConfigRejected

EXAMPLES = "headrace.examples"
SMALLEST, SHOP = "store", "shop"
LIKE = ("ads", "fraud", SHOP)
FILES = ("headrace.toml", "project.py", "traffic.py")
SHOP_FILES = ("headrace.toml", "shop.py")
"""The demo shop is known by its declarations, so they stay as they are; its traffic is a stage of the stack."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    parser.add_argument("folder", metavar="NAME", help="the new folder; its last part names project, model and tags")
    parser.add_argument(
        "--like", choices=LIKE, default=SMALLEST, help="which example to begin with; without it a store"
    )


def main(args: argparse.Namespace) -> int:
    """Write the files and say what to do next. Raises `ConfigRejected` where there is something already."""
    folder = Path(args.folder)
    for file in make_project(folder, args.like):
        print(f"{file}")
    print("\n".join(["next:", *(f"  {line}" for line in next_steps(args.folder, args.like))]), file=sys.stderr)
    return 0


def make_project(folder: Path, like: str = SMALLEST) -> list[Path]:
    """Write a new project's files into `folder` and return them.

    Raises `ConfigRejected` where its name is no project's, or where it holds something.
    """
    name = folder.resolve().name
    if not _NAME.fullmatch(name):
        raise ConfigRejected(f"NAME {name!r}: begin with a-z or 0-9, and go on with these, `_` and `-`.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigRejected(f"{folder} exists and is no empty folder: nothing was changed. Choose another name.")
    spec = importlib.util.find_spec(f"{EXAMPLES}.{like}")
    if spec is None or spec.origin is None:
        raise ConfigRejected(f"{EXAMPLES}.{like} is not installed: install headrace anew.")
    source, files = Path(spec.origin).parent, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in SHOP_FILES if like == SHOP else FILES:
            text = (source / file).read_text()
            (folder / file).write_text(text if like == SHOP else renamed(text, like, name))
            files.append(folder / file)
    except OSError as error:
        raise ConfigRejected(f"{folder} cannot be written: {error}.") from error
    return files


def renamed(text: str, old: str, new: str) -> str:
    """Return an example's text with the project's name and its tags' first part changed.

    >>> renamed('name="ads", tag="ads.click"', "ads", "mine")
    'name="mine", tag="mine.click"'
    """
    return re.sub(rf'"{old}(?=[".])', f'"{new}', text)


def next_steps(folder: str, like: str) -> list[str]:
    """Return what a new user does next, a command a line: the shortest way to a score."""
    quoted = shlex.quote(folder)
    steps = [f"headrace check {quoted}", f"headrace up --detach --project {quoted}    # `headrace down` stops it"]
    if like == SHOP:
        return [*steps, "the demo shop's traffic begins by itself; `headrace follow` shows it"]
    base = os.environ.get("PORT_BASE", "")
    steps.append(f"headrace traffic --project {quoted}    # made-up visitors, until Ctrl-C")
    steps.append(example_request(load_project(Path(folder))[1], port("serving", int(base) if base.isdigit() else None)))
    if like == "ads":
        key = 'export HEADRACE_PRIVACY_KEY="$(openssl rand -hex 16)"    # keep it: cookies are hashed under it'
        return [key, *steps]
    return steps
