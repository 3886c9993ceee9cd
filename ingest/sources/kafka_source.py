"""The Kafka source: a topic that shippers write by themselves, re-keyed through the gateway as it is.

How nothing is lost and nothing counts twice, in the words that the tests use:

1. *take*: records of the partitions held are taken in order, at most `in_flight_max` without their receipts, and none
   while the gateway holds too much; the group's member stops fetching then. What is held back (3) leaves room for the
   rest.
2. *name*: an event without an id gets `topic/partition/offset/timestamp` of its record, so that reading a record again
   is a repeat. The timestamp tells a topic from another of its name, made anew or in another cluster.
3. *offer*: the records of one partition go to the gateway as one message a tag, named by its first and last offset;
   what cannot be read goes as a dead letter, `bad_chunk`, with its bytes. A message that the gateway refuses, because
   too many of its kind became dead letters or too many late events wait, is held back and offered again until it is
   taken; its topic keeps it.
   Where all records of the topic have one tag, its partition is not read on meanwhile; others are. Where tags mix
   within partitions, records of other tags behind it go on, until what is held back takes half of `in_flight_max`: then
   the oldest is taken after all, and its bad events become dead letters; late ones wait even then. For a position is
   one number: to hold one record for longer would stop every tag, and in the end the topic's retention would delete
   unread what is good.
4. *settle*: when every event of a run of records has its receipt, dead letters included, and so have all runs before
   it, the group's position of the partition moves behind it.

A crash, or a partition given to another gateway, anywhere before 4 means that records are read again; the gateway that
appended them, else the stream, drops their events by id.

Shippers write null keys by default, which spread over partitions: order between records is that of the partition only,
and there is none where no key is configured. The join does not depend on it (feedback that comes first waits for its
impression, `join.early_feedback_ms`), but an impression then sees counters as they stood when it was read.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import msgspec

from headrace.contract.config import SourceConfig
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.group import Claim, Fetched, Group
from headrace.contract.metrics import Metrics
from headrace.ingest.decode.message import Message, message_of
from headrace.ingest.decode.validate import brings_id
from headrace.ingest.gateway.admission import NO_ROOM, Admission
from headrace.ingest.gateway.batcher import Acked, Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.sources.foreign_formats import Foreign, RecordBytes, read_foreign

log = logging.getLogger("headrace.ingest")

_TAKE_MAX = 500
"""Most records in one turn of the loop: some 15 ms of decoding, in which no connection is served."""
_BUSY_S, _IDLE_S = 0.002, 0.02
_REPORT_S = 1.0
_AGAIN_S = 0.5
"""Time between offers of what the gateway refused."""
_SETTLE_S, _LEAVE_S = 1.0, 0.8
"""Longest waits at the end, for receipts and for the group: together less than the loop's `DRAIN_S`, 2 s."""


class Run(msgspec.Struct):
    """Records of one partition that were offered together; `open` messages have no receipt yet."""

    end: int
    """Offset of the first record behind it."""
    records: int
    open: int
    refused: int = 0
    """Those of the open ones that the gateway refused."""


class Positions:
    """What was offered of each claim, in order, and how far it is settled without a gap. Pure."""

    def __init__(self) -> None:
        self._runs: defaultdict[Claim, deque[Run]] = defaultdict(deque)
        self.in_flight = 0
        """Records offered and not settled."""

    def offered(self, claim: Claim, run: Run) -> None:
        """Note a run, before any receipt of it comes."""
        self._runs[claim].append(run)
        self.in_flight += run.records

    def held_back(self) -> int:
        """Return the records of every run with a refused message, and of the runs behind it."""
        held = 0
        for runs in self._runs.values():
            waits = False
            for run in runs:
                waits = waits or run.refused > 0
                held += run.records if waits else 0
        return held

    def settled(self, claim: Claim) -> int | None:
        """Drop the claim's finished runs from its front; return the position behind them, None where it stays."""
        runs, position = self._runs[claim], None
        while runs and runs[0].open == 0:
            run = runs.popleft()
            position = run.end
            self.in_flight -= run.records
        if not runs:
            del self._runs[claim]
        return position


class _Offer(msgspec.Struct, frozen=True):
    """A message on its way to the gateway."""

    message: Message
    peer: Peer
    claim: Claim
    run: Run
    acked: Acked


class KafkaSource:
    """One topic, read by one gateway: a companion of its loop."""

    def __init__(self, config: SourceConfig, open_group: Callable[[], Group], metrics: Metrics, clock: Clock) -> None:
        self._config, self._open_group, self._metrics, self._clock = config, open_group, metrics, clock
        self._positions = Positions()
        self._refused: list[_Offer] = []
        self._paused: frozenset[Claim] = frozenset()
        self._told = False
        self._no_room = False
        self._again_s = 0.0
        self._gap = 0

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Take, offer and settle until `stopping`; then wait for receipts, commit and leave the group, in 2 s."""
        now_s = self._clock.monotonic
        group = self._open_group()
        closed = False
        try:
            report_s = now_s()
            while not stopping.is_set():
                busy = self.turn(admission, group, now_s())
                if now_s() >= report_s:
                    report_s = now_s() + _REPORT_S
                    self._report(group)
                await asyncio.sleep(_BUSY_S if busy else _IDLE_S)
            until = now_s() + _SETTLE_S
            while self._positions.in_flight and now_s() < until:
                await asyncio.sleep(_BUSY_S)
            closed = True
            await asyncio.to_thread(group.close, _LEAVE_S)
        finally:
            if not closed:
                group.close(0.0)

    def turn(self, admission: Admission, group: Group, now_s: float) -> bool:
        """Take what may be taken and offer it, and what was refused again; say whether there was any. Never blocks."""
        if self._refused and now_s >= self._again_s and admission.is_open():
            self._again_s = now_s + _AGAIN_S
            self._offer_again(admission, group)
        most = self._make_room(admission, group)
        if most <= 0 or not admission.is_open():
            return False
        fetched = group.take(min(most, _TAKE_MAX))
        for claim, records in groupby(fetched, lambda one: one.claim):
            if group.held(claim):
                self._offer(admission, group, claim, list(records))
        return bool(fetched)

    def _offer(self, admission: Admission, group: Group, claim: Claim, records: Sequence[Fetched]) -> None:
        """Offer a run of records; its position moves when the last receipt of its messages has come."""
        messages = messages_of(self._config, records)
        run = Run(records[-1].offset + 1, len(records), len(messages) + 1)
        self._positions.offered(claim, run)
        peer = Peer(f"kafka:{claim.topic}/{claim.partition}")
        for message in messages:
            self._offer_one(admission, _Offer(message, peer, claim, run, partial(self._acked, group, claim, run)))
        # One more than the messages: receipts that come at once must not settle a run that is half offered.
        self._acked(group, claim, run, Outcome(0, 0, 0))

    def _offer_one(self, admission: Admission, one: _Offer) -> None:
        if not admission.offer(one.message, len(one.message.raw), one.peer, one.acked, refusable=True):
            one.run.refused += 1
            self._refused.append(one)

    def _make_room(self, admission: Admission, group: Group) -> int:
        """Return how many records may be taken, beside those that are held back."""
        most, in_flight = self._config.in_flight_max, self._positions.in_flight
        if not self._config.tag_field:
            paused = frozenset(one.claim for one in self._refused)
            if paused != self._paused:
                self._paused = paused
                group.pause(paused)
            # A paused partition has at most what one turn took.
            return most - in_flight + (self._positions.held_back() if paused else 0)
        # Only when little room is left: to count takes a while, and each time half of the room is made free.
        if self._refused and most - in_flight <= most // 4:
            while self._refused and not self._no_room and self._positions.held_back() > most // 2:
                self._take_oldest(admission, group)
        return most - in_flight

    def _take_oldest(self, admission: Admission, group: Group) -> None:
        """Let the gateway take what is held back of the oldest run, whatever becomes of it; but late events wait."""
        run = self._refused[0].run
        oldest = [one for one in self._refused if one.run is run]
        held = [one for one in oldest if group.held(one.claim)]
        # They wait for the settler, not for a correction: taken, they would fill its memory. Asked at each offer only.
        parts = ((part, one.peer.origin) for one in held for part in admission.mapped(one.message).messages)
        self._no_room = any(admission.refuses(part, origin) == NO_ROOM for part, origin in parts)
        if self._no_room:
            return
        if not self._told:
            self._told = True
            log.error(
                "source %s: events beyond the ceiling of dead letters hold back those of other tags in their partition,"
                " and are taken now. Give each tag a topic of its own if they are to wait",
                self._config.topic,
            )
        self._refused = [one for one in self._refused if one.run is not run]
        for one in oldest:
            run.refused -= 1
            if group.held(one.claim):
                admission.offer(one.message, len(one.message.raw), Peer(one.peer.origin), one.acked)
            else:
                one.acked(Outcome(0, 0, 0))

    def _offer_again(self, admission: Admission, group: Group) -> None:
        """Offer what was refused; what belongs to a partition given away is its next holder's."""
        refused, self._refused, self._no_room = self._refused, [], False
        for one in refused:
            one.run.refused -= 1
            if group.held(one.claim):
                # A peer of its own each time: the same chunk on the same connection would be a second one.
                self._offer_one(admission, msgspec.structs.replace(one, peer=Peer(one.peer.origin)))
            else:
                one.acked(Outcome(0, 0, 0))

    def _acked(self, group: Group, claim: Claim, run: Run, _outcome: Outcome) -> None:
        run.open -= 1
        if run.open:
            return
        self._metrics.add("source_settled_total", run.records, topic=self._config.topic)
        position = self._positions.settled(claim)
        if position is not None:
            group.settle(claim, position)

    def _report(self, group: Group) -> None:
        status = group.status()
        lag = math.nan if status.lag_records is None else status.lag_records
        self._metrics.set("lag_records", lag, topic=self._config.topic)
        if status.gap_records > self._gap:
            self._metrics.add("gap_total", status.gap_records - self._gap, topic=self._config.topic)
            self._gap = status.gap_records


def messages_of(source: SourceConfig, records: Sequence[Fetched]) -> list[Message]:
    """Return what a run of records says: one message a tag, and one for each record that cannot be read. Pure."""
    bodies: defaultdict[str, list[bytes]] = defaultdict(list)
    unread: list[Message] = []
    for one in records:
        raws = RecordBytes(source, one.value or b"")
        for nth, found in enumerate(read_foreign(source, one.value, one.timestamp_ms)):
            body = b""
            if not found.problem:
                body, found = _packed(found, _event_id(source, one, nth))
                found = found._replace(raw=raws[nth]) if found.problem else found
            if found.problem:
                chunk = _event_id(source, one, nth)
                unread.append(
                    Message(found.tag, chunk=chunk, problem=found.problem, raw=found.raw, reason=found.reason)
                )
            else:
                bodies[found.tag].append(body)
    # Only the same records have the same name: a repeat may be cut in other places.
    chunk = f"{_event_id(source, records[0], 0)}-{records[-1].offset}"
    whole = [Message(tag, b"".join(parts), chunk, plain_bytes=sum(map(len, parts))) for tag, parts in bodies.items()]
    return whole + unread


def _packed(found: Foreign, event_id: str) -> tuple[bytes, Foreign]:
    """Return the record as an entry of a message, with its id; or what keeps it from being one."""
    record: dict[Any, Any] = found.record
    if not brings_id(record):
        record = {**record, "event_id": event_id}
    try:
        return message_of(found.tag, [(found.time_ns, record)]).body, found
    except (ValueError, TypeError, OverflowError) as error:
        # Text with half a surrogate pair, and the like.
        return b"", Foreign(found.tag, None, None, f"no record: {type(error).__name__}")


def _event_id(source: SourceConfig, one: Fetched, nth: int) -> str:
    whole = f"{one.claim.topic}/{one.claim.partition}/{one.offset}/{one.timestamp_ms}"
    return f"{whole}/{nth}" if source.format == "otlp_json" else whole
