"""A lane for each tag: which chunk may go next, and which tag has to wait. Pure: the time comes in.

1. A tag has at most `window` chunks on their way. Of all chunks that may go, the oldest goes first.
2. When a connection ends, a tag that got no ack on it is *held*: one chunk at a time, until one is acked. A gateway
   that leaves a tag unacked (the ceiling of dead letters) closes the connection 2 s later, whoever else is on it.
3. Where the gateway acked others meanwhile, the held tag also waits, longer each time: it must not end the others'
   connection again and again.
4. Where it acked nobody on two connections, held tags take turns, one chunk of one tag at a time: a chunk that makes
   the gateway close at once would be first on every connection, and the others would never be read.
5. A chunk that saw `_SUSPECT` connections end goes behind the others of its tag: one that nobody can take stops none.
"""

from __future__ import annotations

import base64
import os
from collections import deque
from collections.abc import Iterator

import xxhash

from headrace.sender.segment import Segment

_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.5, 5.0
_SUSPECT = 3
_FRUITLESS = 2


class Chunk:
    """Events of one tag that travel and are acked together."""

    __slots__ = ("body", "ends", "id", "number", "segment", "sent_s", "since_s", "size", "tag")

    def __init__(self, tag: str, segment: Segment, since_s: float) -> None:
        self.tag, self.segment, self.since_s = tag, segment, since_s
        self.id = base64.b64encode(os.urandom(16)).decode()
        self.body: list[bytes] = []
        """The entries, as MessagePack."""
        self.size = 0
        self.number = 0
        """Its place among all chunks, by age."""
        self.sent_s = 0.0
        self.ends = 0
        """Connections that ended while it was on its way."""

    def add(self, entry: bytes) -> None:
        """Add an event."""
        self.body.append(entry)
        self.size += len(entry)

    def content_id(self, place: str = "") -> str:
        """Return an id that is the same whenever it is made of this content at this place.

        Events without ids may be equal byte for byte: without a place, two chunks of such events have one id.
        """
        salt = b"\0" + place.encode() if place else b""
        data = xxhash.xxh3_128(self.tag.encode() + salt + b"\0" + b"".join(self.body)).digest()
        return base64.b64encode(data).decode()

    def unnoted_id(self) -> str:
        """Return the id that a start after a crash gives to these events, where none was noted.

        Its place is the file's inode, which a move into another slot keeps: two processes that were killed may leave
        the same bytes.
        """
        return self.content_id(f"inode {self.segment.inode}")


class Lane:
    """The chunks of one tag."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.open: Chunk | None = None
        """The chunk that events join."""
        self.segment: Segment | None = None
        """Where they are appended."""
        self.ready: deque[Chunk] = deque()
        self.sent: dict[str, Chunk] = {}
        self.bytes = 0
        """Of all its events without an ack."""
        self.is_held = False
        self.not_before_s = 0.0
        self.was_acked = False
        """On this connection."""
        self.tried = 0
        """When it last had its turn."""
        self._backoff_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no event."""
        return self.open is None and not self.ready and not self.sent

    def acked(self) -> None:
        """Note that the gateway takes this tag."""
        self.is_held, self.not_before_s, self.was_acked, self._backoff_s = False, 0.0, True, 0.0

    def ended(self, now_s: float, *, others_acked: bool) -> None:
        """Take back what was on its way when the connection ended."""
        if self.sent and not self.was_acked:
            if self.is_held and others_acked:
                self._backoff_s = min(_BACKOFF_MAX_S, max(_BACKOFF_FIRST_S, 2 * self._backoff_s))
                self.not_before_s = now_s + self._backoff_s
            self.is_held = True
        back = sorted(self.sent.values(), key=lambda chunk: chunk.number)
        for chunk in back:
            chunk.ends += 1
        self.ready.extendleft(reversed([chunk for chunk in back if chunk.ends < _SUSPECT]))
        self.ready.extend(chunk for chunk in back if chunk.ends >= _SUSPECT)
        self.sent.clear()
        self.was_acked = False


class Lanes:
    """All tags' lanes."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._lanes: dict[str, Lane] = {}
        self._numbers = self._turns = 0
        self._fruitless = 0
        """Connections in a row on which something was sent and nothing acked."""

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def __len__(self) -> int:
        return len(self._lanes)

    def of(self, tag: str) -> Lane:
        """Return a tag's lane, a new one where it has none."""
        lane = self._lanes.get(tag)
        if lane is None:
            lane = self._lanes[tag] = Lane(tag)
        return lane

    def drop(self, lane: Lane) -> None:
        """Forget an empty lane."""
        del self._lanes[lane.tag]

    def ready(self, chunk: Chunk) -> None:
        """Let a closed chunk go when it is its turn."""
        self._numbers += 1
        chunk.number = self._numbers
        self.of(chunk.tag).ready.append(chunk)

    def turn_is_taken(self) -> bool:
        """Say whether held tags take turns, and one of them has its turn."""
        return self._fruitless >= _FRUITLESS and any(lane.is_held and lane.sent for lane in self._lanes.values())

    def may_send(self, lane: Lane, now_s: float, *, turn_is_taken: bool) -> bool:
        """Say whether a further chunk of this tag may be on its way.

        `turn_is_taken` is asked once for all tags: a question for each would cost the square of their number.
        """
        if not lane.is_held:
            return len(lane.sent) < self._window
        return not turn_is_taken and not lane.sent and now_s >= lane.not_before_s

    def take(self, now_s: float) -> Chunk | None:
        """Return the chunk that goes next, which is on its way then; None where nothing may go."""
        # One chunk at a time under one id: an ack could not say which of two it means. (Older trees wrote a part anew
        # at each try of a cut on a full disk.)
        is_taken = self.turn_is_taken()
        able = [
            lane
            for lane in self._lanes.values()
            if lane.ready and lane.ready[0].id not in lane.sent and self.may_send(lane, now_s, turn_is_taken=is_taken)
        ]
        if not able:
            return None
        takes_turns = self._fruitless >= _FRUITLESS
        lane = min(able, key=lambda lane: (lane.is_held and takes_turns and lane.tried, lane.ready[0].number))
        self._turns += 1
        lane.tried = self._turns
        chunk = lane.ready.popleft()
        chunk.sent_s = now_s
        lane.sent[chunk.id] = chunk
        return chunk

    def acked(self, name: str) -> Chunk | None:
        """Return the chunk of this id, which the gateway has; None where none is on its way."""
        for lane in self._lanes.values():
            if (chunk := lane.sent.pop(name, None)) is not None:
                lane.acked()
                self._fruitless = 0
                return chunk
        return None

    def ended(self, now_s: float) -> None:
        """Take back what was on its way: the connection has ended."""
        others_acked = any(lane.was_acked for lane in self._lanes.values())
        if not others_acked and any(lane.sent for lane in self._lanes.values()):
            self._fruitless += 1
        for lane in self._lanes.values():
            lane.ended(now_s, others_acked=others_acked)

    def oldest_sent_s(self) -> float | None:
        """Return when the chunk was sent that has waited longest for its ack."""
        # The first of each lane, which were sent in this order.
        firsts = (next(iter(lane.sent.values())) for lane in self._lanes.values() if lane.sent)
        return min((chunk.sent_s for chunk in firsts), default=None)

    def next_s(self, now_s: float, flush_s: float) -> float | None:
        """Return when something is due: a chunk to be closed, or a held tag's next try."""
        is_taken = self.turn_is_taken()
        times = [lane.not_before_s for lane in self._lanes.values() if lane.ready and lane.not_before_s > now_s]
        times += [
            lane.open.since_s + flush_s
            for lane in self._lanes.values()
            if lane.open is not None and self.may_send(lane, now_s, turn_is_taken=is_taken)
        ]
        return min(times, default=None)
