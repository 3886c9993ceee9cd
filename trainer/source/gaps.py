"""Which samples behind a cursor the topic does not have, and where it goes on: what no reader may pass in silence.

A reader takes a partition's records one behind another, each from where the one before it ended. Where something is
missing between two of them, whatever the order of records, it waits or stops; here that is said of the whole topic,
with the record to read on from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from headrace.contract.formats.positions import START, Cursor, Position, Positions
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.samples_topic.sample_record import Unreadable, read_samples
from headrace.contract.formats.steps import PassedOver
from headrace.contract.interfaces.log import Reader, Record, read_range

LOST, SKIPPED = "lost", "skipped"
BACK = (16, 1_024)
"""How many records before an end are looked at for the last one with samples, before all are."""


class _Spans:
    """Samples that were seen of one partition: (after, last, first record), merged where one goes on from another."""

    def __init__(self) -> None:
        self.spans: list[tuple[Position, Position, int]] = []

    def add(self, after: Position, last: Position, offset: int) -> None:
        if self.spans and self.spans[-1][0] <= after <= self.spans[-1][1]:
            before, end, first = self.spans[-1]
            self.spans[-1] = before, max(end, last), first
        else:
            self.spans.append((after, last, offset))

    def holes(self, position: Position) -> Iterator[tuple[Position, Position]]:
        """Yield what is missing between `position` and the last sample: after which position, and up to which."""
        for after, last, _ in sorted(self.spans):
            if after > position:
                yield position, after
            position = max(position, last)

    def following(self, position: Position) -> int:
        """Return the first record with samples beyond a position."""
        return min(offset for _, last, offset in self.spans if last > position)


def gaps(
    reader: Reader, topic: str, cursor: Cursor, *, moved: Callable[[int], None] = lambda _: None
) -> list[PassedOver]:
    """Return what is missing behind `cursor`, though later samples are there. Reads all that the topic has behind it.

    Args:
        moved: is told how many records were read.

    Raises as `read_range`.
    """
    positions, starts = Positions.from_json(0, cursor.positions), _starts(reader, topic, cursor)
    found = {p: _Spans() for p in starts}
    for count, record in enumerate(read_range(reader, topic, begins=starts)):
        moved(count)
        samples = read_samples(record)
        if not isinstance(samples, Unreadable) and samples.last > positions.at(record.partition):
            found[record.partition].add(samples.after, samples.last, record.offset)
    begins, lost = reader.begin_offsets(topic), list[PassedOver]()
    for p, spans in sorted(found.items()):
        position = positions.at(p)
        if (
            spans.spans
            and position == START
            and begins[p] > 0
            and cursor.next_offsets.get(str(p), begins[p]) >= begins[p]
        ):
            # A run that begins with this partition goes on behind what retention had deleted by then.
            position = min(after for after, _, _ in spans.spans)
        lost += [_left_out(p, after, upto, spans.following(upto), LOST) for after, upto in spans.holes(position)]
    return lost


def cut_off(reader: Reader, topic: str, cursor: Cursor) -> list[PassedOver]:
    """Return what retention has deleted behind `cursor`: of each partition the first record with samples tells."""
    positions, begins = Positions.from_json(0, cursor.positions), reader.begin_offsets(topic)
    found: list[PassedOver] = []
    for p, end in sorted(reader.end_offsets(topic).items()):
        if cursor.next_offsets.get(str(p), begins[p]) >= begins[p]:
            continue
        first = next(_told(reader, topic, p, begins[p], end), None)
        if first is not None and first[1] > positions.at(p):
            found.append(_left_out(p, positions.at(p), first[1], first[0], LOST))
    return found


def until(reader: Reader, topic: str, cursor: Cursor, at_ms: int | None) -> list[PassedOver]:
    """Return all that lies behind `cursor` and was written to the topic up to a time, by the broker's records; up to
    its end where none is given."""
    positions, starts = Positions.from_json(0, cursor.positions), _starts(reader, topic, cursor)
    found: list[PassedOver] = []
    for p, end in sorted(reader.end_offsets(topic).items()):
        last = _last_at_end(reader, topic, p, starts[p], end) if at_ms is None else None
        for offset, _, upto in _told(reader, topic, p, starts[p], end, at_ms) if at_ms is not None else ():
            if last is None or upto > last[1]:
                last = offset, upto
        if last is not None and last[1] > positions.at(p):
            found.append(_left_out(p, positions.at(p), last[1], last[0] + 1, SKIPPED))
    return found


def _left_out(partition: int, after: Position, upto: Position, following: int, why: str) -> PassedOver:
    places = {"after": (after.offset, after.rank), "upto": (upto.offset, upto.rank)}
    return PassedOver(partition=partition, following=following, why=why, **places)


def _starts(reader: Reader, topic: str, cursor: Cursor) -> dict[int, int]:
    begins = reader.begin_offsets(topic)
    return {p: max(begin, cursor.next_offsets.get(str(p), begin)) for p, begin in begins.items()}


def _last_at_end(reader: Reader, topic: str, partition: int, start: int, end: int) -> tuple[int, Position] | None:
    """Return the record with the partition's last samples, and their position."""
    for back in (*BACK, end):
        begin = max(start, end - back)
        told = list(_told(reader, topic, partition, begin, end))
        if told:
            offset, _, last = max(told, key=lambda each: each[2])
            return offset, last
        if begin == start:
            break
    return None


def _told(
    reader: Reader, topic: str, partition: int, begin: int, end: int, latest_ms: int | None = None
) -> Iterator[tuple[int, Position, Position]]:
    """Yield offset, `after` and `last` of the records of ours, as their headers say."""
    if begin >= end:
        return
    for record in read_range(reader, topic, begins={partition: begin}, ends={partition: end}, latest_ms=latest_ms):
        if (found := _positions(record)) is not None:
            yield record.offset, *found


def _positions(record: Record) -> tuple[Position, Position] | None:
    try:
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
    except (KeyError, ValueError):
        return None
    return (after, last) if last > START else None
