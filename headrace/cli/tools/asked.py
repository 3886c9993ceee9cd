"""What verbs ask people for on the command line: a time, a yes."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from headrace.contract.errors import ConfigRejected


def parse_time_ms(text: str) -> int:
    """Return a time with its zone as milliseconds since 1970.

    Raises `ConfigRejected` for anything else.

    >>> parse_time_ms("2026-11-25T01:00Z"), parse_time_ms("2026-11-25T02:00+01:00")
    (1795568400000, 1795568400000)
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigRejected(f"{text!r} is no time; write it so: 2026-11-25T01:00Z.") from None
    if found.tzinfo is None:
        raise ConfigRejected(f"{text!r} does not say its zone; write {text}Z for UTC, or {text}+01:00.")
    return round(found.timestamp() * 1_000)


def shown_time(time_ms: int) -> str:
    """Return a time for people, in UTC; "-" where none is known.

    >>> shown_time(1795568400000), shown_time(0)
    ('2026-11-25T01:00:00Z', '-')
    """
    return datetime.fromtimestamp(time_ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if time_ms else "-"


def agreed(question: str = "go on?") -> bool:
    """Ask on the terminal; False where there is none."""
    if not sys.stdin.isatty():
        print("no terminal to ask; --yes goes on without a question")
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
