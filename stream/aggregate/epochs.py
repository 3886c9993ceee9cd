"""Which epoch an aggregator writes under: one more than any that the log has, and no clock is asked.

Of two that overlap the later one to begin has the higher epoch, whatever their hosts' clocks say, and whoever reads
aggregates ignores lower ones from then on. The protocol:

1. *Look.* The newest epoch is the state's, or one beyond its offsets: the tail of each partition is read, further back
   where no aggregate lies there.
2. *Claim.* A record of the next epoch, without rows, is appended to partition 0. Nothing is written before its receipt.
3. *Look again.* If another of this epoch, or of a higher one, came into partition 0 since the first look and before the
   claim, the epoch is somebody else's: claim a higher one. Of two equal claims the first in the log stands.
4. *Confirm.* A higher epoch behind one's own says that somebody took over: stop, and store nothing more. It is looked
   for in all that is read, and before a state is stored: all that the state told was told before anybody took over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pyarrow as pa

from headrace.contract.errors import EventRejected, Unavailable
from headrace.contract.formats.events import AGGREGATE, AGGREGATE_SCHEMA, EPOCH_MAX, decode_batch, encode_batch
from headrace.contract.interfaces.log import Producer, Reader, Record, read_range
from headrace.process.moved import moved
from headrace.process.waits import RECEIPT_MAX_S, Waits

_TAIL_RECORDS = 1_000
_FURTHER = 8
_POLL_S = 0.005


def epoch_of(record: Record) -> int:
    """Return the highest epoch in a record of `events`; 0 where it is no aggregate, or none that can be read."""
    if record.headers.get("kind") != AGGREGATE or record.value is None:
        return 0
    told = record.headers.get("epoch", "")
    if told.isascii() and told.isdigit() and len(told) < 19:
        return int(told)
    try:
        epochs = decode_batch(record.value, AGGREGATE_SCHEMA).column("epoch").to_pylist()
    except EventRejected:
        return 0
    return max((epoch for epoch in epochs if epoch is not None and 0 < epoch < EPOCH_MAX), default=0)


def headers_of(epoch: int) -> dict[str, str]:
    """Return the headers of a record of aggregates."""
    return {"kind": AGGREGATE, "epoch": str(epoch)}


class Epochs:
    """Claims an epoch in the `events` topic. For one event loop."""

    def __init__(self, producer: Producer, open_reader: Callable[[], Reader], topic: str, waits: Waits) -> None:
        self._producer, self._open_reader, self._topic, self._waits = producer, open_reader, topic, waits
        self.epoch = 0
        """What was claimed."""
        self._following = 0
        """In partition 0, the first offset where somebody else's later claim may lie."""

    async def claim(self, seen: int, offsets: Sequence[int]) -> None:
        """Claim an epoch above `seen` and above all beyond these offsets, one a partition. Raises as `read_range`."""
        look = partial(_newest, self._open_reader, self._topic, offsets)
        found, looked = await self._waits.call("look for the newest epoch in the log", look)
        while True:
            epoch = max(seen, found) + 1
            mine = await self._append(epoch)
            again = partial(_newest_between, self._open_reader, self._topic, looked, mine)
            found = await self._waits.call("look for another claim of the epoch", again)
            if found < epoch:
                self.epoch, self._following = epoch, mine + 1
                return
            looked = mine + 1

    async def confirm(self) -> None:
        """Return where nobody has claimed a higher epoch so far. Raises as `check`."""
        look = partial(_newest_beyond, self._open_reader, self._topic, self._following)
        found, self._following = await self._waits.call("look whether another aggregator took over", look)
        self.check(found)

    def check(self, found: int) -> None:
        """Raise `Unavailable` where an epoch that was found in the log is above the own one."""
        if found > self.epoch:
            raise Unavailable(
                f"another aggregator took over: it writes under epoch {found}, this one under {self.epoch}, which is "
                "ignored from now on. This one stops; a new process waits until the group gives it the partitions. If "
                "it repeats, two are at work that share no consumer group."
            )

    async def _append(self, epoch: int) -> int:
        """Append a claim and return its offset in partition 0."""
        receipts: list[tuple[Exception | None, int]] = []
        self._producer.send(
            self._topic,
            0,
            encode_batch(pa.RecordBatch.from_pylist([], schema=AGGREGATE_SCHEMA)),
            headers=headers_of(epoch),
            delivered=lambda error, offset: receipts.append((error, offset)),
        )
        with self._waits.named("receipt of the claim of an epoch", RECEIPT_MAX_S):
            while not receipts:
                self._producer.poll(0.0)
                await asyncio.sleep(_POLL_S)
        error, offset = receipts[0]
        if error is not None:
            raise error
        return offset


def _newest(open_reader: Callable[[], Reader], topic: str, offsets: Sequence[int]) -> tuple[int, int]:
    """Return the newest epoch beyond these offsets, 0 where there is none, and how far partition 0 was read."""
    reader = open_reader()
    try:
        first, ends = reader.begin_offsets(topic), reader.end_offsets(topic)
        begins = {p: max(begin, offsets[p] + 1) for p, begin in first.items()}
        found, tail = 0, _TAIL_RECORDS
        left = {p: end for p, end in ends.items() if end > begins[p]}
        while left:
            firsts = {p: max(begins[p], end - tail) for p, end in left.items()}
            epochs = _epochs(reader, topic, firsts, left)
            found = max(found, *epochs.values(), 0)
            left = {p: firsts[p] for p in left if p not in epochs and firsts[p] > begins[p]}
            tail *= _FURTHER
    finally:
        reader.close()
    return found, ends[0]


def _newest_between(open_reader: Callable[[], Reader], topic: str, begin: int, end: int) -> int:
    reader = open_reader()
    try:
        return _epochs(reader, topic, {0: begin}, {0: end}).get(0, 0)
    finally:
        reader.close()


def _newest_beyond(open_reader: Callable[[], Reader], topic: str, begin: int) -> tuple[int, int]:
    reader = open_reader()
    try:
        end = reader.end_offsets(topic)[0]
        return _epochs(reader, topic, {0: begin}, {0: end}).get(0, 0), end
    finally:
        reader.close()


def _epochs(reader: Reader, topic: str, begins: Mapping[int, int], ends: Mapping[int, int]) -> dict[int, int]:
    """Return the newest epoch of each partition that has one in this range."""
    found: dict[int, int] = {}
    for record in read_range(reader, topic, begins=begins, ends=ends):
        moved()  # Hours of a log may be read; `read_range` and `Waits` bound how long nothing may come.
        if epoch := epoch_of(record):
            found[record.partition] = max(epoch, found.get(record.partition, 0))
    return found
