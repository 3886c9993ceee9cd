"""Every error that Headrace raises on purpose, sorted by what the caller does next.

HeadraceError
├── EventRejected     dead-letter the event, go on with the next one
├── BadRequest        answer the client with it, go on with the next request
├── ConfigRejected    refuse to start, tell the user which line to change
├── Overloaded        slow down and offer the same thing again
├── Unavailable       back off, retry, stop after a while: something outside is away
└── InvariantBroken   stop at once and keep the evidence: going on would corrupt data
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Sequence


class HeadraceError(Exception):
    """Base of all errors below; a message holds values with units, the limit and the next step."""


class EventRejected(HeadraceError):
    """One event cannot be taken; `reason` is the dead letter's stable code, such as `no_partition_key`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BadRequest(HeadraceError):
    """Nothing of a request was taken: HTTP's `status` answers it, `error` says why, `step` what to do next.

    `reason` is a stable code for metrics; `retry_ms` after how long it may come again, 0 where that does not help.
    """

    def __init__(self, status: int, error: str, step: str, *, reason: str = "", retry_ms: int = 0) -> None:
        super().__init__(f"{error}; {step}")
        self.status, self.error, self.step = status, error, step
        self.reason, self.retry_ms = reason, retry_ms


class ConfigRejected(HeadraceError):
    """The configuration or the user's project is wrong; nothing was started."""

    def __init__(self, message: str, *, at: str = "", others: Sequence[ConfigRejected] = ()) -> None:
        super().__init__(message)
        self.at = at
        """Path of the declaration in the `Project`, such as `tasks[0].window_ms`; "" where it is not known."""
        self.others = tuple(others)
        """What else was found wrong at the same time."""


class Overloaded(HeadraceError):
    """A bound is reached; the caller slows down and offers again, nothing was taken."""


class Unavailable(HeadraceError):
    """Kafka, HDFS or another outside part does not answer; retry with back-off."""


class InvariantBroken(HeadraceError):
    """Data contradicts a guarantee; stop and keep the evidence."""


def listed(names: Iterable[object]) -> str:
    """Return names as a message lists them.

    >>> listed(["b", "a"]), listed([])
    ("'a', 'b'", 'none')
    """
    return ", ".join(sorted(map(repr, names))) or "none"


def meant(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Return a question that names the known word nearest to a misspelt one, "" where none is near.

    Args:
        alike: least share of letters in common; higher where the words have a part in common anyhow.

    >>> meant("windw_ms", ["window_ms", "name"]), meant("x", ["window_ms"])
    (" Did you mean 'window_ms'?", '')
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f" Did you mean {near[0]!r}?" if near else ""


_DISK = {
    errno.ENOSPC: "free the disk",
    errno.EDQUOT: "free the disk, or raise its quota",
    errno.EROFS: "the disk is mounted read-only: see its kernel log, then mount it for writing",
    errno.EIO: "the disk fails: see its kernel log, and have another one",
    errno.EACCES: "allow this user to write there",
    errno.EPERM: "allow this user to write there",
    errno.ENOENT: "make the folder anew",
}


def disk_remedy(error: Exception) -> str:
    """Return what to do about a file that could not be written, of an `OSError` or a library's text of one.

    >>> disk_remedy(OSError(errno.ENOSPC, "No space left on device")), disk_remedy(Exception("Generic (os error 30)"))
    ('free the disk', 'the disk is mounted read-only: see its kernel log, then mount it for writing')
    """
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else 0
    return _DISK.get(number or 0, "see the disk")


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a tuple or list",
    "object": "a declaration such as Task(...) or Categorical(...), or a table,",
    "null": "None",
}


def wanted(said: str) -> str:
    """Return in plain words which value a decoder expects, from its message.

    >>> wanted("Expected `int` >= 1"), wanted("Expected `array`, got `str`")
    ('a whole number >= 1 is wanted', 'a tuple or list is wanted')
    >>> wanted("day is out of range")
    'day is out of range'
    """
    if not said.startswith("Expected "):
        return said
    first = said.removeprefix("Expected ").partition(", got")[0]
    return re.sub(r"`(\w+)`", lambda found: _TYPES.get(found[1], found[1]), first) + " is wanted"
