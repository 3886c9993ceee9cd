"""Dead letters: which of them are meant, the records that they hold, and what became of each.

A letter's state follows from the letters and the marks of retries alone:

| state | meaning |
|---|---|
| `open` | nobody offered it again, or nothing came of it |
| `retrying` | a retry works on it, or was killed; the next retry finds out what came of it |
| `retried` | offered again, and its event is in the log, or its line is no event by the corrected mapping |
| `refused` | offered again and refused again: a newer letter with `retry_of` tells why |
| `unknown` | log and lake no longer reach back far enough to tell whether its event was taken; the user decides |
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgpack
import msgspec

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.dead_letters import DeadLetter, Fate, RetryMark, decode_dead_letter, decode_retry_mark
from headrace.contract.formats.nesting import TOO_DEEP, TOO_DEEP_TEXT
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Reader, read_range

logger = logging.getLogger("headrace.dead_letters")

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
    content: DeadLetter

    @property
    def id(self) -> str:
        """Partition and offset, as `show` and `retry` take it."""
        return f"0/{self.offset}"


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant; an empty field means all of them."""

    offsets: frozenset[int] = frozenset()
    reason: str = ""
    tag: str = ""
    origin: str = ""
    since_ms: int = 0
    """Earliest time at which a gateway refused it."""

    def takes(self, letter: Letter) -> bool:
        """Say whether the letter is meant."""
        told = letter.content
        return (
            (not self.offsets or letter.offset in self.offsets)
            and self.reason in ("", told.reason)
            and self.tag in ("", told.tag)
            and self.origin in ("", told.origin)
            and told.seen_ms >= self.since_ms
        )


class States:
    """What became of every letter: `fates` by offset, and `doubtful` where a retry was killed before it said."""

    def __init__(self, marks: Iterable[RetryMark]) -> None:
        self.fates: dict[int, Fate] = {}
        self.doubtful: dict[int, RetryMark] = {}
        """By letter: the mark of the retry that named it last, where nothing says what came of it."""
        for mark in marks:
            if mark.step == "retrying":
                for offset in mark.letters:
                    self.fates.pop(offset, None)
                    self.doubtful[offset] = mark
            for offset, fate in mark.outcomes.items():
                self.doubtful.pop(offset, None)
                self.fates[offset] = fate

    def note(self, letter: Letter) -> None:
        """Note a letter: it may say what became of an older one."""
        if letter.content.retry_of >= 0:
            self.doubtful.pop(letter.content.retry_of, None)
            self.fates[letter.content.retry_of] = "refused"

    def fate(self, offset: int) -> Fate:
        """Return what became of a letter."""
        return self.fates.get(offset, "open")

    def of(self, offset: int) -> str:
        """Return the letter's state, a word of the table above."""
        if offset in self.doubtful:
            return "retrying"
        fate = self.fate(offset)
        return "retried" if fate in ("appended", "repeated", "skipped") else fate


def read_letters(reader: Reader, topic: str, end: int, *, begin: int = 0) -> Iterator[Letter]:
    """Yield the topic's letters below offset `end`, oldest first. What is no letter is logged and left out."""
    first = max(begin, reader.begin_offsets(topic)[0])
    for record in read_range(reader, topic, begins={0: first}, ends={0: end}):
        if record.value is None:
            continue
        try:
            content = decode_dead_letter(record.value)
        except msgspec.DecodeError as error:
            logger.error("record %d of %s is no dead letter and is left out: %s", record.offset, topic, error)
            continue
        yield Letter(record.offset, content)


def read_marks(writer: FencedWriter) -> list[RetryMark]:
    """Return the marks of all retries, oldest first. What is no mark is named in the log and left out.

    Raises as `FencedWriter.read`.
    """
    return [mark for _, mark in read_marks_at(writer)]


def read_marks_at(writer: FencedWriter) -> list[tuple[int, RetryMark]]:
    """Return the same with each mark's offset."""
    marks = list[tuple[int, RetryMark]]()
    for offset, value in writer.read(0, kept_only=True):
        try:
            marks.append((offset, decode_retry_mark(value)))
        except msgspec.DecodeError as error:
            logger.error("record %d of the retries is no mark and is left out: %s", offset, error)
    return marks


def superseded(letters: Sequence[Letter], marks: Iterable[RetryMark]) -> list[tuple[DeadLetter, Fate]]:
    """Return the letters that no longer stand for their events, with what came of them."""
    states = States(marks)
    for letter in letters:
        states.note(letter)
    found = [(letter.content, states.fate(letter.offset)) for letter in letters]
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
    return letter.content.event_id or f"{topic}/{letter.offset}"


def time_ns_of(letter: DeadLetter, record: Any) -> int | None:
    """Return the time that the shipper gave; None where it gave none."""
    if letter.time_ns:
        return letter.time_ns
    # An entry without a time and one of 1970 both have 0 here; only one that brings its own time needs no other.
    return 0 if isinstance(record, dict) and record.get("event_time_ms") is not None else None


def why_not_retried(letter: Letter) -> str:
    """Return why a letter can never be offered again; empty where it can."""
    told = letter.content
    if told.raw_truncated:
        return f"only the first {len(told.raw)} bytes were kept (ingest.dead_letter_bytes): it cannot be retried"
    if told.reason == TOO_DEEP:
        return f"{TOO_DEEP_TEXT}: it cannot be retried"
    if not record_of(told)[1]:
        return "its bytes are no record: it cannot be retried"
    return ""
