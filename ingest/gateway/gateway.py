"""The gateway without its sockets: messages in, Kafka records out, acks when Kafka has them.

The way of a chunk, in the words that the tests use:

1. *offer*: its body joins the batch of its type, not decoded yet. A chunk that was taken before counts as `repeated`;
   where it is still on its way, this chunk follows it: it is settled when the first one is.
2. *cut*: a due batch is decoded and checked by column and becomes one record a (partition, type); bad rows become dead
   letters, events whose id was taken before count as `repeated`. What is older than the stream's memory of repeats
   becomes a dead letter too (`too_late`), and is looked up before it is taken.
3. *send*: records go out in order. A full local queue holds them back; a record that Kafka refuses is sent again
   until it is taken, because nothing was acked and the promise of punctuation still counts it. One that has waited
   until its events are too late is set aside as they are in step 2.
4. *settle*: a chunk whose every event has a receipt (dead letters included) is remembered, then acked.

A crash anywhere before 4 leaves the chunk unacked: its sender sends it again, and the stream drops by event id what
was already appended.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import Overloaded
from headrace.contract.formats.dead_letters import TOO_LATE, encode_dead_letter
from headrace.contract.formats.events import LATE, LOOKED_UP, PUNCTUATION, SET_ASIDE, decode_batch, encode_punctuation
from headrace.contract.hashing import hash_text, partition_of
from headrace.contract.privacy import Privacy
from headrace.ingest.dead_letters.ceiling import Ceiling
from headrace.ingest.decode.fluent_chunk import decode, layout
from headrace.ingest.decode.message import BAD_CHUNK, Entry, Message, read_entry, starts_of
from headrace.ingest.decode.msgpack_scan import I64s, as_bytes
from headrace.ingest.decode.validate import Declared, brings_id, check, declared_types
from headrace.ingest.gateway.admission import BEYOND_CEILING, NO_ROOM
from headrace.ingest.gateway.batcher import Acked, Batcher, Cut, OpenChunk, Outcome, Waiting, cut, merge
from headrace.ingest.gateway.chunk_identity import Peer, identify
from headrace.ingest.gateway.counts import APPENDED, DEAD, REPEATED, Counts
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.late_events import record_of_row
from headrace.ingest.gateway.letter_writer import LetterWriter, TooLate
from headrace.ingest.gateway.punctuate import Punctuator
from headrace.ingest.gateway.repeats import EventIds, Repeats
from headrace.ingest.gateway.send_queue import Outgoing, SendQueue
from headrace.ingest.gateway.steady_time import SteadyTime
from headrace.ingest.sources.access_log_events import Mapped, acked_together, mappers_of
from headrace.kernels.hashes import hash64_texts

CHUNKS_REMEMBERED = 400_000
"""Most chunks in memory: about 80 bytes each, 32 MB."""
IDS_REMEMBERED = 1_000_000
"""Most event ids in memory: 50 MB."""
_SLICE_ROWS = 20_000
"""Most rows that are decoded at once: 20,000 rows of 30 columns take 10 MB while they are columns of numbers."""
_ENTRY_BYTES = 128
"""What an entry adds to `buffer_bytes` beside its own bytes: each may become a dead letter."""
_SALTS = (0, 1)


class Gateway:
    """One gateway's epoch. Not thread-safe; `loop.GatewayLoop` calls `offer` and, every few milliseconds, `tick`."""

    def __init__(self, deps: GatewayDependencies, name: str) -> None:
        config, partitions = deps.config, deps.partitions
        self._config, self._topics, self._partitions = config, deps.topics, partitions
        self._producer, self._metrics, self._clock, self._name = deps.producer, deps.metrics, deps.clock, name
        self._privacy = deps.privacy or Privacy(deps.project)
        self._types = {tag: layout(one) for tag, one in declared_types(deps.project, self._privacy.token_key).items()}
        self._mappers = mappers_of(deps.project)
        self._letters = LetterWriter(config, self._privacy, name, [*self._types, *self._mappers])
        self.ceiling = Ceiling(config, [*self._types, *self._mappers])
        self._batcher = Batcher(
            list(self._types.values()),
            batch_ms=config.batch_ms,
            batch_rows=config.batch_rows,
            batch_bytes=config.batch_bytes,
        )
        self.epoch = deps.start.epoch
        self._instance, self._broker_ms, self._time = deps.instance, deps.broker_ms, SteadyTime()
        self._punctuator = Punctuator(
            name, self.epoch, partitions, config.punctuate_ms, config.grace_ms, deps.start.promised
        )
        self._chunks_done = Repeats(config.repeat_horizon_ms, CHUNKS_REMEMBERED)
        self._chunks_open: dict[bytes, OpenChunk] = {}
        self._ids = EventIds(config.repeat_horizon_ms, IDS_REMEMBERED)
        self._open: dict[int, OpenChunk] = {}
        self._taken = 0
        self._queue = SendQueue(deps.producer, deps.metrics, deps.clock, self._delivered, self._set_aside)
        self._late, self._looked_up = deps.late, deps.looked_up
        self._numbers = [0] * partitions
        self._anonymous = 0
        self._counts = Counts(deps.metrics)
        self.counts = self._counts.declared
        self.buffer_bytes = 0
        self.open_chunks = 0

    def now_ms(self) -> int:
        """Return the gateway's time, which no step of the wall clock moves."""
        return self._time.now_ms(self._clock.now_ms(), self._clock.monotonic())

    # -- 1. offer

    def offer(self, message: Message, size: int, peer: Peer, acked: Acked | None, *, refusable: bool = False) -> bool:
        """Take a message of `size` bytes; `acked` is called once, when Kafka has all of it. Never blocks.

        A `refusable` one, which its sender keeps until the ack, may be beyond the ceiling of dead letters or the bound
        of late events: nothing of it is taken then, `acked` is never called, and False returned.
        """
        if message.signal:
            if acked is not None:
                acked(Outcome(0, 0, 0))
            return True
        if not message.problem and message.tag in self._mappers:
            mapped = self.mapped(message)
            self._metrics.add("lines_skipped_total", mapped.skipped, tag=message.tag)
            each = acked_together(len(mapped.messages), acked)
            taken = [self.offer(part, 0, peer, each, refusable=refusable) for part in mapped.messages]
            return all(taken)
        key, prefix = self._identify(message, peer)
        made = self._types.get(message.tag)
        starts, problem, raw = starts_of(message)
        if key and key in self._chunks_done:
            self._counts.note(REPEATED, len(starts), made is not None)
            if acked is not None:
                acked(Outcome(0, 0, len(starts)))
            return True
        follows = bool(key) and key in self._chunks_open
        if refusable and not follows and self._refusal(message, peer.origin, starts):
            return False
        self._taken += 1
        held = size + message.plain_bytes + _ENTRY_BYTES * len(starts)
        chunk = OpenChunk(self._taken, key, message.tag, peer.origin, held)
        chunk.acks = [] if acked is None else [acked]
        self._open[chunk.number] = chunk
        self.buffer_bytes += chunk.size
        self.open_chunks += 1
        try:
            self._begin(chunk, message, prefix, starts, problem, raw)
        except Exception:
            self._abandon(chunk)
            raise
        return True

    def _begin(self, chunk: OpenChunk, message: Message, prefix: str, starts: I64s, problem: str, raw: bytes) -> None:
        """Let a chunk's events join their batch, or become dead letters, or follow the chunk that has them already."""
        key, made = chunk.key, self._types.get(chunk.tag)
        chunk.waiting = 1
        first = self._chunks_open.get(key) if key else None
        if first is not None:
            self._repeated(chunk, len(starts), made is not None)
            self._follow(chunk, first)
        else:
            if key:
                self._chunks_open[key] = chunk
            if message.problem and message.body:
                for nth, entry in enumerate(message.entries):
                    self._dead_letter(chunk, message.reason, problem, entry, event_id=f"{prefix}/{nth}")
            elif problem:
                reason = message.reason if message.problem else BAD_CHUNK
                self._dead_letter(chunk, reason, problem, Entry(None, None), raw=raw)
            elif made is not None:
                chunk.waiting += len(starts)
                self._batcher.of(made, self._clock.monotonic()).add(message.body, starts, chunk, prefix)
            else:
                detail = self._letters.undeclared(chunk.tag)
                for nth, entry in enumerate(message.entries):
                    self._dead_letter(chunk, "undeclared", detail, entry, event_id=f"{prefix}/{nth}")
        self._settled(chunk, 1)

    def _abandon(self, chunk: OpenChunk) -> None:
        """Forget a chunk in which a fault of ours was met: it must not wait for its own end when it comes again.

        It is never acked: one of what it waits for never comes.
        """
        if self._open.pop(chunk.number, None) is not None:
            self.buffer_bytes -= chunk.size
            self.open_chunks -= 1
        if chunk.key and self._chunks_open.get(chunk.key) is chunk:
            del self._chunks_open[chunk.key]

    def mapped(self, message: Message) -> Mapped:
        """Return the events that lines of an access log are, ready to be offered; any other message as it is."""
        mapper = None if message.problem else self._mappers.get(message.tag)
        return Mapped([message], 0) if mapper is None else mapper.map_message(message)

    def refuses(self, message: Message, origin: str) -> str:
        """Say why a refusable message, `mapped`, of which nothing was taken would be refused; empty where it is taken.

        For who offers several of which all are to be taken, or none. A probe is given by the asking.
        """
        key, _ = self._identify(message, Peer(origin))
        if message.signal or (key and (key in self._chunks_done or key in self._chunks_open)):
            return ""
        return self._refusal(message, origin, starts_of(message)[0])

    def _refusal(self, message: Message, origin: str, starts: I64s) -> str:
        """Say why a message is not taken, and count it. Room first: asking the ceiling uses up a probe."""
        now_ms, refusal = self.now_ms(), ""
        made = self._types.get(message.tag) if self._late.is_full() else None
        if made is not None and self._late.holds_late(made, message.body, starts, now_ms):
            refusal = NO_ROOM
        elif not self.ceiling.allows(message.tag, origin, len(starts), now_ms):
            refusal = BEYOND_CEILING
        if refusal:
            self._metrics.add("events_refused_total", len(starts), tag=self.ceiling.name(message.tag))
        return refusal

    def _identify(self, message: Message, peer: Peer) -> tuple[bytes, str]:
        """Return the chunk's key in memory, empty where it has no id, and the prefix of ids for events without one."""
        if message.chunk is None:
            self._anonymous += 1
            prefix = "/".join(filter(None, (self._name, str(self.epoch), self._instance, str(self._anonymous))))
            return b"", prefix
        return identify(message, message.chunk, peer)

    def _repeated(self, chunk: OpenChunk, events: int, declared: bool) -> None:
        chunk.repeated += events
        self._counts.note(REPEATED, events, declared)

    @staticmethod
    def _follow(chunk: OpenChunk, first: OpenChunk) -> None:
        """Let `chunk` be settled when `first` is."""
        chunk.waiting += 1
        first.followers.append(chunk)

    # -- 2. cut

    def _cut_all(self) -> None:
        for waiting in self._batcher.take():
            self._cut(waiting)

    def _cut(self, waiting: Waiting) -> None:
        data = as_bytes(waiting.bodies[0] if len(waiting.bodies) == 1 else b"".join(waiting.bodies))
        sizes = np.array([len(starts) for starts in waiting.starts], np.int64)
        shifts = np.cumsum([0, *map(len, waiting.bodies[:-1])]).astype(np.int64)
        chunk_N = np.repeat(np.arange(len(sizes)), sizes)
        starts_N = np.concatenate(waiting.starts) + shifts[chunk_N]
        nth_N = np.arange(len(starts_N)) - (np.cumsum(sizes) - sizes)[chunk_N]
        for at in range(0, len(starts_N), _SLICE_ROWS):
            part = slice(at, at + _SLICE_ROWS)
            self._cut_slice(waiting, data, starts_N[part], chunk_N[part], nth_N[part])

    def _cut_slice(
        self, waiting: Waiting, data: npt.NDArray[np.uint8], starts_N: I64s, chunk_N: I64s, nth_N: I64s
    ) -> None:
        declared, chunks = waiting.layout.declared, waiting.chunks
        now_ms = self.now_ms()
        taken_ms = range(self._config.past_ms, now_ms + self._config.skew_ms + 1)
        self._counts.look(declared, data, int(starts_N[0]), self._clock.monotonic())
        decoded = decode(waiting.layout, data, starts_N, waiting.prefixes, chunk_N, nth_N, taken_ms)
        batch, own_N = decoded.batch, decoded.own
        at_N = np.arange(len(starts_N))
        if len(decoded.left):
            entries = [read_entry(data, int(starts_N[row])) for row in decoded.left]
            derived = [f"{waiting.prefixes[chunk_N[row]]}/{nth_N[row]}" for row in decoded.left]
            checked = check(
                declared,
                [entry.record for entry in entries],
                [entry.time_ns for entry in entries],
                derived,
                taken_ms=taken_ms,
            )
            for at, (reason, detail) in checked.rejected.items():
                chunk = chunks[chunk_N[decoded.left[at]]]
                self._dead_letter(chunk, reason, detail, entries[at], event_id=derived[at], counted=False)
            own_N[decoded.left] = [brings_id(entry.record) for entry in entries]
            batch, rows_M = merge(batch, decoded.left, checked.batch, decoded.left[checked.rows])
            own_N, chunk_N, at_N = own_N[rows_M], chunk_N[rows_M], at_N[rows_M]
        batch = self._privacy.batch(batch, declared.tag, declared.key)
        ids = batch.column("event_id")
        # An event type and id decide: an impression, a click and an order may all have id 17.
        first_N, second_N = (hash64_texts(ids, hash_text(declared.name, salt=salt)) for salt in _SALTS)
        numbers = np.array([chunk.number for chunk in chunks], np.int64)
        found_N = self._ids.take(first_N, second_N, own_N, numbers[chunk_N], now_ms)
        if declared.kind == "feedback" and not (self._looked_up or found_N.all()):
            # What is too late, too: a shipper that holds feedback back for hours is to be seen.
            self._counts.note_feedback(declared.name, batch["event_time_ms"].to_numpy()[found_N == 0], now_ms)
        late_before_ms = 0 if self._looked_up else self._late.before_ms(now_ms)
        late_N = (found_N == 0) & (batch["event_time_ms"].to_numpy() < late_before_ms)
        for row in np.flatnonzero(late_N).tolist():
            # Its id stays in memory: when it comes again, its letter stands for it.
            entry, chunk = read_entry(data, int(starts_N[at_N[row]])), chunks[chunk_N[row]]
            # It passed every check, which is what the ceiling asks; what waited until it was late is counted already.
            self.ceiling.note(declared.tag, chunk.origin, now_ms, appended=1)
            self._set_row_aside(chunk, declared, batch, row, entry)
        if found_N.any() or late_N.any():
            self._drop_repeats(chunks, chunk_N, found_N)
            keep = np.flatnonzero((found_N == 0) & ~late_N)
            batch = batch.take(pa.array(keep))
            chunk_N, first_N, second_N = chunk_N[keep], first_N[keep], second_N[keep]
        limit = self._config.batch_bytes
        promised = [self._punctuator.promised(partition) for partition in range(self._partitions)]
        for piece in cut(batch, chunk_N, promised, rows_max=self._config.batch_rows, bytes_max=limit):
            if isinstance(piece, Cut):
                self._append(piece, [(chunks[i], rows) for i, rows in piece.chunk_rows.items()], declared)
                continue
            # A refused event was not taken. When it is offered again under its id, after a fix, it is no repeat.
            self._ids.forget(first_N[piece], second_N[piece])
            detail = f"one event is larger than ingest.batch_bytes, {limit} bytes"
            row = batch.slice(piece, 1).to_pylist()[0]
            entry = Entry(row["event_time_ms"] * 1_000_000, row)
            self._dead_letter(chunks[chunk_N[piece]], "too_large", detail, entry, counted=False)

    def _set_row_aside(
        self, chunk: OpenChunk, declared: Declared, batch: pa.RecordBatch, row: int, entry: Entry
    ) -> None:
        """Queue the dead letter of an event that is too late; `entry` is the one that became this row."""
        key, event_id, time_ms = (batch[name][row].as_py() for name in ("key", "event_id", "event_time_ms"))
        detail = f"event time {time_ms} ms is older than the stream's memory of repeats: it is looked up first"
        late = TooLate(declared.name, time_ms, partition_of(key, self._partitions))
        self._dead_letter(chunk, TOO_LATE, detail, entry, event_id=event_id, late=late, counted=False)

    def _drop_repeats(self, chunks: list[OpenChunk], chunk_N: I64s, found_N: I64s) -> None:
        """Give every repeated event its outcome; where the chunk that brought it first is still open, follow that."""
        rows = np.flatnonzero(found_N)
        pairs, counts = np.unique(np.stack([chunk_N[rows], found_N[rows]], axis=1), axis=0, return_counts=True)
        for (nth, number), events in zip(pairs.tolist(), counts.tolist(), strict=True):
            chunk = chunks[nth]
            self._repeated(chunk, events, True)
            first = self._open.get(number)
            if first is not None and first is not chunk:
                self._follow(chunk, first)
            self._settled(chunk, events)

    def _append(self, piece: Cut, chunks: list[tuple[OpenChunk, int]], declared: Declared) -> None:
        rows_of = Counter[str]()
        for chunk, rows in chunks:
            rows_of[chunk.origin] += rows
        for origin, rows in rows_of.items():
            self.ceiling.note(declared.tag, origin, self.now_ms(), appended=rows)
        headers = self._headers(piece.partition, declared.kind)
        headers[LATE] = LOOKED_UP if self._looked_up else SET_ASIDE
        if declared.kind != declared.name:
            headers["type"] = declared.name
        self._queue.add(
            Outgoing(
                topic=self._topics.events,
                partition=piece.partition,
                value=piece.value,
                headers=headers,
                chunks=chunks,
                outcome=APPENDED,
                rows=piece.rows,
                oldest_ms=piece.oldest_ms,
                earliest_ms=None if self._looked_up else piece.earliest_ms,
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
        chunk: OpenChunk,
        reason: str,
        detail: str,
        entry: Entry,
        *,
        event_id: str = "",
        raw: bytes | None = None,
        late: TooLate | None = None,
        counted: bool = True,
    ) -> None:
        """Queue a dead letter; `counted` where `chunk.waiting` does not know of the event yet."""
        letter = self._letters.letter(
            chunk, reason, detail, entry, self.now_ms(), event_id=event_id, raw=raw, late=late
        )  # fmt: skip
        if late is None:
            self.ceiling.note(chunk.tag, chunk.origin, letter.seen_ms, dead=1, reason=reason)
        else:
            self._late.written += 1
        if counted:
            chunk.waiting += 1
        self._queue.add(
            Outgoing(
                topic=self._topics.dead_letters,
                partition=0,
                value=encode_dead_letter(letter),
                headers={"gateway": self._name, "epoch": str(self.epoch)},
                key=chunk.origin.encode(),
                chunks=[(chunk, 1)],
                outcome=DEAD,
                rows=1,
                reason=reason,
            )
        )

    # -- 3. send

    def tick(self) -> None:
        """Run receipts, cut what is due, send, punctuate. Never blocks."""
        self._producer.poll(0.0)
        now_s = self._clock.monotonic()
        self._time.heard(self._broker_ms(), now_s)
        if self._batcher.due(now_s):
            self._cut_all()
        self._queue.send_again(now_s)
        self._send()
        self._queue.receipts.check(now_s)
        if self._punctuator.due(now_s):
            self._punctuate()
        self._metrics.set("buffer_bytes", self.buffer_bytes)

    def _send(self) -> None:
        self._queue.send(self._late.held_before_ms(self.now_ms()))

    def _set_aside(self, item: Outgoing) -> None:
        """Make dead letters of a record's events, which have waited for Kafka until they are too late."""
        name = item.headers.get("type", item.headers["kind"])
        declared = next(one.declared for one in self._types.values() if one.declared.name == name)
        batch = decode_batch(item.value)
        for row, chunk in enumerate(chunk for chunk, rows in item.chunks for _ in range(rows)):
            record = record_of_row(batch, row, keeps_unknown=declared.unknown == "keep")
            self._set_row_aside(chunk, declared, batch, row, Entry(record["event_time_ms"] * 1_000_000, record))

    def _delivered(self, item: Outgoing) -> None:
        """Take a record's receipt."""
        if item.outcome == APPENDED:
            self._counts.note(APPENDED, item.rows, True)
        else:
            self._counts.note(DEAD, 1, item.chunks[0][0].tag in self._types, reason=item.reason)
        for chunk, rows in item.chunks:
            if item.outcome == APPENDED:
                chunk.appended += rows
            else:
                chunk.dead += rows
            self._settled(chunk, rows)

    def _punctuate(self, *, bye: bool = False) -> None:
        # What waits is cut first. Then the oldest event is known, and it is sent before the promise.
        self._cut_all()
        self._send()
        oldest_ms, now_ms = self._queue.oldest_ms(), self.now_ms()
        self._metrics.set("clock_apart_ms", self._time.apart_ms)
        for partition in range(self._partitions):
            # A promise must not overtake events that the local queue refused.
            if self._queue.is_held_back and not bye:
                return
            oldest = oldest_ms.get(partition)
            promise = self._punctuator.promise(partition, now_ms, oldest, self._counts.declared, bye=bye)
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
                self._queue.receipts.owe(("promise", partition))
            except Overloaded:
                self._punctuator.refused(partition)

    def _promised(self, partition: int, _error: Exception | None, _offset: int) -> None:
        self._queue.receipts.came(("promise", partition))
        self._punctuator.confirmed(partition)

    # -- 4. settle

    def _settled(self, chunk: OpenChunk, events: int) -> None:
        """Take `events` outcomes off `chunk`. A chunk that waits for none is acked; its key is remembered."""
        ready = [(chunk, events)]
        while ready:
            one, outcomes = ready.pop()
            one.waiting -= outcomes
            if one.waiting:
                continue
            now_ms = self.now_ms()
            if one.key and self._chunks_open.get(one.key) is one:
                del self._chunks_open[one.key]
                self._chunks_done.add(one.key, now_ms)
            del self._open[one.number]
            self.buffer_bytes -= one.size
            self.open_chunks -= 1
            for acked in one.acks:
                acked(one.outcome())
            ready.extend((follower, 1) for follower in one.followers)
            one.followers = []

    # -- clean shutdown

    def drained(self) -> bool:
        """Cut what waits and say whether every chunk has its receipts; call between ticks until it is true."""
        self._cut_all()
        self._send()
        return self._queue.is_empty

    def goodbye(self) -> None:
        """Queue the last punctuation of this epoch; only after `drained` it says `bye`."""
        self._punctuate(bye=True)
