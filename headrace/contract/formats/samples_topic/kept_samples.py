"""What a partition of `samples` still holds: an offset alone does not tell.

A broker whose disk failed, or that lost its unwritten pages in a power cut, may come back without the end of a topic
that it had confirmed. What is written then gets the same offsets anew. So whoever goes on from an offset looks first:

1. **Writer**: a state that has sent samples up to a position goes on only where the record that it sent last still lies
   at its offset (`Sent`). Else it would write behind a hole that no reader passes.
2. **Reader**: an offset to read on from holds where the samples behind the reader's position come at or after it. Else
   the topic is read from its first record; repeats are dropped by position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import parse_position
from headrace.contract.interfaces.log import Reader, Record, read_range

logger = logging.getLogger("headrace.samples")

SENDER = "sender"
"""The header of a record of samples that names the worker which sent it, differently at each of its beginnings."""
TAIL_RECORDS = 1_000
FURTHER = 8
LOOKED_RECORDS = 64_000
"""How far back a reader looks for the record that it went by; reading all again is always right, too."""


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """The last record of samples that a state has sent."""

    offset: int
    sender: str


def _nothing() -> None:
    return None


def is_kept(reader: Reader, topic: str, partition: int, sent: Sent, last: Position) -> bool:
    """Say whether the record that a state has sent last, whose samples end at `last`, lies where it was confirmed, or
    was deleted by retention. For one thread; the reader's assignment is replaced. Raises `Unavailable`."""
    if sent.offset < reader.begin_offsets(topic)[partition]:
        return True
    found = _one(reader, topic, partition, sent.offset)
    if found is None or found.headers.get(SENDER) != sent.sender:
        return False
    positions = _positions(found)
    return positions is not None and positions.last == last


def read_on_at(
    reader: Reader,
    topic: str,
    partition: int,
    position: Position,
    following: int,
    *,
    moved: Callable[[], None] = _nothing,
) -> int:
    """Return the record of a partition of `samples` to read first: `following`, unless the topic lost its end since.

    For one thread; the reader's assignment is replaced. Raises `Unavailable`.

    Args:
        position: that of the last sample which was taken.
        following: the record that was next then.
        moved: called for each record that is looked at: a long look is told from one that hangs.
    """
    begin, end = reader.begin_offsets(topic)[partition], reader.end_offsets(topic)[partition]
    if following <= begin or position == START:
        # What retention deleted is the caller's to judge.
        return following
    if following <= end:
        ahead = _all(reader, topic, partition, following, end, moved)
        if any(each.holds(position) for each in ahead) or _went_by(
            reader, topic, partition, position, following, moved
        ):
            return following
    logger.warning(
        "%s/%d: the samples behind %s do not go on at offset %d, the topic ends at %d: it has lost its end. Reading "
        "from offset %d; what was taken is left out by its position.",
        *(topic, partition, tuple(position), following, end, begin),
    )
    return begin


class _Positions(NamedTuple):
    after: Position
    last: Position

    def holds(self, position: Position) -> bool:
        """Say whether the record goes on from `position`."""
        return self.after <= position < self.last


def _went_by(
    reader: Reader, topic: str, partition: int, position: Position, following: int, moved: Callable[[], None]
) -> bool:
    """Say whether a record before `following` ends at `position`, and none that is looked at goes on from it."""
    begin, stop, tail = reader.begin_offsets(topic)[partition], following, TAIL_RECORDS
    while stop > begin and following - stop < LOOKED_RECORDS:
        start = max(begin, stop - tail)
        found = list(_all(reader, topic, partition, start, stop, moved))
        if any(each.holds(position) for each in found):
            return False
        if any(each.last == position for each in found):
            return True
        stop, tail = start, tail * FURTHER
    return False


def _all(
    reader: Reader, topic: str, partition: int, begin: int, end: int, moved: Callable[[], None]
) -> Iterator[_Positions]:
    for record in read_range(reader, topic, begins={partition: begin}, ends={partition: end}):
        moved()
        if (found := _positions(record)) is not None:
            yield found


def _one(reader: Reader, topic: str, partition: int, offset: int) -> Record | None:
    if offset >= reader.end_offsets(topic)[partition]:
        return None
    return next(iter(read_range(reader, topic, begins={partition: offset}, ends={partition: offset + 1})), None)


def _positions(record: Record) -> _Positions | None:
    """Return a record's positions; None where it is not ours."""
    try:
        return _Positions(parse_position(record.headers["after"]), parse_position(record.headers["last"]))
    except (KeyError, ValueError):
        return None
