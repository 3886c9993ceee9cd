"""Which `too_late` letters wait to be looked up, read on from where the last look ended."""

from __future__ import annotations

import logging

import msgspec

from headrace.contract.formats.dead_letters import TOO_LATE, RetryMark, decode_retry_mark
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Reader
from headrace.contract.metrics import Metrics
from headrace.ingest.dead_letters.letters import read_letters

log = logging.getLogger("headrace.dead_letters")


class LateBacklog:
    """100 bytes a letter that waits, nothing of the others. For one thread."""

    def __init__(self, topic: str, metrics: Metrics) -> None:
        self._topic, self._metrics = topic, metrics
        self._next_letter = self._next_mark = 0
        self._settled_ahead: set[int] = set()
        """Letters beyond `_next_letter` of which a mark says what came of them."""
        self.waiting: dict[int, int] = {}
        """Offset to the time at which the event came, in milliseconds."""
        self.unknown: set[int] = set()
        """Letters that wait for the user's decision."""
        self.newest: RetryMark | None = None

    def read(self, reader: Reader, writer: FencedWriter) -> None:
        """Read what was added since the last time. What is no mark is counted and left out. Raises `Unavailable`."""
        end = reader.end_offsets(self._topic)[0]
        if end > self._next_letter:
            for letter in read_letters(reader, self._topic, end, begin=self._next_letter):
                self._settle(letter.content.retry_of, known=True)
                if letter.offset in self._settled_ahead:
                    self._settled_ahead.discard(letter.offset)
                elif letter.content.reason == TOO_LATE:
                    self.waiting[letter.offset] = letter.content.seen_ms
                self._next_letter = letter.offset + 1
            self._next_letter = max(self._next_letter, end)
        for offset, value in writer.read(self._next_mark):
            self._next_mark = offset + 1
            try:
                mark = self.newest = decode_retry_mark(value)
            except msgspec.DecodeError as error:
                self._metrics.add("records_unreadable_total", topic="retries", kind="foreign")
                log.error("record %d of the retries is no mark and is left out: %s", offset, error)
                continue
            for letter_offset, fate in mark.outcomes.items():
                if fate == "unknown":
                    if self.waiting.pop(letter_offset, None) is not None:
                        self.unknown.add(letter_offset)
                elif fate != "open":
                    self._settle(letter_offset, known=letter_offset < self._next_letter)

    def _settle(self, offset: int, *, known: bool) -> None:
        self.waiting.pop(offset, None)
        self.unknown.discard(offset)
        if not known:
            self._settled_ahead.add(offset)

    def oldest_ms(self) -> int | None:
        """Return since when the oldest letter waits; None where none does."""
        return min(self.waiting.values(), default=None)
