"""Which `too_late` letters wait to be looked up, read on from where the last look ended."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from headrace.contract.formats.dead_letters import TOO_LATE, Fate, RetryMark, decode_retry_mark
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Reader
from headrace.contract.metrics import Metrics
from headrace.ingest.dead_letters.letters import read_letters

log = logging.getLogger("headrace.dead_letters")

_PAUSE_LETTERS = 500


class LateBacklog:
    """100 bytes a letter that waits or is unknown, nothing of the others. For one thread."""

    def __init__(self, topic: str, metrics: Metrics) -> None:
        self._topic, self._metrics = topic, metrics
        self._next_mark = 0
        self.next_letter = 0
        """Offset of the first letter that was not read yet."""
        self._settled_ahead: set[int] = set()
        """Letters beyond `next_letter` of which a mark says what came of them."""
        self.waiting: dict[int, int] = {}
        """Offset to the time at which the event came, in milliseconds."""
        self.unknown: dict[int, int] = {}
        """The same of letters that wait for the user's decision."""
        self.newest: tuple[int, RetryMark] | None = None
        """The newest mark of a retry, with its offset."""

    def read(self, reader: Reader, writer: FencedWriter, pause: Callable[[], None] = lambda: None) -> None:
        """Read what was added since the last time, and forget what retention has taken. What is no mark is counted and
        left out. `pause` is called every few hundred letters; what it raises ends the reading, which goes on from there
        the next time. Raises `Unavailable`."""
        end = reader.end_offsets(self._topic)[0]
        if end > self.next_letter:
            for number, letter in enumerate(read_letters(reader, self._topic, end, begin=self.next_letter)):
                if number % _PAUSE_LETTERS == 0:
                    pause()
                self._settle(letter.content.retry_of, known=True)
                if letter.offset in self._settled_ahead:
                    self._settled_ahead.discard(letter.offset)
                elif letter.content.reason == TOO_LATE:
                    self.waiting[letter.offset] = letter.content.seen_ms
                self.next_letter = letter.offset + 1
            self.next_letter = max(self.next_letter, end)
        # Marks outlast letters: what retention has taken of them tells of letters that are gone.
        for offset, value in writer.read(self._next_mark, kept_only=True):
            self._next_mark = offset + 1
            try:
                mark = decode_retry_mark(value)
            except msgspec.DecodeError as error:
                self._metrics.add("records_unreadable_total", topic="retries", kind="foreign")
                log.error("record %d of the retries is no mark and is left out: %s", offset, error)
                continue
            self.newest = offset, mark
            for letter_offset, fate in mark.outcomes.items():
                self._take(letter_offset, fate)
        self._forget_deleted(reader.begin_offsets(self._topic)[0])

    def _take(self, offset: int, fate: Fate) -> None:
        """Note what a mark says of a letter."""
        if fate == "unknown":
            if (seen_ms := self.waiting.pop(offset, None)) is not None:
                self.unknown[offset] = seen_ms
        elif fate != "open":
            self._settle(offset, known=offset < self.next_letter)
        elif (seen_ms := self.unknown.pop(offset, None)) is not None:
            # The user decided, and the retry was killed before it did anything: it is looked up again.
            self.waiting[offset] = seen_ms

    def _settle(self, offset: int, *, known: bool) -> None:
        self.waiting.pop(offset, None)
        self.unknown.pop(offset, None)
        if not known:
            self._settled_ahead.add(offset)

    def _forget_deleted(self, begin: int) -> None:
        """Forget letters below `begin`, the first that is kept: nobody can settle them any more."""
        gone = [offset for held in (self.waiting, self.unknown) for offset in held if offset < begin]
        if gone:
            log.error(
                "retention has deleted %d late events from %s that nobody had settled: they are lost, unless they had "
                "been taken before. Decide sooner (`headrace dead-letters retry --take`, or --drop), or raise the "
                "topic's retention.ms.",
                len(gone),
                self._topic,
            )
        for offset in gone:
            self._settle(offset, known=True)
        self._settled_ahead = {offset for offset in self._settled_ahead if offset >= begin}

    def oldest_ms(self) -> int | None:
        """Return since when the oldest letter waits; None where none does."""
        return min(self.waiting.values(), default=None)
