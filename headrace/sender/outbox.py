"""All that a sender keeps: the lanes in memory, the spool that mirrors them on disk, and the file of rejects.

Not thread-safe: the sender's lock is held around every call. The time comes in.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from headrace.contract.errors import Overloaded
from headrace.sender.lanes import Chunk, Lane, Lanes
from headrace.sender.rejects import Rejects
from headrace.sender.segment import Segment
from headrace.sender.spool import Spool, entry_cost

log = logging.getLogger("headrace.sender")

_LANES_KEPT = 64
_ENVELOPE = 128
"""Of a message, without tag and body: some 60 bytes."""


class Outbox:
    """What was taken and has no ack yet."""

    def __init__(
        self, folder: Path, *, window: int, bytes_max: int, chunk_bytes: int, message_max: int, fsync: bool
    ) -> None:
        self.lanes = Lanes(window)
        self.spool = Spool(folder, bytes_max=bytes_max, fsync=fsync)
        self.rejects = Rejects(folder / "rejects.ndjson")
        self.message_max = message_max
        """Largest message that the gateway takes, as far as it is known."""
        self.unacked = 0
        """Events."""
        self.failure: Overloaded | None = None
        """Why chunks that are too large could not be cut."""
        self._chunk_bytes = chunk_bytes
        self._lost: set[Segment] = set()
        """What was written anew elsewhere."""
        self.requeue(self.spool.recover())

    def body_max(self, tag: str) -> int:
        """Return the largest body of a chunk of this tag."""
        return self.message_max - 4 * len(tag) - _ENVELOPE

    def add(self, tag: str, entry: bytes, now_s: float) -> bool:
        """Append an event to the spool and to its tag's chunk; return whether the thread has something new to do.

        Raises `Overloaded` where the spool or the disk is full; nothing was taken then.
        """
        lane = self.lanes.of(tag)
        size = entry_cost(tag) + len(entry)
        if not self.spool.fits(size, lane.bytes):
            raise Overloaded(
                f"{self.unacked} events wait in a spool of {self.spool.bytes} bytes, bound {self.spool.bytes_max}; "
                f"{lane.bytes} bytes are of tag {tag}. Is the gateway up, and does it take this tag? Offer the event "
                "again later, or raise spool_bytes_max."
            )
        if lane.open is not None and lane.open.size + len(entry) > self.body_max(tag):
            self._close_chunk(lane)
        is_new = lane.open is None
        chunk = lane.open or Chunk(tag, self._segment(lane), now_s)
        self.spool.append_entry(chunk.segment, tag, entry)
        if is_new:
            lane.open = chunk
            chunk.segment.open_chunks += 1
        chunk.add(entry)
        lane.bytes += size
        self.unacked += 1
        if chunk.size >= self._chunk_bytes or self.spool.is_overfull(chunk.segment):
            # Here and not by the thread, which may hang on a gateway that reads nothing: a chunk that went on growing
            # would be more than the gateway takes, for ever.
            with suppress(Overloaded):
                self._close_chunk(lane)
            return True
        return is_new

    def _segment(self, lane: Lane) -> Segment:
        if lane.segment is None:
            lane.segment = self.spool.begin()
        return lane.segment

    def requeue(self, chunks: list[Chunk]) -> None:
        """Take what an earlier process left without an ack."""
        for chunk in chunks:
            self.lanes.ready(chunk)
            self.lanes.of(chunk.tag).bytes += _cost(chunk)
            self.unacked += len(chunk.body)
        self.cut_large()

    def close_chunks(self, now_s: float, flush_s: float, *, away: bool) -> None:
        """Close chunks that are due and note their ids. A tag that may not send goes on with its chunk while it can."""
        is_taken = self.lanes.turn_is_taken()
        for lane in self.lanes:
            if lane.open is None:
                continue
            may_send = not away and self.lanes.may_send(lane, now_s, turn_is_taken=is_taken)
            is_due = may_send and now_s - lane.open.since_s >= flush_s
            if is_due or lane.open.size >= self._chunk_bytes:
                self._close_chunk(lane)

    def _close_chunk(self, lane: Lane) -> None:
        if (chunk := lane.open) is None:
            return
        try:
            self.spool.note_chunk(chunk)
        except Overloaded:
            # A full disk must not hold back what was taken: an id that a start after a crash would give it needs no
            # note, so long as nothing is appended behind it.
            chunk.id = chunk.unnoted_id()
            lane.segment = None
        lane.open = None
        self.lanes.ready(chunk)
        if self.spool.is_full(chunk.segment):
            lane.segment = None

    def keep_on_disk(self) -> None:
        """Write anew what somebody removed from the spool's folder, and what the disk failed to write.

        Raises `Overloaded`; the next call goes on then.
        """
        self.spool.keep_slot()
        for lane in self.lanes:
            open_chunks = [lane.open] if lane.open is not None else []
            chunks = (*lane.sent.values(), *lane.ready, *open_chunks)
            kept = {chunk.segment: chunk.segment.is_sound and chunk.segment.is_there() for chunk in chunks}
            lost = [chunk for chunk in chunks if not kept[chunk.segment]]
            for chunk in lost:
                self._write_anew(lane, chunk)
            if lane.segment is not None and not (lane.segment.is_sound and lane.segment.is_there()):
                self._lost.add(lane.segment)
                lane.segment = None
            if lost:
                events = sum(len(chunk.body) for chunk in lost)
                log.error(
                    "%d events of tag %s that have no ack were removed by somebody, or the disk failed; written anew",
                    *(events, lane.tag),
                )
        # Last: a file may hold chunks of several tags, and is there until all of them lie elsewhere.
        while self._lost:
            self.spool.remove(self._lost.pop())

    def _write_anew(self, lane: Lane, chunk: Chunk) -> None:
        lost, chunk.segment = chunk.segment, self.spool.begin()
        try:
            self._write(chunk, is_closed=chunk is not lane.open)
            self.spool.put_on_disk(chunk.segment)
        except Overloaded:
            self.spool.remove(chunk.segment)
            chunk.segment = lost
            raise
        self._lost.add(lost)
        if chunk is lane.open:
            lane.segment = chunk.segment

    def close(self) -> None:
        """Close the spool; what has no ack stays in it."""
        if not self.unacked:
            for lane in self.lanes:
                if lane.segment is not None:
                    self.spool.remove(lane.segment)
        self.spool.close()

    def acked(self, name: str) -> None:
        """Be done with the chunk of this id."""
        if (chunk := self.lanes.acked(name)) is not None:
            self._settle(self.lanes.of(chunk.tag), chunk)

    def _settle(self, lane: Lane, chunk: Chunk) -> None:
        """Be done with a chunk: its events are at the gateway, or in the file of rejects."""
        segment = chunk.segment
        self.spool.note_ack(chunk)
        lane.bytes -= _cost(chunk)
        self.unacked -= len(chunk.body)
        if not segment.open_chunks:
            if segment is not lane.segment:
                self.spool.remove(segment)
            elif self.spool.is_spent(segment) or (lane.is_empty and len(self.lanes) > _LANES_KEPT):
                self.spool.remove(segment)
                lane.segment = None
        if lane.is_empty and lane.segment is None:
            self.lanes.drop(lane)

    # -- what the gateway refuses for good

    def cut_large(self) -> None:
        """Cut chunks that are larger than the gateway takes, and put events that alone are into the file of rejects."""
        for lane in self.lanes:
            most = self.body_max(lane.tag)
            for chunk in [chunk for chunk in lane.ready if chunk.size > most]:
                try:
                    self._cut(lane, chunk, most)
                except Overloaded as error:
                    self.failure = error
                    log.error("%s", error)

    def _cut(self, lane: Lane, chunk: Chunk, most: int) -> None:
        known = {other.id for other in (*lane.ready, *lane.sent.values())}
        segment = self.spool.begin()
        # Those that are known were written by a cut that a crash ended.
        parts = [part for part in _parts(chunk, segment, most) if part.id not in known]
        try:
            for part in parts:
                self._write(part)
            self.spool.put_on_disk(segment)  # Before what they were cut from is removed.
            # Last, since it cannot be taken back: each event has one line, however many tries the cut takes.
            self._reject(chunk, most)
        except Overloaded:
            self.spool.remove(segment)
            raise
        if not parts:
            self.spool.remove(segment)
        place = lane.ready.index(chunk)
        lane.ready.remove(chunk)
        for at, part in enumerate(parts):
            lane.ready.insert(place + at, part)
            lane.bytes += _cost(part)
            self.unacked += len(part.body)
        self._settle(lane, chunk)

    def _write(self, part: Chunk, *, is_closed: bool = True) -> None:
        for entry in part.body:
            self.spool.append_entry(part.segment, part.tag, entry)
        if is_closed:
            self.spool.note_chunk(part)
        part.segment.open_chunks += 1

    def _reject(self, chunk: Chunk, most: int) -> None:
        large = [entry for entry in chunk.body if len(entry) > most]
        if large:
            self.rejects.add(chunk.tag, large, f"larger than the {most} bytes that the gateway takes")
            log.error(
                "%d events of tag %s are larger than the gateway takes (%d bytes); they are in %s",
                *(len(large), chunk.tag, most, self.rejects.path),
            )


def _parts(chunk: Chunk, segment: Segment, most: int) -> list[Chunk]:
    """Return chunks of at most `most` bytes with the events of this one, but for those that alone are larger."""
    parts: list[Chunk] = []
    firsts: list[int] = []
    for at, entry in enumerate(chunk.body):
        if len(entry) > most:
            continue
        if not parts or parts[-1].size + len(entry) > most:
            parts.append(Chunk(chunk.tag, segment, 0.0))
            firsts.append(at)
        parts[-1].add(entry)
    for first, part in zip(firsts, parts, strict=True):
        # Made of what is cut, of where, and of the content: should the cut be made again after a crash, the gateway
        # knows the parts, and equal parts are not taken for one.
        part.id, part.number = part.content_id(f"{chunk.id}/{first}"), chunk.number
    return parts


def _cost(chunk: Chunk) -> int:
    """Return what a chunk's events take in the spool."""
    return chunk.size + len(chunk.body) * entry_cost(chunk.tag)
