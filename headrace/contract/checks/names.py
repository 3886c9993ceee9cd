"""Names that a project may not give: those of our own columns, and two of one kind that nobody could tell apart.

A field lies beside our own columns in `events`, in `samples` and in the lake. One of the same name would take the
other's place, or be taken for it; Delta takes names that differ only by case for one, and refuses the commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from headrace.contract.crawl import PREFIX as EXTERNAL_PREFIX
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.events import ENVELOPE, VALUE, VERSION
from headrace.contract.formats.sample import LAKE_HOURS, LEAD, TAIL

if TYPE_CHECKING:
    from headrace.contract.project import FeedbackType, ImpressionType, Project

LATER = frozenset({"served", "score", "propensity", "arm", "sent_at", "history"})
"""Of columns that are to come: what was served and how, when it was sent, what went before."""
RESERVED: frozenset[str] = frozenset(
    {column.name for column in (*ENVELOPE, VERSION, VALUE, *LEAD, *TAIL, *LAKE_HOURS)} | LATER
)
"""Every name of a column of ours, lower case. Names that begin with `PREFIXES` are ours too."""
PREFIXES = ("counter.", f"{EXTERNAL_PREFIX}.")
PROJECT_MAX, NAME_MAX, SHOWN_MAX = 64, 200, 40
"""Letters of a project's name, of any other, and of one that a message shows. Files of 255 letters hold the first."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
"""Of a project: it stands in names of blobs."""
VARIANT_MAX, VARIANTS_MAX = 32, 4
"""Letters of a variant's name; most variants, each of which is a process with a metrics port of its own."""
_VARIANT = re.compile(r"[a-z0-9][a-z0-9-]*")
"""Of a variant: it stands in names of topics too, where `_` and `.` are one."""
_SENT = frozenset(column.name for column in (*ENVELOPE, VERSION, VALUE))
"""What an event brings beside its own fields."""


def name_faults(project: Project) -> Iterator[ConfigRejected]:
    """Give a fault for each declared name that is ours, or that two declarations share."""
    if not _NAME.fullmatch(project.name) or len(project.name) > PROJECT_MAX:
        yield ConfigRejected(
            f"name {_shown(project.name)}: begin with a-z or 0-9, and go on with these, `_` and `-`, {PROJECT_MAX} "
            "at most.",
            at="name",
        )
    yield from _variant_faults(project)
    yield from _word_faults(project)
    kinds: tuple[ImpressionType | FeedbackType, ...] = (project.impression, *project.feedback)
    for number, kind in enumerate(kinds):
        at = f"feedback[{number - 1}]" if number else "impression"
        for field in kind.fields:
            yield from _field_faults(field, kind.tag, at=f"{at}.fields['{field}']")
        dropped = sorted(_SENT & kind.private.keys())
        if dropped:
            yield ConfigRejected(
                f"{kind.tag!r} calls {dropped[0]!r} private, which every event brings: what is personal in it belongs "
                "in a field of its own.",
                at=f"{at}.private",
            )
    key = project.impression.key
    for number, kind in enumerate(kinds):
        own = kind.fields if kind is project.impression or key in kind.fields else [key, *kind.fields]
        at = f"feedback[{number - 1}].fields" if number else "impression.fields"
        yield from _apart(own, f"fields of {kind.tag!r}", at=at)
    yield from _apart(["impression", *(f.name for f in project.feedback)], "types of events", by_case=False)
    yield from _apart([kind.tag for kind in kinds], "tags", by_case=False)
    yield from _apart([task.name for task in project.tasks], "tasks", by_case=False)
    yield from _apart([counter.name for counter in project.features.counters], "counters")
    if len({counter.name.lower() for counter in project.features.counters}) == len(project.features.counters):
        yield from _apart(project.features.counter_columns(), "columns of counters")


def _variant_faults(project: Project) -> Iterator[ConfigRejected]:
    for name in (*project.variants, *((project.variant,) if project.variant else ())):
        if not _VARIANT.fullmatch(name) or len(name) > VARIANT_MAX:
            yield ConfigRejected(
                f"variant {_shown(name)}: begin with a-z or 0-9, and go on with these and `-`, {VARIANT_MAX} at most.",
                at=f"variants[{name!r}]",
            )
    if len(project.variants) > VARIANTS_MAX:
        yield ConfigRejected(
            f"{len(project.variants)} variants: {VARIANTS_MAX} at most learn beside the project's recipe. Drop some.",
            at="variants",
        )


def _word_faults(project: Project) -> Iterator[ConfigRejected]:
    """Give a fault for each tag, type, task and counter whose name cannot stand in a log line, a metric or a column."""
    kinds: tuple[ImpressionType | FeedbackType, ...] = (project.impression, *project.feedback)
    words = [(f"feedback[{n - 1}].tag" if n else "impression.tag", kind.tag) for n, kind in enumerate(kinds)]
    words += [(f"feedback[{n}].name", each.name) for n, each in enumerate(project.feedback)]
    words += [(f"tasks[{n}].name", each.name) for n, each in enumerate(project.tasks)]
    words += [(f"features.counters[{n}].name", each.name) for n, each in enumerate(project.features.counters)]
    for at, word in words:
        if what := _odd(word) or ("has a space in it" if word.split() != [word] else ""):
            yield ConfigRejected(f"{at} {_shown(word)}: it {what}. Give it a short one of letters.", at=at)


def _odd(word: str) -> str:
    """Return what is wrong with a name, "" for a good one."""
    if not word:
        return "is empty"
    if not word.isprintable():
        return "has signs that cannot be read"
    return f"has {len(word)} letters, {NAME_MAX} at most" if len(word) > NAME_MAX else ""


def _shown(word: str) -> str:
    return repr(word if len(word) <= SHOWN_MAX else f"{word[:SHOWN_MAX]}...")


def clashing(before: Iterable[str], after: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names, of before and of after, that differ only by case.

    >>> clashing(["user", "Price"], ["price", "user"])
    ('Price', 'price')
    """
    known: Mapping[str, str] = {name.lower(): name for name in before}
    return next(((known[n.lower()], n) for n in after if known.get(n.lower(), n) != n), None)


def _field_faults(field: str, tag: str, *, at: str) -> Iterator[ConfigRejected]:
    if what := _odd(field):
        yield ConfigRejected(
            f"{_shown(tag)} declares a field {_shown(field)}: the name {what}. Give it one of letters.", at=at
        )
    ours = field.lower()
    if ours in RESERVED or ours.startswith(PREFIXES):
        yield ConfigRejected(
            f"{tag!r} declares a field {field!r}, which is a name of Headrace's own columns: give it another one, such "
            f"as {'my_' + ours.replace('.', '_')!r}, here and in what sends it. Where the log is read with it already, "
            "`headrace spec apply` then puts the new name in force from there on; raise log.generation where samples "
            "were stored under the old one. docs/project.md lists the names.",
            at=at,
        )


def _apart(names: Iterable[str], what: str, *, by_case: bool = True, at: str = "") -> Iterator[ConfigRejected]:
    seen: dict[str, str] = {}
    for name in names:
        one = name.lower() if by_case else name
        if one in seen:
            how = "are one" if seen[one] == name else "differ only by case, and the lake takes them for one"
            yield ConfigRejected(f"the {what} {seen[one]!r} and {name!r} {how}: give one of them another name.", at=at)
        seen[one] = name
