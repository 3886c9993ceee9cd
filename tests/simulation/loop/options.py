"""Which options a project can declare, and which of them one project does declare; both found by reflection."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import msgspec

from headrace.contract.crawl import Crawl, Extract, Follow
from headrace.contract.mapping import AccessLog, Route
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.recipe import Recipe
from headrace.contract.spec import Counter, Feature, FeatureSpec

KINDS: tuple[type[msgspec.Struct], ...] = (
    *(Project, ImpressionType, FeedbackType, Task, FeatureSpec, Counter, Recipe),
    *(AccessLog, Route, Crawl, Extract, Follow),
    *typing.get_args(Feature),
)
"""Every struct that a project is made of."""

_FETCHING = "tests/unit/ingest/crawl/test_crawl_sources.py"
_BESIDE = "tests/simulation/loop/test_variants.py"
EXEMPT = {
    **{f"Crawl.{name}": _FETCHING for name in ("sitemaps", "follow", "hosts", "every_ms", "pages_max", "keys_max")},
    **{f"Crawl.{name}": _FETCHING for name in ("depth_max", "bytes_max", "timeout_ms", "delay_ms", "parallel")},
    **{f"Follow.{name}": _FETCHING for name in ("url", "at")},
    **{f"Project.{name}": _BESIDE for name in ("variants", "variant")},
}
"""Options of how pages are fetched, which the loop in memory has no part in, and of what learns beside; and the tests
that hold them."""


def declared_options() -> set[str]:
    """Return the names of all options: `Struct.field`, or `Struct.field=value` for each value that can be chosen."""
    names = set[str]()
    for kind in KINDS:
        for field in msgspec.structs.fields(kind):
            name = f"{kind.__name__}.{field.name}"
            choices = choices_of(kind, field.name)
            names |= {f"{name}={choice}" for choice in choices} if choices else {name}
    return names


def options_of(project: Project) -> set[str]:
    """Return the names of the options that a project declares: what differs from its default, and every choice."""
    return set(_found(project))


@cache
def choices_of(kind: type[msgspec.Struct], name: str) -> tuple[str, ...]:
    """Return the values that a field can be chosen from, also where they stand in a dict; none where it is free."""
    hint = typing.get_type_hints(kind, include_extras=False)[name]
    return tuple(dict.fromkeys(_literals(hint)))


def _literals(hint: Any) -> Iterator[str]:
    if typing.get_origin(hint) is Literal:
        yield from map(str, typing.get_args(hint))
        return
    for part in typing.get_args(hint):
        yield from _literals(part)


def _found(value: Any) -> Iterator[str]:
    if isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _found(part)
        return
    if not isinstance(value, msgspec.Struct):
        return
    kind = type(value)
    for field in msgspec.structs.fields(kind):
        held, name = getattr(value, field.name), f"{kind.__name__}.{field.name}"
        choices = choices_of(kind, field.name)
        if choices:
            yield from (f"{name}={leaf}" for leaf in _leaves(held) if leaf in choices)
        elif held != _default(field):
            yield name
        yield from _found(held)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield str(value)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
