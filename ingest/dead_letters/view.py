"""Dead letters as an operator sees them: filtered, decoded, with what became of each and what to do. Pure.

A letter's state follows from the letters and the marks of retries alone:

| state | meaning |
|---|---|
| `open` | nobody offered it again, or nothing came of it |
| `retrying` | a retry is at it, or was killed; the next retry finds out what came of it |
| `retried` | offered again, and its event is in the log, or its line is no event by the mended mapping |
| `refused` | offered again and refused again: a newer letter with `retry_of` tells why |
| `unknown` | a retry was killed at it, and the log no longer reaches back to tell; never offered again |
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import msgspec

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.dead_letters import DeadLetter, Fate, RetryMark

ADVICE: dict[str, str] = {
    "undeclared": "No event of the project has this tag: declare one, restart the gateways, retry. Or route the tag "
    "elsewhere in the shipper.",
    "no_partition_key": "The service must log the field that the project names as `key`. The record lacks it, so a "
    "retry is refused again unless `key` changes.",
    "no_request_id": "The service must log `request_id`, which impression and feedback share. Else refused again.",
    "bad_type": "Mend the service, or declare the field with the type that it logs, restart the gateways, retry.",
    "unknown_field": "Declare the field, or set unknown='drop' for this event, restart the gateways, retry.",
    "future": "A clock runs ahead: mend it (NTP) on the host of `origin`. Once the event's time is past, retry.",
    "too_large": "One event is larger than ingest.batch_bytes: log less, or raise it (the broker's limit is 1 MB).",
    "bad_line": "The line is not of the log format that the mapping names: mend `format`, restart the gateways, retry.",
    "bad_chunk": "The shipper's chunk cannot be unpacked at all: look at its version and compression. It cannot be "
    "retried: it is no event.",
}
"""By reason, one line: what to do."""
ADVICE_ELSE = "Read `detail`, mend the service or the declaration, restart the gateways, retry."
NO_EVENT = frozenset({"bad_chunk"})
"""Reasons whose raw bytes are no record."""

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_OPTIONS: dict[str, Any] = {
    "raw": False,
    "unicode_errors": "surrogateescape",
    "strict_map_key": False,
}


class Letter(msgspec.Struct, frozen=True):
    """A dead letter at its place in the topic."""

    offset: int
    told: DeadLetter

    @property
    def id(self) -> str:
        """Partition and offset, as `show` and `retry` take it."""
        return f"0/{self.offset}"


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant; an empty field means all."""

    offsets: frozenset[int] = frozenset()
    reason: str = ""
    tag: str = ""
    origin: str = ""
    since_ms: int = 0
    """Earliest time at which a gateway refused it."""

    def takes(self, letter: Letter) -> bool:
        """Say whether the letter is meant."""
        told = letter.told
        return (
            (not self.offsets or letter.offset in self.offsets)
            and self.reason in ("", told.reason)
            and self.tag in ("", told.tag)
            and self.origin in ("", told.origin)
            and told.seen_ms >= self.since_ms
        )


class States:
    """What became of every letter: `fates` by offset, and who is named by a retry that left no word."""

    def __init__(self, marks: Iterable[RetryMark]) -> None:
        self.fates: dict[int, Fate] = {}
        self.doubtful: dict[int, RetryMark] = {}
        """By letter: the mark of the retry that named it last, where nothing tells what came of it."""
        for mark in marks:
            if mark.step == "retrying":
                for offset in mark.letters:
                    self.fates.pop(offset, None)
                    self.doubtful[offset] = mark
            for offset, fate in mark.outcomes.items():
                self.doubtful.pop(offset, None)
                self.fates[offset] = fate

    def see(self, letter: Letter) -> None:
        """Take a letter in: it may tell what became of an older one."""
        if letter.told.retry_of >= 0:
            self.doubtful.pop(letter.told.retry_of, None)
            self.fates[letter.told.retry_of] = "refused"

    def fate(self, offset: int) -> Fate:
        """Return what became of a letter."""
        return self.fates.get(offset, "open")

    def of(self, offset: int) -> str:
        """Return the letter's state, a word of the table above."""
        if offset in self.doubtful:
            return "retrying"
        fate = self.fate(offset)
        return "retried" if fate in ("appended", "repeated", "skipped") else fate


def superseded(letters: Sequence[Letter], marks: Iterable[RetryMark]) -> list[tuple[DeadLetter, Fate]]:
    """Return the letters that no longer stand for their events, with what came of them."""
    states = States(marks)
    for letter in letters:
        states.see(letter)
    found = [(letter.told, states.fate(letter.offset)) for letter in letters]
    return [(told, fate) for told, fate in found if fate not in ("open", "unknown")]


def parse_id(text: str) -> int:
    """Return the offset that an id names. Raises `ConfigRejected`.

    >>> parse_id("0/17"), parse_id("17")
    (17, 17)
    """
    found = re.fullmatch(r"(?:0/)?(\d+)", text)
    if found is None:
        raise ConfigRejected(f"{text!r} is no letter's id; `headrace dead-letters list` shows them, such as 0/17.")
    return int(found[1])


def parse_age_ms(text: str) -> int:
    """Return a length of time in milliseconds. Raises `ConfigRejected`.

    >>> parse_age_ms("90s"), parse_age_ms("2d")
    (90000, 172800000)
    """
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if found is None:
        raise ConfigRejected(f"{text!r} is no length of time; write 90s, 15m, 1h or 2d.")
    return int(found[1]) * _UNITS_MS[found[2]]


def record_of(letter: DeadLetter) -> tuple[Any, bool]:
    """Return the whole record and True, or None and False where it is cut or no record."""
    if letter.raw_truncated or letter.reason in NO_EVENT:
        return None, False
    try:
        return msgpack.unpackb(letter.raw, **_OPTIONS), True
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None, False


def id_of(letter: Letter, record: Any, topic: str = "dead-letters") -> str:
    """Return the event id under which the letter's event is in the log once it is taken.

    Its own, else the one that the gateway derived from its chunk, else one of the letter's place.
    """
    own = record.get("event_id") if isinstance(record, dict) else None
    if isinstance(own, bytes):
        own = own.decode("utf-8", "surrogateescape")
    if isinstance(own, int) and not isinstance(own, bool):
        own = str(own)
    if isinstance(own, str) and own:
        return own
    return letter.told.event_id or f"{topic}/{letter.offset}"


def time_ns_of(letter: DeadLetter, record: Any) -> int | None:
    """Return the time that the shipper gave; None where it gave none."""
    if letter.time_ns:
        return letter.time_ns
    # An entry without a time and one of 1970 both have 0 here; only one that brings its own time needs no other.
    return 0 if isinstance(record, dict) and record.get("event_time_ms") is not None else None


def why_not(letter: Letter) -> str:
    """Return why a letter can never be offered again, or ""."""
    told = letter.told
    if told.raw_truncated:
        return f"only the first {len(told.raw)} bytes were kept (ingest.dead_letter_bytes): it cannot be retried"
    if not record_of(told)[1]:
        return "its bytes are no record: it cannot be retried"
    return ""


def view(letter: Letter, state: str) -> dict[str, Any]:
    """Return the letter as one JSON object has it.

    `record` is the whole record. What JSON cannot say (bytes that are no text, not-a-number) is text in it, and then,
    as where there is no whole record, `raw` has the kept bytes of MessagePack in base64.
    """
    told = letter.told
    shown: dict[str, Any] = {
        "id": letter.id,
        "partition": 0,
        "offset": letter.offset,
        "state": state,
        "reason": told.reason,
        "detail": _text(told.detail),
        "tag": _text(told.tag),
        "origin": _text(told.origin),
        "event_id": _text(told.event_id),
        "time_ns": told.time_ns,
        "gateway": told.gateway,
        "seen_ms": told.seen_ms,
        "raw_truncated": told.raw_truncated,
        "attempts": told.attempts,
    }
    if told.retry_of >= 0:
        shown["retry_of"] = f"0/{told.retry_of}"
    record, whole = record_of(told)
    exact = False
    if whole:
        shown["record"], exact = plain(record)
    if not exact:
        shown["raw"] = base64.b64encode(told.raw).decode()
    return shown


def plain(value: Any) -> tuple[Any, bool]:
    """Return `value` as JSON can say it, and whether that is all of it."""
    if value is None or isinstance(value, bool | int):
        return value, True
    if isinstance(value, float):
        return (value, True) if math.isfinite(value) else (str(value), False)
    if isinstance(value, str):
        text = _text(value)
        return text, text == value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace"), False
    if isinstance(value, dict):
        pairs = [(key if isinstance(key, str) else str(key), key, item) for key, item in value.items()]
        shown = [(_text(name), plain(item)) for name, _, item in pairs]
        exact = all(name == key for (name, _), (_, key, _) in zip(shown, pairs, strict=True))
        return {name: item for name, (item, _) in shown}, exact and all(whole for _, (_, whole) in shown)
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return [item for item, _ in items], all(whole for _, whole in items)
    return str(value), False


def _text(text: str) -> str:
    """Return text that UTF-8 can say; bytes that it cannot are U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


COLUMNS = (("ID", 9), ("SEEN (UTC)", 19), ("STATE", 8), ("REASON", 16), ("TAG", 18), ("ORIGIN", 15), ("WHAT", 29))
"""Titles and widths: 114 characters and 6 spaces make 120."""


def row(letter: Letter, state: str, seen: str) -> str:
    """Return the letter's line of the table; `seen` is its time as text."""
    told = letter.told
    cells = (letter.id, seen, state, told.reason, told.tag, told.origin, told.detail)
    return " ".join(_cell(text, width) for text, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()


def title() -> str:
    """Return the table's first line."""
    return " ".join(_cell(name, width) for name, width in COLUMNS).rstrip()


def _cell(text: str, width: int) -> str:
    # A tag or detail may hold anything that a stranger sent: control characters must not reach a terminal.
    shown = "".join(c if c.isprintable() else "?" for c in _text(text))
    return (shown if len(shown) <= width else shown[: width - 1] + "…").ljust(width)


def summary(counts: Mapping[tuple[str, str], int]) -> list[str]:
    """Return counts by reason and state, for the end of the table."""
    reasons = Counter[str]()
    for (reason, _), count in counts.items():
        reasons[reason] += count
    lines = [f"{sum(reasons.values()):,} letters"]
    for reason, total in reasons.most_common():
        states = ", ".join(f"{count:,} {state}" for (r, state), count in sorted(counts.items()) if r == reason)
        lines.append(f"  {total:>9,}  {_cell(reason, 18)} {states}")
    return lines
