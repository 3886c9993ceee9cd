"""Tells of fields that come and are not declared: what may be meant, each name once in the log, few as labels. Pure.

A field that is left out in silence is noticed weeks later, by a feature that is always missing. What `unknown` makes
of such fields stands in docs/events.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from headrace.contract.errors import meant

NAMES_MAX = 20
"""Names that are labels of a metric and have a line in the log; strangers may send any."""
LETTERS_MAX = 64
OTHERS = "(others)"
_TIMES = frozenset({"time", "timestamp", "ts", "event_time", "date", "datetime", "@timestamp"})
_SERVED = ("counter.", "external.")
"""How names begin that serving itself returned: an old specification had them."""


def meant_field(name: str, declared: Iterable[str]) -> str:
    """Return a question that names the declared field which a misspelt one may mean, "" where none is near.

    >>> meant_field("pirce", ["price", "user_id"]), meant_field("Timestamp", ["price", "event_time_ms"])
    (" Did you mean 'price'?", " Did you mean 'event_time_ms', Unix time in milliseconds?")
    >>> meant_field("userId", ["user_id"]), meant_field("hostname", ["user_id"])
    (" Did you mean 'user_id'?", '')
    """
    names = list(declared)
    if name.lower() in _TIMES and "event_time_ms" in names:
        return " Did you mean 'event_time_ms', Unix time in milliseconds?"
    plain = {each.lower().replace("_", ""): each for each in names}
    same = plain.get(name.lower().replace("_", "").replace("-", ""))
    return f" Did you mean {same!r}?" if same else meant(name[:LETTERS_MAX], names)


def shown(name: object) -> str:
    """Return a field's name as a message has it: printable and bounded.

    >>> shown("a\\nb"), len(shown("x" * 1000))
    ('a?b', 64)
    """
    return "".join(letter if letter.isprintable() else "?" for letter in str(name)[:LETTERS_MAX])


class UnknownFields:
    """The undeclared names that one event type has brought so far, a bounded set, and what each may mean."""

    def __init__(self, declared: Collection[str]) -> None:
        self._declared = declared
        self._meant: dict[str, str] = {}

    def new(self, name: str) -> str:
        """Return what the log says of a name when it comes first, "" later, and beyond `NAMES_MAX` names."""
        if name in self._meant or len(self._meant) >= NAMES_MAX:
            return ""
        self._meant[name] = meant_field(name, self._declared)
        last = " Further names are not told." if len(self._meant) == NAMES_MAX else ""
        return f"{shown(name)!r} is not declared.{self._meant[name]}{last}"

    def meant(self, name: str) -> str:
        """Return which declared field a name that `new` took may mean, "" where none is near."""
        return self._meant.get(name, "")

    def label(self, name: str) -> str:
        """Return the name as a metric's label, of a bounded set."""
        return shown(name) if name in self._meant else OTHERS


def undeclared(names: Iterable[object], declared: Collection[str]) -> list[str]:
    """Return the names that are not declared, in order; without those that serving returned under another spec.

    >>> undeclared({"b": 1, "a": 2, "counter.old.click": 3}, {"a"})
    ['b']
    """
    return sorted(str(name) for name in names if name not in declared and not str(name).startswith(_SERVED))
