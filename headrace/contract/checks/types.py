"""Values of another type than a declaration wants: a struct's constructor does not look at types and ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from headrace.contract.errors import ConfigRejected, listed, meant, wanted

_NAMED: dict[type, str] = {int: "int64", float: "float64", str: "string", list: "list[string]"}
"""Python's types -> what a field of them is called."""
SHORT_MAX = 80
"""Signs of a value that a message shows."""
_TUPLE_HINT = ' A tuple of one ends in a comma: ("click",).'
_KEY_HINT = ' A tuple names two fields or more; one field is a text, key="user_id".'


def type_faults(value: Any, hint: Any, *, path: str = "", owner: object = None) -> Iterator[ConfigRejected]:
    """Give a fault for each value in a declaration that is not of its declared type or range.

    Args:
        value: a declaration, or what stands in one.
        hint: its declared type.
        path: of the value in the `Project`, such as `tasks[0].window_ms`.
        owner: the declaration that holds it.
    """
    try:
        msgspec.convert(msgspec.to_builtins(value), hint)
        return
    except (msgspec.ValidationError, TypeError) as error:
        said = str(error).partition(" - at `")[0]
    inner = False
    for name, one, of in _parts(value, hint):
        for fault in type_faults(one, of, path=f"{path}{name}".lstrip("."), owner=_holder(value, owner)):
            inner = True
            yield fault
    if not inner:
        yield ConfigRejected(_words(value, hint, said, path, owner), at=path)


def _holder(value: object, owner: object) -> object:
    return value if isinstance(value, msgspec.Struct) else owner


def _parts(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """Give what a value holds: the end of its path, the part itself, and its declared type."""
    if isinstance(value, msgspec.Struct):
        hints = get_type_hints(type(value), include_extras=True)
        yield from ((f".{name}", getattr(value, name), hints[name]) for name in value.__struct_fields__)
        return
    kind = dict if isinstance(value, dict) else tuple
    args = next((get_args(one) for one in _choices(hint) if get_origin(one) is kind), ())
    if isinstance(value, dict) and args:
        yield from ((f"[{name!r}]", one, args[1]) for name, one in value.items())
    elif isinstance(value, tuple | list) and args:
        of = [args[0]] * len(value) if args[-1] is Ellipsis else args
        yield from ((f"[{index}]", one, kind) for index, (one, kind) in enumerate(zip(value, of, strict=False)))


def _choices(hint: Any) -> Iterator[Any]:
    """Give the types of a union, and of what is annotated; the type itself where it is neither."""
    if hasattr(hint, "__metadata__"):
        yield from _choices(hint.__origin__)
    elif get_args(hint) and get_origin(hint) not in (tuple, dict):
        for one in get_args(hint):
            yield from _choices(one)
    else:
        yield hint


def _words(value: Any, hint: Any, said: str, path: str, owner: object) -> str:
    name = path.rpartition(".")[2].partition("[")[0]
    texts = [one for one in _choices(hint) if isinstance(one, str)]
    if isinstance(value, type) and texts:
        near = _NAMED.get(value) or meant(value.__name__, texts).partition("'")[2].rpartition("'")[0]
        which = f'write "{near}"' if near in texts else f"one of {listed(texts)} is wanted"
        return f"{path} is Python's type {value.__name__}: {which}, a text."
    if not isinstance(value, msgspec.Struct | str | int | float | bool | tuple | list | dict | None):
        call = f"call it: {value.__name__}(...)" if callable(value) else "write what is wanted there"
        return f"{path} is a {type(value).__name__}, which is no declaration: {call}."
    structs = [one.__name__ for one in _choices(hint) if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    if isinstance(value, msgspec.Struct) and structs:
        said = f"one of {listed(structs)} is wanted there."
    elif isinstance(value, dict) and (odd := [key for key in value if not isinstance(key, str)]):
        said = f"its key {odd[0]!r} is no text."
    elif texts:
        said = f"one of {', '.join(map(repr, texts))} is wanted.{meant(str(value), texts)}"
    else:
        said = f"{wanted(said)}."
    more = _TUPLE_HINT if isinstance(value, str) and "tuple" in said else ""
    more = more or (_KEY_HINT if name == "key" and isinstance(value, tuple | list) else "")
    named = getattr(owner, "name", None)
    whose = f" of {type(owner).__name__} {named!r}" if isinstance(named, str) else ""
    shown = type(value).__name__ if isinstance(value, msgspec.Struct) else _short(value)
    return f"{path}{whose} is {shown}: {said}{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHORT_MAX else f"{text[: SHORT_MAX - 3]}..."
