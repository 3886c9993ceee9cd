"""The gateway without its sockets: messages in, Kafka records out, acks when Kafka has them.

The way of a chunk, in the words that the tests use:

1. *offer*: its events join the batches of their types. What was taken before counts as `repeated`; what is still on
   its way is leaned on: this chunk is settled when that one is.
2. *cut*: a due batch is checked by column and becomes one record a (partition, type); bad rows become dead letters.
3. *send*: records go out in order. A full local queue holds them back; a record that Kafka refuses is sent again
   until it is taken, because nothing was acked and the promise of punctuation still counts it.
4. *settle*: a chunk whose every event has a receipt (dead letters included) is remembered, then acked.

A crash anywhere before 4 leaves the chunk unacked: its sender sends it again, and the stream drops by event id what
was already appended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import xxhash

from headrace.contract.clock import Clock
from headrace.contract.config import IngestConfig
from headrace.contract.dead_letters import DeadLetter, encode_dead_letter
from headrace.contract.errors import Overloaded
from headrace.contract.events import PUNCTUATION, encode_punctuation
from headrace.contract.log import Producer
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.contract.topics import Topics
from headrace.ingest.batcher import Batcher, Cut, Owner, Rows, cut
from headrace.ingest.forward_protocol import Entry, Message, chunk_text, encode_record
from headrace.ingest.punctuate import Punctuator
from headrace.ingest.repeats import Occurrences, Repeats, digest
from headrace.ingest.validate import check, declared_types, event_time_ms

REMEMBERED_MAX = 400_000
"""Most event ids, and most chunks, in memory: about 80 bytes each, 32 MB together at most twice that."""
_RESEND_FIRST_S, _RESEND_MAX_S = 0.1, 5.0

READ, APPENDED, DEAD, REPEATED = "read", "appended", "dead_lettered", "repeated"


class Outgoing(msgspec.Struct):
    """A record on its way, with what its receipt settles."""

    topic: str
    partition: int
    value: bytes
    headers: dict[str, str]
    key: bytes | None
    owners: Counter[Owner]
    outcome: str
    rows: int
    reason: str = ""
    oldest_ms: int | None = None
    wait_s: float = 0.0


class Peer(msgspec.Struct, frozen=True):
    """One connection as the gateway sees it."""

    origin: str
    """The sender's address without its port, which changes with every connection."""
    occurrences: Occurrences = msgspec.field(default_factory=Occurrences)


class Gateway:
    """One gateway's epoch. Not thread-safe; the shell calls `offer` and, every few milliseconds, `tick`."""

    def __init__(
        self,
        project: Project,
        config: IngestConfig,
        topics: Topics,
        partitions: int,
        producer: Producer,
        metrics: Metrics,
        clock: Clock,
        name: str,
    ) -> None:
        self._config, self._topics, self._partitions = config, topics, partitions
        self._producer, self._metrics, self._clock, self._name = producer, metrics, clock, name
        self._types = declared_types(project)
        self._batcher = Batcher(
            list(self._types.values()),
            batch_ms=config.batch_ms,
            batch_rows=config.batch_rows,
            batch_bytes=config.batch_bytes,
        )
        self.epoch = clock.now_ms()
        self._punctuator = Punctuator(name, self.epoch, partitions, config.punctuate_ms, config.grace_ms)
        self._chunks_done = Repeats(config.repeat_horizon_ms, REMEMBERED_MAX)
        self._ids_done = Repeats(config.repeat_horizon_ms, REMEMBERED_MAX)
        self._chunks_open: dict[bytes, Owner] = {}
        self._ids_open: dict[bytes, Owner] = {}
        self._outbox: deque[Outgoing] = deque()
        self._resend: list[tuple[float, Outgoing]] = []
        self._unconfirmed: dict[int, Outgoing] = {}
        self._numbers = [0] * partitions
        self._anonymous = 0
        self.counts: dict[str, int] = {READ: 0, APPENDED: 0, DEAD: 0, REPEATED: 0}
        self.buffer_bytes = 0
        self.open_chunks = 0

    # -- 1. offer

    def offer(self, message: Message, size: int, peer: Peer, acked: Callable[[], None] | None) -> None:
        """Take a message of `size` bytes; `acked` is called once, when Kafka has all of it. Never blocks."""
        if message.signal:
            if acked is not None:
                acked()
            return
        key, prefix = self._identify(message, peer)
        declared = message.tag in self._types
        count = len(message.entries)
        if key and key in self._chunks_done:
            self._count(REPEATED, count, declared)
            if acked is not None:
                acked()
            return
        owner = Owner(key, message.tag, peer.origin, size + message.plain_bytes)
        owner.acks = [] if acked is None else [acked]
        self.buffer_bytes += owner.size
        self.open_chunks += 1
        owner.waiting = 1
        first = self._chunks_open.get(key) if key else None
        if first is not None:
            self._count(REPEATED, count, declared)
            self._lean(owner, first)
        else:
            self._chunks_open[key] = owner
            if message.problem:
                self._dead_letter(owner, "bad_chunk", message.problem, Entry(None, None), raw=message.raw)
            elif declared:
                self._buffer(owner, message, prefix)
            else:
                for entry in message.entries:
                    self._dead_letter(owner, "undeclared", "no declared event has this tag", entry)
        self._settled(owner, 1)

    def _identify(self, message: Message, peer: Peer) -> tuple[bytes, str]:
        """Return the chunk's key in memory, empty where it has no id, and how ids begin that events do not bring."""
        if message.chunk is None:
            self._anonymous += 1
            prefix = f"{self._name}/{self.epoch}/{self._anonymous}"
            return b"", prefix
        # fluent-bit's chunk id is a hash of the payload without the tag, so the tag belongs to the identity.
        nth = peer.occurrences.next(digest(message.tag, message.chunk))
        prefix = f"{peer.origin}/{chunk_text(message.tag)}/{chunk_text(message.chunk)}/{nth}"
        return digest(peer.origin, message.tag, message.chunk, str(nth)), prefix

    def _buffer(self, owner: Owner, message: Message, prefix: str) -> None:
        rows = self._batcher.rows_of(self._types[message.tag], self._clock.monotonic())
        count = len(message.entries)
        leans: set[Owner] = set()
        for at, entry in enumerate(message.entries):
            record = entry.record
            mark = _mark(record)
            if mark is not None:
                other = self._ids_open.get(mark)
                if other is not None or mark in self._ids_done:
                    self._count(REPEATED, 1, True)
                    if other is not None and other is not owner:
                        leans.add(other)
                    continue
                self._ids_open[mark] = owner
                owner.ids.append(mark)
            rows.records.append(record)
            rows.times_ns.append(entry.time_ns)
            rows.ids.append(f"{prefix}/{at}")
            rows.owners.append(owner)
            owner.waiting += 1
            time_ms = event_time_ms(record.get("event_time_ms") if isinstance(record, dict) else None, entry.time_ns)
            if time_ms is not None and (rows.oldest_ms is None or time_ms < rows.oldest_ms):
                rows.oldest_ms = time_ms
        rows.bytes += owner.size if count else 0
        for other in leans:
            self._lean(owner, other)

    @staticmethod
    def _lean(owner: Owner, other: Owner) -> None:
        owner.waiting += 1
        other.leaning.append(owner)

    # -- 2. cut

    def _cut_all(self) -> None:
        for rows in self._batcher.take():
            self._cut(rows)

    def _cut(self, rows: Rows) -> None:
        if not rows.records:
            return
        checked = check(
            rows.declared,
            rows.records,
            rows.times_ns,
            rows.ids,
            now_ms=self._clock.now_ms(),
            skew_ms=self._config.skew_ms,
        )

        def refuse(row: int, reason: str, detail: str) -> None:
            entry = Entry(rows.times_ns[row], rows.records[row])
            # A refused event was not taken: offered again after a fix, under its id, it is no repeat.
            mark = _mark(entry.record)
            if mark is not None:
                self._ids_open.pop(mark, None)
            self._dead_letter(rows.owners[row], reason, detail, entry, event_id=rows.ids[row], counted=False)

        for row, (reason, detail) in checked.rejected.items():
            refuse(row, reason, detail)
        owners = [rows.owners[row] for row in checked.rows]
        for piece in cut(checked.batch, owners, self._partitions, self._config.batch_bytes):
            if isinstance(piece, Cut):
                self._append(piece, rows.declared.kind, rows.declared.name)
            else:
                limit = f"one event is larger than ingest.batch_bytes, {self._config.batch_bytes} bytes"
                refuse(checked.rows[piece], "too_large", limit)

    def _append(self, piece: Cut, kind: str, name: str) -> None:
        headers = self._headers(piece.partition, kind)
        if kind != name:
            headers["type"] = name
        self._outbox.append(
            Outgoing(
                self._topics.events,
                piece.partition,
                piece.value,
                headers,
                None,
                piece.owners,
                APPENDED,
                piece.rows,
                oldest_ms=piece.oldest_ms,
            )
        )

    def _headers(self, partition: int, kind: str) -> dict[str, str]:
        self._numbers[partition] += 1
        return {
            "kind": kind,
            "gateway": self._name,
            "epoch": str(self.epoch),
            "seq": str(self._numbers[partition]),
        }

    def _dead_letter(
        self,
        owner: Owner,
        reason: str,
        detail: str,
        entry: Entry,
        *,
        event_id: str = "",
        raw: bytes | None = None,
        counted: bool = True,
    ) -> None:
        """Queue a dead letter; `counted` where `owner.waiting` does not know of the event yet."""
        most = self._config.dead_letter_bytes
        whole = encode_record(entry.record) if raw is None else raw
        own = entry.record.get("event_id") if isinstance(entry.record, dict) else None
        letter = DeadLetter(
            reason=reason,
            detail=detail,
            origin=owner.origin,
            tag=chunk_text(owner.tag),
            event_id=chunk_text(own) if isinstance(own, str) and own else event_id,
            time_ns=entry.time_ns or 0,
            raw=whole[:most],
            raw_truncated=len(whole) > most,
            gateway=self._name,
            seen_ms=self._clock.now_ms(),
        )
        if counted:
            owner.waiting += 1
        self._outbox.append(
            Outgoing(
                self._topics.dead_letters,
                0,
                encode_dead_letter(letter),
                {"gateway": self._name, "epoch": str(self.epoch)},
                owner.origin.encode(),
                Counter([owner]),
                DEAD,
                1,
                reason=reason,
            )
        )

    # -- 3. send

    def tick(self) -> None:
        """Run receipts, cut what is due, send, punctuate. Never blocks."""
        self._producer.poll(0.0)
        now_s = self._clock.monotonic()
        if self._batcher.due(now_s):
            self._cut_all()
        if self._resend:
            ready = [item for at, item in self._resend if at <= now_s]
            if ready:
                self._resend = [(at, item) for at, item in self._resend if at > now_s]
                self._outbox.extendleft(reversed(ready))
        self._send_all()
        if self._punctuator.due(now_s):
            self._punctuate()
        self._metrics.set("buffer_bytes", self.buffer_bytes)

    def _send_all(self) -> None:
        while self._outbox:
            item = self._outbox[0]
            self._unconfirmed[id(item)] = item
            try:
                self._producer.send(
                    item.topic,
                    item.partition,
                    item.value,
                    key=item.key,
                    headers=item.headers,
                    delivered=partial(self._delivered, item),
                )
            except Overloaded:
                del self._unconfirmed[id(item)]
                return
            self._outbox.popleft()

    def _delivered(self, item: Outgoing, error: Exception | None, _offset: int) -> None:
        self._unconfirmed.pop(id(item), None)
        if error is not None:
            self._metrics.add("errors_total", reason="kafka")
            item.wait_s = min(_RESEND_MAX_S, item.wait_s * 2 or _RESEND_FIRST_S)
            self._resend.append((self._clock.monotonic() + item.wait_s, item))
            return
        if item.outcome == APPENDED:
            self._count(APPENDED, item.rows, True)
        else:
            declared = next(iter(item.owners)).tag in self._types
            self._count(DEAD, 1, declared, reason=item.reason)
        for owner, rows in item.owners.items():
            self._settled(owner, rows)

    def _punctuate(self, *, bye: bool = False) -> None:
        waiting = self._batcher.oldest_ms()
        held = [i for _, i in self._resend] + list(self._outbox) + list(self._unconfirmed.values())
        for partition in range(self._partitions):
            times = [i.oldest_ms for i in held if i.partition == partition and i.oldest_ms is not None]
            if waiting is not None:
                times.append(waiting)
            oldest = min(times, default=None)
            # A promise must not overtake events that the local queue refused.
            if self._outbox and not bye:
                return
            promise = self._punctuator.promise(partition, self._clock.now_ms(), oldest, self.counts, bye=bye)
            if promise is None:
                continue
            try:
                self._producer.send(
                    self._topics.events,
                    partition,
                    encode_punctuation(promise),
                    headers=self._headers(partition, PUNCTUATION),
                    delivered=partial(self._promised, partition),
                )
            except Overloaded:
                self._punctuator.confirmed(partition)

    def _promised(self, partition: int, _error: Exception | None, _offset: int) -> None:
        self._punctuator.confirmed(partition)

    # -- 4. settle

    def _settled(self, owner: Owner, events: int) -> None:
        """Take `events` outcomes off; a chunk without open ones is remembered, acked and forgotten."""
        ready = [(owner, events)]
        while ready:
            one, outcomes = ready.pop()
            one.waiting -= outcomes
            if one.waiting:
                continue
            now_ms = self._clock.now_ms()
            if self._chunks_open.get(one.key) is one:
                del self._chunks_open[one.key]
                self._chunks_done.add(one.key, now_ms)
            for mark in one.ids:
                if self._ids_open.pop(mark, None) is not None:
                    self._ids_done.add(mark, now_ms)
            self.buffer_bytes -= one.size
            self.open_chunks -= 1
            for acked in one.acks:
                acked()
            ready.extend((leaning, 1) for leaning in one.leaning)
            one.leaning = []

    def _count(self, outcome: str, events: int, declared: bool, *, reason: str = "") -> None:
        if outcome == DEAD:
            self._metrics.add("events_dead_lettered_total", events, reason=reason)
        if not declared:
            return
        self.counts[READ] += events
        self.counts[outcome] += events
        self._metrics.add("events_read_total", events)
        if outcome == APPENDED:
            self._metrics.add("events_appended_total", events)
        elif outcome == REPEATED:
            self._metrics.add("events_repeated_total", events)

    # -- clean shutdown

    def drained(self) -> bool:
        """Cut what waits and say whether every chunk has its receipts; call between ticks until it is true."""
        self._cut_all()
        self._send_all()
        return not (self._outbox or self._resend or self._unconfirmed)

    def goodbye(self) -> None:
        """Queue the last punctuation of this epoch; only after `drained` it says `bye`."""
        self._punctuate(bye=True)


def _mark(record: Any) -> bytes | None:
    """Return what stands for a record's own event id; None where it has none."""
    own = record.get("event_id") if isinstance(record, dict) else None
    if isinstance(own, str):
        return xxhash.xxh3_128_digest(own.encode("utf-8", "surrogateescape")) if own else None
    if isinstance(own, bytes):
        return xxhash.xxh3_128_digest(own) if own else None
    if isinstance(own, int) and not isinstance(own, bool):
        return xxhash.xxh3_128_digest(str(own).encode())
    return None


def peer_of(address: Any) -> Peer:
    """Return the peer of a socket's remote address."""
    return Peer(str(address[0]) if isinstance(address, tuple) and address else "local")
