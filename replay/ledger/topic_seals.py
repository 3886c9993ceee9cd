"""The seals in the topic `samples`, at any position: found by halving, a few records a partition are read.

A record's header tells the seal up to its last sample. For a position within a record, the samples of the record behind
it are taken out of it again, by id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from headrace.contract.formats.events import decode_batch
from headrace.contract.formats.positions import START, Position, order_of, orders
from headrace.contract.formats.sample import parse_position
from headrace.contract.formats.samples_topic.sample_record import Unreadable, read_samples
from headrace.contract.formats.seals import HEADER, RecordSeal, Seal, decode_seal, without_rows
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.kernels.sample_ids import seal_of

BACK = (1, 16, 256)
"""How many offsets before the topic's end are looked at for its last record with samples: few have none."""
AT_ONCE = 64
"""Records that one fetch brings, about: so many are read one after another, and no more halves of them."""


class NotSealed(Exception):
    """The seals do not tell; what is asked for is to be read by id. The message says why."""


class Place(NamedTuple):
    """One record of samples."""

    after: Position
    last: Position
    seal: RecordSeal
    record: Record


class TopicSeals:
    """The seals of the topic; what was asked once is known. Raises as `read_range`."""

    def __init__(self, reader: Reader, topic: str) -> None:
        self._reader, self._topic = reader, topic
        self._begins, self._ends = reader.begin_offsets(topic), reader.end_offsets(topic)
        self._known: dict[tuple[int, Position], dict[str, Seal]] = {}
        self._newest: dict[int, Place | None] = {}
        self._seen: dict[int, dict[int, Position]] = {}
        """By partition and offset, the last samples of records that were looked at: what is asked for is near them."""

    def at(self, partition: int, position: Position) -> Mapping[str, Seal]:
        """Return the seals, by task, of all samples up to `position`.

        Raises `NotSealed` where the topic holds no record with the position, or one without a seal of the whole.
        """
        if position == START:
            return {}
        if (partition, position) not in self._known:
            self._known[partition, position] = self._look_up(partition, position)
        return self._known[partition, position]

    def newest(self, partition: int) -> Place | None:
        """Return the record with the partition's last samples; None where there are none."""
        if partition not in self._newest:
            self._newest[partition] = self._look_for_newest(partition)
        return self._newest[partition]

    def following(self, partition: int, position: Position) -> Place | None:
        """Return the record with the first sample beyond `position`; None where there is none."""
        newest = self.newest(partition)
        if newest is None or newest.last <= position:
            return None
        return self._halve(partition, Position(position.offset, position.rank + 1))

    def rows(self, partition: int, after: Position, upto: Position, schema: pa.Schema) -> pa.Table:
        """Return the samples beyond `after` up to `upto`, each once, in order. What the topic lacks is not in them."""
        first = self.following(partition, after)
        found, at = [], after
        if first is not None and after < upto:
            for record in self._records(partition, first.record.offset, self._ends[partition]):
                samples = read_samples(record, schema)
                if isinstance(samples, Unreadable) or samples.last <= at:
                    continue
                if samples.after >= upto:
                    break
                order_N = orders(samples.rows["offset"].to_numpy(), samples.rows["rank"].to_numpy())
                ours_N = (order_N > order_of(at)) & (order_N <= order_of(upto))
                found.append(samples.rows.filter(pa.array(ours_N)))
                at = samples.last
        return pa.Table.from_batches(found, schema)

    def _look_up(self, partition: int, position: Position) -> dict[str, Seal]:
        newest = self.newest(partition)
        place = newest if newest is not None and newest.last == position else self._halve(partition, position)
        where = f"{self._topic}/{partition}: the sample at {tuple(position)}"
        if place is None or not place.after <= position <= place.last:
            raise NotSealed(f"{where} is in no record that the topic holds")
        if Position(*place.seal.since) != START:
            raise NotSealed(f"{where} has a seal that begins after {place.seal.since}")
        if position == place.last:
            return dict(place.seal.tasks)
        rows = decode_batch(place.record.value or b"")
        beyond_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy()) > order_of(position)
        return without_rows(place.seal.tasks, seal_of(rows.filter(pa.array(beyond_N))))

    def _halve(self, partition: int, position: Position) -> Place | None:
        """Return a record whose last sample is at or beyond `position` while the one before it is not."""
        place = self._search(partition, position, self._seen.get(partition, {}))
        if place is not None and place.after <= position <= place.last:
            return place
        # Among those that were looked at was one out of turn, of a worker that had been declared dead.
        return self._search(partition, position, {})

    def _search(self, partition: int, position: Position, seen: Mapping[int, Position]) -> Place | None:
        low, high, found = self._begins[partition], self._ends[partition], None
        for offset, last in seen.items():
            low, high = (max(low, offset + 1), high) if last < position else (low, min(high, offset + 1))
        while low < high:
            middle = (low + high) // 2 if high - low > AT_ONCE else low
            # A few at once: one of a worker that had been declared dead says less than those around it.
            window = list(islice(self._places(partition, middle, high), AT_ONCE))
            place = next((each for each in window if each.last >= position), None)
            if place is not None and place.after <= position:
                return place
            if place is not None:
                found, high = place, middle
            elif not window:
                high = middle
            else:
                low = window[-1].record.offset + 1
        return found

    def _look_for_newest(self, partition: int) -> Place | None:
        begin, end = self._begins[partition], self._ends[partition]
        for back in (*BACK, end - begin):
            start = max(begin, end - back)
            places = list(self._places(partition, start, end))
            if places:
                return max(places, key=lambda place: place.last)
            if start == begin:
                break
        return None

    def _places(self, partition: int, start: int, stop: int) -> Iterator[Place]:
        for record in self._records(partition, start, stop):
            if (place := place_of(record)) is not None:
                self._seen.setdefault(partition, {})[record.offset] = place.last
                yield place

    def _records(self, partition: int, start: int, stop: int) -> Iterator[Record]:
        if start >= stop:
            return iter(())
        return read_range(self._reader, self._topic, begins={partition: start}, ends={partition: stop})


def place_of(record: Record) -> Place | None:
    """Return what the record's headers say; None for one that is not ours.

    Raises `NotSealed` for one of a release without seals.
    """
    try:
        after, last = parse_position(record.headers["after"]), parse_position(record.headers["last"])
    except (KeyError, ValueError):
        return None
    if record.value is None:
        return None
    seal = decode_seal(record.headers.get(HEADER))
    if seal is None:
        raise NotSealed(f"{record.topic}/{record.partition} offset {record.offset} was written without a seal")
    return Place(after, last, seal, record)
