"""What can be wrong in `headrace.toml`: each setting that is unknown or of another type, by its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec
from msgspec import Struct

from headrace.contract.errors import listed, meant, wanted

_UNKNOWN_KEY = re.compile(r"Object contains unknown field `([^`]*)`")
_AT = re.compile(r" - at `\$([^`]*)`$")


def wrong_settings(found: Any, kind: Any, path: str) -> Iterator[str]:
    """Give a decoder's message, with its path, for each setting that is unknown or of another type."""
    try:
        msgspec.convert(found, kind)
        return
    except msgspec.ValidationError as error:
        said, at, inside = str(error).partition(" - at `$")
    inner = False
    structs = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Struct)]
    if isinstance(found, dict) and structs:
        types = {field.name: field.type for field in msgspec.structs.fields(structs[0])}
        for name, value in found.items():
            unknown = f"Object contains unknown field `{name}` - at `${path}`"
            of_name = wrong_settings(value, types[name], f"{path}.{name}") if name in types else [unknown]
            for each in of_name:
                inner = True
                yield each
    elif isinstance(found, list) and structs:
        for number, value in enumerate(found):
            for each in wrong_settings(value, structs[0], f"{path}[{number}]"):
                inner = True
                yield each
    if not inner:
        yield f"{said} - at `${path}{inside if at else '`'}"


def setting_words(said: str, text: bytes, where: str, root: type[Struct]) -> str:
    """Return a decoder's message with the key's line and, of an unknown key, the one that may be meant.

    `root` is the struct of the whole file.
    """
    found = _AT.search(said)
    path, said = (found[1] if found else "").lstrip("."), _AT.sub("", said)
    unknown = _UNKNOWN_KEY.search(said)
    table, _, key = (f"{path}.{unknown[1]}" if unknown else path).rpartition(".")
    plain = re.sub(r"\[[^\]]*\]", "", table)
    known = _keys_of(plain, root)
    line = _line_of(text.decode(errors="replace"), plain, key)
    at = f"{where}{f', line {line}' if line else ''}"
    if unknown:
        said = f"[{plain}] has no setting {key!r}." if plain else f"there is no setting or table {key!r}."
        near = meant(key, known)
        return f"{at}: {said}{near or f' There are {listed(known)}.'} docs/settings.md lists every setting."
    key = re.sub(r"\[[^\]]*\]", "", key)
    name = f"{plain}.{key}".strip(".") or "a setting"
    if said.startswith("Expected `object`"):
        return f"{at}: {name} is a table: write [{name}] on a line of its own, and its settings below it."
    return f"{at}: {name}: {wanted(said)}. docs/settings.md says what {key or 'each setting'} takes."


def _keys_of(table: str, root: type[Struct]) -> tuple[str, ...]:
    """Return the settings of a table, () where there is no such table."""
    struct = root
    for name in filter(None, table.split(".")):
        types = {field.name: field.type for field in msgspec.structs.fields(struct)}
        inner = [t for t in (types.get(name), *get_args(types.get(name))) if isinstance(t, type)]
        found = [t for t in inner if issubclass(t, Struct)]
        if not found:
            return ()
        struct = found[0]
    return struct.__struct_fields__


def _line_of(text: str, table: str, key: str) -> int:
    """Return the line of a table's key, of the table itself where the key has none, 0 where neither is found."""
    here, heading = "", 0
    assigned = re.compile(rf"\s*\"?{re.escape(key.partition('[')[0])}\"?\s*[=.]")
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\[?\s*([\w.\"-]+)\s*\]", line):
            here = header[1].replace('"', "")
            if here in {table, f"{table}.{key}".lstrip(".")}:
                heading = number
            if here == f"{table}.{key}".lstrip("."):
                return number
        elif here == table and assigned.match(line):
            return number
    return heading
