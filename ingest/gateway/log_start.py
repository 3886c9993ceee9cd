"""What a gateway takes from the log before it begins: its epoch, and what it promised last. It asks no clock.

The epoch is the newest one that any gateway wrote, plus one. The tail of every partition is read for it, further back
where no gateway wrote there. What lies before the tail does not matter: whoever was silent while others wrote so much
no longer holds a watermark.
"""

from __future__ import annotations

import msgspec

from headrace.contract.formats.events import FEEDBACK, IMPRESSION, PUNCTUATION, decode_punctuation
from headrace.contract.interfaces.log import Reader, Record, read_range

_TAIL_RECORDS = 1_000
"""A partition gets some 60 records a second: a second or two of reading, within the gateway's grace."""
_FURTHER = 8
_KINDS = frozenset({IMPRESSION, FEEDBACK, PUNCTUATION})


class LogStart(msgspec.Struct, frozen=True):
    """Where a gateway begins."""

    epoch: int = 1
    promised: dict[int, int] = {}
    """Partition to the last promise there under the gateway's name."""

    def after(self, record: Record, gateway: str) -> LogStart:
        """Return where `gateway` begins when this record of `events` was read too."""
        epoch, headers = _epoch_of(record), record.headers
        if not epoch:
            return self
        promised = self.promised
        if headers["gateway"] == gateway and headers["kind"] == PUNCTUATION:
            promised = promised | {record.partition: _promise_of(record, promised.get(record.partition, 0))}
        return LogStart(max(self.epoch, epoch + 1), promised)


def read_start(reader: Reader, topic: str, gateway: str) -> LogStart:
    """Return where `gateway` begins on the log of `topic`. Raises `Unavailable` where the log cannot be read now."""
    begins, ends = reader.begin_offsets(topic), reader.end_offsets(topic)
    start, tail = LogStart(), _TAIL_RECORDS
    left = {p: end for p, end in ends.items() if end > begins[p]}
    while left:
        firsts = {p: max(begins[p], end - tail) for p, end in left.items()}
        spoken = set()
        for record in read_range(reader, topic, begins=firsts, ends=left):
            if _epoch_of(record):
                spoken.add(record.partition)
                start = start.after(record, gateway)
        left = {p: firsts[p] for p in left if p not in spoken and firsts[p] > begins[p]}
        tail *= _FURTHER
    return start


def _epoch_of(record: Record) -> int:
    """Return the epoch of the gateway that wrote a record; 0 where none did."""
    text = record.headers.get("epoch", "")
    by_gateway = record.headers.get("gateway") and record.headers.get("kind") in _KINDS and record.value is not None
    return int(text) if by_gateway and text.isascii() and text.isdigit() and len(text) < 19 else 0


def _promise_of(record: Record, otherwise: int) -> int:
    try:
        promise = decode_punctuation(record.value or b"")
    except msgspec.DecodeError:
        return otherwise
    return min(promise.time_ms, record.timestamp_ms) if promise.by_record else promise.time_ms
