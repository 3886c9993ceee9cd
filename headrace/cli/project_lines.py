"""Words for what is wrong in a user's Python file: which file and line, what it says there, and what to do."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from headrace.contract.errors import listed, meant

_UNEXPECTED = re.compile(r"(?:[Uu]nexpected keyword argument|has no field) '(\w+)'")
_MISSING = re.compile(r"Missing required argument '(\w+)'")
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)+)'")
SNIPPET_MAX = 100


def failed(error: BaseException, file: Path, names: Mapping[str, Any]) -> str:
    """Return how running the user's file failed: place, what, the line itself, and what to do.

    `names` is what the file had defined until then.
    """
    frames = _own_frames(error, file)
    where, line = frames[-1] if frames else (file, 1)
    if isinstance(error, SyntaxError):
        where, line = Path(error.filename or file), error.lineno or 1
        error = type(error)(error.msg)
    way = "".join(f" (imported by {path.name}, line {at})" for path, at in frames[:1] if path != where)
    text = _source_line(where, line)
    shown = f"\n    {text}" if text else ""
    head = f"{where}, line {line}{way}: {type(error).__name__}"
    said = "" if isinstance(error, SystemExit) else str(error)
    return f"{head}{f': {said}' if said else ''}.{shown}\n{_remedy(error, text, where, line, names)}".replace(
        "..\n", ".\n"
    )


def line_of(file: Path, name: str, path: str, said: str) -> int:
    """Return the line of a declaration, 0 where it is not found.

    Args:
        name: of the `Project` in the file.
        path: such as `tasks[0].window_ms`; "" where it is not known: then the first text that `said` quotes counts.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return 0
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    if path:
        return _followed(assigned.get(name), path, assigned)
    texts: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts[node.value] = max(node.lineno, texts.get(node.value, 0))
    return next((texts[word] for word in _QUOTED.findall(said) if word in texts), 0)


def _followed(node: ast.expr | None, path: str, assigned: Mapping[str, ast.expr]) -> int:
    line = 0
    for name, index, key in re.findall(r"(\w+)|\[(\d+)\]|\['([^']*)'\]", path):
        while isinstance(node, ast.Name):
            node = assigned.get(node.id)
        if isinstance(node, ast.Call) and name:
            line = node.lineno
            node = next((word.value for word in node.keywords if word.arg == name), None)
        elif (
            isinstance(node, ast.Tuple | ast.List) and index and not any(isinstance(e, ast.Starred) for e in node.elts)
        ):
            node = node.elts[int(index)] if int(index) < len(node.elts) else None
        elif isinstance(node, ast.Dict) and key:
            pairs = zip(node.keys, node.values, strict=True)
            node = next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == key), None)
        else:
            return line
        line = node.lineno if node is not None else line
    return line


def _own_frames(error: BaseException, file: Path) -> list[tuple[Path, int]]:
    """Return the user's own files and lines that led to the error, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [(Path(f.filename), f.lineno or 1) for f in frames if Path(f.filename).is_relative_to(file.parent)]
    return [(path, line) for path, line in own if "site-packages" not in path.parts]


def _source_line(file: Path, line: int) -> str:
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError:
        return ""
    text = lines[line - 1].strip() if line <= len(lines) else ""
    return "".join(c if c.isprintable() else " " for c in text)[:SNIPPET_MAX]


def _remedy(error: BaseException, text: str, file: Path, line: int, names: Mapping[str, Any]) -> str:
    said = str(error)
    match error:
        case TabError() | IndentationError():
            return "Indent with spaces alone, the same number for lines of one block."
        case SyntaxError() if "null bytes" in said:
            return "Save the file as UTF-8: it holds zero bytes, as UTF-16 has them."
        case SyntaxError():
            return (
                "Correct this line, or the end of the one before it: a bracket, comma or quote is missing or too many."
            )
        case ModuleNotFoundError():
            module = str(error.name)
            near = meant(module, [name for name in sys.modules if name.startswith("headrace")])
            return near.strip() or (
                f"Put {module.partition('.')[0]}.py beside {file.name}, or install the package: "
                f"{sys.executable} -m pip install {module.partition('.')[0]}."
            )
        case ImportError() if "relative import" in said:
            return f"Name the file beside {file.name} without the dot: from consts import ..."
        case ImportError() | AttributeError() if hidden := _hidden(error, file):
            return (
                f"{hidden}.py beside {file.name} is not read: Python has a module {hidden!r} of its own. Give yours "
                "another name."
            )
        case ImportError() if error.name == file.stem:
            return "The file imports itself: write the name without the import."
        case ImportError():
            wanted = re.search(r"cannot import name '(\w+)'", said)
            source = sys.modules.get(str(error.name))
            known = [n for n in vars(source) if n[:1].isalpha()] if wanted and source is not None else []
            near = meant(wanted[1], known).strip() if wanted else ""
            return near or "Correct the import; docs/project.md names the modules that projects use."
        case NameError():
            return _import_of(str(error.name), names)
        case TypeError() if unexpected := _UNEXPECTED.search(said):
            known = _fields_of(file, line, unexpected[1], names)
            near = meant(unexpected[1], known)
            return f"Leave it out, or correct its name.{near or (f' There are: {listed(known)}.' if known else '')}"
        case TypeError() if missing := _MISSING.search(said):
            return f"Add {missing[1]}=... to the declaration that begins there."
        case TypeError() if "positional arguments" in said:
            return "Name each argument: Numeric(field=...)."
        case SystemExit():
            return "The file must not end the process: it is read by every stage. Take the exit out."
        case OSError():
            return "Every stage reads this file, anywhere: give a path that is there, or take the reading out."
    return "Correct this line: every stage runs the file when it starts."


def _hidden(error: ImportError | AttributeError, file: Path) -> str:
    """Return the module that lies beside a file and is hidden by one of Python's own, "" where none is."""
    module = error.name if isinstance(error, ImportError) else getattr(error.obj, "__name__", "")
    return str(module) if module in sys.stdlib_module_names and (file.parent / f"{module}.py").is_file() else ""


def _fields_of(file: Path, line: int, keyword: str, names: Mapping[str, Any]) -> list[str]:
    """Return what the declaration at a line may be given, [] where it is not known which one it is."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        spans = call.lineno <= line <= (call.end_lineno or call.lineno)
        if spans and keyword in {word.arg for word in call.keywords} and isinstance(call.func, ast.Name):
            kind = names.get(call.func.id)
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                return [*kind.__struct_fields__]
            if callable(kind) and "headrace" in str(getattr(kind, "__module__", "")):
                recipe = sys.modules.get("headrace.contract.recipe")
                return [*recipe.Recipe.__struct_fields__] if recipe else []
    return []


def other_calls(error: BaseException, file: Path, names: Mapping[str, Any]) -> Iterator[str]:
    """Give what is wrong with further declarations of a file that a wrong name or argument stopped: names that nothing
    defines, arguments that a declaration does not have, and ones that it lacks. The one that stopped it is left out."""
    if not isinstance(error, NameError | TypeError):
        return
    frames = [line for path, line in _own_frames(error, file) if path == file]
    stopped = (frames or [0])[-1]
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    defined = {*names, *vars(builtins), *_defined(tree)}
    told = {str(error.name)} if isinstance(error, NameError) else set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        name = cast("ast.Name", call.func).id
        if name not in defined and name not in told:
            told.add(name)
            yield f"{file}, line {call.lineno}: NameError: name {name!r} is not defined.\n{_import_of(name, defined)}"
        kind = names.get(name)
        if call.lineno == stopped or not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            continue
        given = [word.arg for word in call.keywords]
        fields = msgspec.structs.fields(kind)
        known = [field.name for field in fields]
        for word in (word for word in given if word is not None and word not in known):
            near = meant(word, known) or f" There are: {listed(known)}."
            yield f"{file}, line {call.lineno}: {name} has no {word!r}. Leave it out, or correct its name.{near}"
        for field in fields:
            if field.required and field.name not in given and None not in given and not call.args:
                yield f"{file}, line {call.lineno}: {name} lacks {field.name!r}. Add {field.name}=... to it."


def _defined(tree: ast.AST) -> Iterator[str]:
    """Give each name that a file defines anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)


DECLARING = ("contract.project", "contract.spec", "contract.crawl", "contract.mapping", "contract.functions")
"""Modules whose names a project uses, and the recipes, which are ours too."""


def _import_of(name: str, known: Iterable[str]) -> str:
    """Return what to do about a name that nothing defines: its import, where it is one of ours."""
    for module in (*(f"headrace.{each}" for each in DECLARING), "headrace.trainer.recipes"):
        found = getattr(importlib.import_module(module), name, None)
        if getattr(found, "__module__", "") == module:
            return f"Import it: from {module} import {name}."
    return f"Define or import it first.{meant(name, known)}"


def own_lines(error: BaseException, folder: Path) -> Iterator[str]:
    """Give the user's own lines that an error went through, a line each: what is ours of a traceback helps nobody."""
    for path, line in _own_frames(error, folder / "any"):
        yield f"{path}, line {line}: {_source_line(path, line)}"
