"""Looks, while a stage begins, whether the log still holds what a stored state was made of and what it led to.

A broker that comes back without the end of a topic gives the same offsets again, to other records. So a state names,
beside its offset, the record that lies there (`mark_of`):

1. *made of*: where another record lies at the offset, or none, nothing can go on from the state, and from no older one
   either: what was made of the lost records has been read. A person decides.
2. *led to*: where records are gone that were sent before the state was stored, an older state that the topic still
   holds sends them again (`headrace.contract.formats.samples_topic.kept_samples`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from headrace.contract.errors import InvariantBroken
from headrace.contract.formats.positions import Position
from headrace.contract.formats.samples_topic.kept_samples import Sent, is_kept
from headrace.contract.interfaces.log import Reader, Record, read_range
from headrace.process.waits import Waits
from headrace.stream.shell.dependencies import StageDependencies
from headrace.stream.shell.durable_state import AheadOfLog

log = logging.getLogger("headrace.state")

Mark = tuple[int, int, int]
"""A record's offset, its time in ms and its length in bytes."""


def mark_of(record: Record) -> Mark:
    """Return by what a record is known again. Two records of one offset have different times: one was written after a
    broker came back."""
    return record.offset, record.timestamp_ms, len(record.value or b"")


class KeptLog:
    """The log as a beginning stage finds it. For one thread at a time; closed when the state is restored."""

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        self._open_reader = open_reader
        self._reader: Reader | None = None

    @property
    def _asked(self) -> Reader:
        if self._reader is None:
            self._reader = self._open_reader()
        return self._reader

    def begins_at(self, topic: str) -> dict[int, int]:
        """Return the first kept offset of each partition."""
        return self._asked.begin_offsets(topic)

    def ends_at(self, topic: str) -> dict[int, int]:
        """Return the next offset of each partition."""
        return self._asked.end_offsets(topic)

    def check_read(self, topic: str, partition: int, mark: Sequence[int]) -> None:
        """Raise `InvariantBroken` where the record that a state was made of last is another one now, or gone although
        retention has not reached it."""
        offset, time_ms, size = mark
        begin, end = self._asked.begin_offsets(topic)[partition], self._asked.end_offsets(topic)[partition]
        if offset < begin:
            return
        if offset >= end:
            raise _lost(topic, partition, offset, f"the log ends at {end}")
        for record in read_range(self._asked, topic, begins={partition: offset}, ends={partition: offset + 1}):
            if mark_of(record) == (offset, time_ms, size):
                return
            raise _lost(topic, partition, offset, "another record lies there now")
        raise _lost(topic, partition, offset, "no record lies there")

    def check_sent(self, topic: str, partition: int, sent: Sent, last: Position) -> None:
        """Raise `AheadOfLog` where a partition of `samples` does not hold what a state has sent last any more."""
        if not is_kept(self._asked, topic, partition, sent, last):
            raise AheadOfLog(
                f"{topic}/{partition} does not hold the samples up to {tuple(last)} at offset {sent.offset} any more, "
                "which the broker had confirmed"
            )

    def check_whole(self, topic: str, partitions: Iterable[int], what: str, stage: str) -> None:
        """Raise `InvariantBroken` where the log does not begin with its first record, so that what is gone cannot be
        made again."""
        begins = self._asked.begin_offsets(topic)
        for partition in partitions:
            if begins[partition] > 0:
                raise InvariantBroken(
                    f"{what} lost what the broker had confirmed, every stored state comes after that, and "
                    f"{topic}/{partition} begins at offset {begins[partition]}: it cannot be made again. See the "
                    "brokers' logs and disks, and bring back the topic if there is a copy. Else "
                    f"`headrace {stage} --begin-afresh` decides to go on from there without what was known before, or "
                    "raise log.generation to begin anew."
                )

    def close(self) -> None:
        """Close the reader."""
        if self._reader is not None:
            self._reader.close()


@contextmanager
def kept_log(open_reader: Callable[[], Reader] | None) -> Iterator[KeptLog | None]:
    """Yield the log to look at while the block runs; None where there is no reader to look with."""
    found = None if open_reader is None else KeptLog(open_reader)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


async def can_go_back(
    kept: KeptLog | None, waits: Waits, deps: StageDependencies, partitions: Iterable[int], *, lost: str, stage: str
) -> bool:
    """Say whether a stage may begin with the first record of `events`, for all its states are ahead of what `lost`
    names. Raises `InvariantBroken` where that record is gone; False where a person has decided to do without."""
    if kept is None or deps.begin_afresh:
        return False
    events = deps.topics.events
    look = partial(kept.check_whole, events, partitions, lost, stage)
    await waits.call(f"look where {events} begins", look)
    log.warning("all states are ahead of %s: taking %s from its first record again", lost, events)
    return True


def _lost(topic: str, partition: int, offset: int, found: str) -> InvariantBroken:
    return InvariantBroken(
        f"{topic}/{partition}: the state was made of the record at offset {offset}, and {found}: the topic was made "
        "anew, or the broker has lost its end, which it had confirmed. What comes would be taken for what was read "
        "already. See the brokers' logs and disks; raise log.generation to begin anew beside what is stored."
    )
