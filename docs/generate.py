"""Writes the pages of docs/ that are made from code: `make docs`, or `python docs/generate.py`.

`rank-api.md` comes from the structs that serving decodes and answers, by `headrace.serving.api.openapi`. `settings.md`
comes from the structs of `headrace.contract.config`: keys, types, ranges and defaults from the structs themselves, the
unit and the text from the docstring under each field. `metrics.md` comes from `METRICS` of `headrace.contract.metrics`.
tests/tidy compares the pages with what this program makes.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec import inspect as types
from msgspec.structs import FieldInfo

from headrace.contract import config, metrics
from headrace.contract.interfaces import ranking
from headrace.serving.api import openapi

DOCS = Path(__file__).resolve().parent
UNIT = re.compile(r"\s*Unit: ([^.]+)\.$")
NUMBERS = types.IntType | types.FloatType


class Setting(NamedTuple):
    """One field of a struct of settings, as its table shows it."""

    table: str
    key: str
    type: str
    unit: str
    default: str
    text: str
    number: bool


def tables() -> dict[str, type[Struct]]:
    """Return the TOML tables in the file's order: the name as it is written in TOML, and the struct."""
    hints = get_type_hints(config.Config, include_extras=True)
    found: dict[str, type[Struct]] = {"": config.Config}
    for name, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, Struct):
            found[name] = hint
            for below, inner in get_type_hints(hint).items():
                of_row = [each for each in get_args(inner) if isinstance(each, type) and issubclass(each, Struct)]
                found.update({f"{name}.{below}": each for each in of_row})
    return found


def docstrings(struct: type[Struct]) -> dict[str, str]:
    """Return the docstring under each field of `struct`, on one line; fields without one are left out."""
    statements = next(node for node in ast.parse(inspect.getsource(struct)).body if isinstance(node, ast.ClassDef)).body
    found: dict[str, str] = {}
    for field, after in itertools.pairwise(statements):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
            found[field.target.id] = " ".join(text.split())
    return found


def settings() -> Iterator[Setting]:
    """Yield every setting of `headrace.toml`, table by table, in the file's order."""
    for table, struct in tables().items():
        texts = docstrings(struct)
        for field in msgspec.structs.fields(struct):
            if isinstance(field.default, Struct):
                continue
            info = types.type_info(field.type)
            text = texts.get(field.encode_name, "")
            unit = UNIT.search(text)
            yield Setting(
                table=table,
                key=field.encode_name,
                type=type_text(info),
                unit=unit[1] if unit else "",
                default=default_text(field),
                text=UNIT.sub("", text),
                number=isinstance(info, NUMBERS),
            )


def type_text(info: Any) -> str:
    """Return type and range in words, such as `integer, 1 to 256`."""
    match info:
        case types.IntType() | types.FloatType():
            name = "integer" if isinstance(info, types.IntType) else "number"
            return ", ".join(part for part in (name, range_text(info)) if part)
        case types.StrType():
            if info.max_length is None:
                return "text"
            return f"text of {info.min_length or 0} to {info.max_length:,} characters"
        case types.DateType():
            return "date"
        case types.BoolType():
            return "true or false"
        case types.LiteralType():
            return "one of " + ", ".join(f"`{value}`" for value in info.values)
        case types.VarTupleType() if isinstance(info.item_type, types.StructType):
            return "tables"
        case types.VarTupleType():
            most = f", {info.max_length} at most" if info.max_length is not None else ""
            return f"list of {type_text(info.item_type)}{most}"
        case types.DictType():
            return f"table of {type_text(info.value_type)}"
    raise TypeError(f"{info}: say in docs/generate.py how a setting of this type is written")


def range_text(info: Any) -> str:
    """Return the range of a number, such as `1 to 256` or `at least 0`; integers above 0 begin at 1."""
    whole = isinstance(info, types.IntType)
    above, least, most = (_plain(bound) for bound in (info.gt, info.ge, info.le))
    if above is not None and whole:
        least = above + 1
    if least is not None and most is not None:
        return f"{least:,} to {most:,}"
    parts = [f"at least {least:,}" if least is not None else "", f"at most {most:,}" if most is not None else ""]
    if above is not None and not whole:
        parts[0] = f"above {above:,}"
    return ", ".join(part for part in parts if part)


def _plain(bound: float | None) -> float | None:
    """Return 1 for 1.0: typing takes equal annotations for one, so either may be the bound that is found."""
    return int(bound) if bound is not None and bound == int(bound) else bound


def default_text(field: FieldInfo) -> str:
    """Return a field's default as a reader of the table takes it."""
    if field.required:
        return "required"
    default = field.default_factory() if field.default is NODEFAULT else field.default
    match default:
        case bool():
            return "true" if default else "false"
        case int() | float():
            return f"{default:,}"
        case str():
            return f"`{default}`" if default else "empty"
        case tuple():
            return ", ".join(f"`{each}`" for each in default) or "none"
        case _:
            return f"`{default}`" if default else "none"


def settings_page() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `make docs` from headrace/contract/config.py: change it there. -->",
        "",
        "All settings are in `headrace.toml`, in your project's folder. The file is read once, at a stage's start.",
        "Every setting has a default that is safe to run, so an empty file is a valid one. An unknown key, a wrong",
        "type or a value outside the range is refused: the stage does not start, and the message names the key.",
        "",
        "The environment holds addresses and secrets only; [deploy.md](deploy.md#environment) lists its variables.",
    ]
    rows = list(settings())
    for table, struct in tables().items():
        title = f"`[[{table}]]`" if "." in table else f"`[{table}]`" if table else "The top of the file"
        about = " ".join((inspect.getdoc(struct) or "").split())
        about = re.sub(r"^\[+[a-z.]+\]+:?\s*", "", about)
        lines += ["", f"## {title}", ""]
        if about and table:
            lines += [about[0].upper() + about[1:], ""]
        lines += ["| key | type and range | unit | default | meaning |", "|---|---|---|---|---|"]
        for row in rows:
            if row.table == table:
                cells = (f"`{row.key}`", row.type, row.unit or "-", row.default, row.text)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Return docs/metrics.md: a table a stage, in the order of the stages' ports."""
    lines = [
        "# Metrics",
        "",
        "<!-- Written by `make docs` from headrace/contract/metrics/: change it there. -->",
        "",
        "Every stage serves `/metrics` in Prometheus' text format, `/readyz` and `/healthz` on a port of its own.",
        "There the name of a metric is `headrace_<stage>_<name>`. A label that a stage does not use is empty.",
        "In version 0.1 a metric whose labels have other names than `reason` has that one too. It has their values,",
        "joined by a space: [CHANGELOG.md](CHANGELOG.md#labels-of-metrics) lists these metrics.",
        "[operations.md](operations.md#what-to-watch) says which metrics to watch first.",
    ]
    for stage in get_args(metrics.Stage):
        lines += ["", f"## {stage}", "", f"Port {config.port(f'metrics_{stage}')}, `headrace_{stage}_<name>`.", ""]
        lines += ["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
        for name, doc in metrics.METRICS.items():
            if stage in doc.stages:
                labels = ", ".join(f"`{label}`" for label in doc.labels)
                lines.append(f"| `{name}` | {doc.kind} | {doc.unit} | {labels} | {doc.meaning} |".replace("\n", " "))
    return "\n".join(lines) + "\n"


def rank_api_page() -> str:
    """Return docs/rank-api.md: serving's routes, and the fields of what they take and answer."""
    lines = [
        "# Serving's routes",
        "",
        "<!-- Written by `make docs` from serving/api/ and headrace/contract/interfaces/: change it there. -->",
        "",
        "`GET /openapi.json` says the same of a running project, with the project's own fields.",
        "[serving.md](serving.md) tells how it is meant. Bodies and answers are JSON. Fields are added, and none",
        "changes its type: ignore what you do not know.",
        "",
        "| route | what | body | answer | refused |",
        "|---|---|---|---|---|",
    ]
    kinds: dict[type[Struct], None] = {}
    for each in openapi.OPERATIONS:
        named = [f"[{kind.__name__}](#{kind.__name__.lower()})" if kind else "" for kind in (each.body, each.answer)]
        kinds |= dict.fromkeys(kind for kind in (each.body, each.answer) if kind)
        statuses = ", ".join(map(str, (*each.refused, *((503,) if each.unready else ()))))
        lines.append(f"| `{each.method.upper()} {each.path}` | {each.summary} | {named[0]} | {named[1]} | {statuses} |")
    kinds |= dict.fromkeys((ranking.PositionsAnswer, ranking.Problem))
    lines += [
        "",
        "## What is refused",
        "",
        "The body is a [Problem](#problem).",
        "",
        "| status | meaning |",
        "|---|---|",
    ]
    lines += [f"| {status} | {text} |" for status, text in openapi.REFUSED.items()]
    for kind in openapi.structs_of(list(kinds)):
        about = (inspect.getdoc(kind) or "").replace("\n", " ")
        lines += ["", f"## {kind.__name__}", "", about, "", "| field | type | default | meaning |", "|---|---|---|---|"]
        texts = openapi.field_texts(kind)
        for field in msgspec.structs.fields(kind):
            text = texts.get(field.name, "")
            default = "required" if field.required else default_of(field)
            lines.append(f"| `{field.encode_name}` | {field_type(field.type)} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def default_of(field: FieldInfo) -> str:
    """Return a field's default, as JSON has it."""
    default = field.default_factory() if field.default is NODEFAULT else field.default
    return f"`{msgspec.json.encode(default).decode()}`"


def field_type(hint: Any) -> str:
    """Return the type of a field of a body in words.

    >>> field_type(list[str]), field_type(dict[str, Any]), field_type(int | None)
    ('list of text', 'object', 'integer or null')
    """
    match types.type_info(hint):
        case types.IntType() as info:
            return ", ".join(part for part in ("integer", range_text(info)) if part)
        case types.FloatType() as info:
            return ", ".join(part for part in ("number", range_text(info)) if part)
        case types.StrType() as info:
            return type_text(info)
        case types.BoolType():
            return "true or false"
        case types.NoneType():
            return "null"
        case types.AnyType():
            return "any"
        case types.DictType():
            return "object"
        case types.StructType(cls):
            return f"[{cls.__name__}](#{cls.__name__.lower()})"
        case types.ListType(item):
            return f"list of {_named(item)}"
        case types.UnionType(parts):
            return " or ".join(_named(part) for part in parts)
        case types.Metadata(inner):
            return _named(inner)
    raise TypeError(f"{hint}: say in docs/generate.py how a field of this type is written")


def _named(info: Any) -> str:
    simple = {types.AnyType: "any", types.NoneType: "null", types.DictType: "object", types.BoolType: "true or false"}
    if type(info) in simple:
        return simple[type(info)]
    if isinstance(info, types.Metadata):
        return _named(info.type)
    if isinstance(info, types.StructType):
        return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
    if isinstance(info, types.ListType):
        return f"list of {_named(info.item_type)}"
    return "text" if isinstance(info, types.StrType) else "integer" if isinstance(info, types.IntType) else "number"


PAGES = {"rank-api.md": rank_api_page, "settings.md": settings_page, "metrics.md": metrics_page}
"""Page of docs/ -> the function that returns its text."""


def main() -> int:
    """Write every page; say which changed."""
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"docs/{name}: {'written' if changed else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
