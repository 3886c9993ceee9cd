"""The spool on disk: slots of a folder, and the segments in this process's own.

A slot belongs to the process that holds the lock of its file `lock`; the kernel frees it when the process ends, however
it ends. What lies in a free slot is adopted: its files are moved into the adopter's slot, then read.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack

from headrace.contract.errors import Overloaded, disk_remedy
from headrace.sender.lanes import Chunk
from headrace.sender.rejects import sync_folder
from headrace.sender.segment import ACK, CHUNK, ENTRY, HEAD, Segment, is_damage

log = logging.getLogger("headrace.sender")

_SLOTS = 1_024
_SEGMENT_MAX = 1_048_576
"""A segment ends at 1 MiB: small enough to be removed soon, large enough to be made seldom."""
_KEPT = 65_536
"""A segment without an open chunk is used further up to this size: a file for each chunk would be many."""
_OPEN_FILES = 32
"""Segments with an open descriptor; a service with more tags at once opens some anew."""

Records = list[tuple[int, bytes]]
Contents = list[tuple[Segment, Records]]


class Spool:
    """One process's slot. Not thread-safe: the sender's lock is held, but in `adopt`."""

    def __init__(self, folder: Path, *, bytes_max: int, fsync: bool) -> None:
        self.folder, self.bytes_max, self._fsync = folder, bytes_max, fsync
        self._slot, self._slot_fd = _take_slot(folder)
        if fsync:
            # A file is on the disk once all folders above it are: the spool's own may be new, too.
            for each in (self._slot, *self._slot.parents):
                with suppress(PermissionError):
                    sync_folder(each)
        self._numbers = _numbers(self._slot)
        self._open: dict[Segment, None] = {}
        self._unsound: set[Segment] = set()
        self._left: set[Segment] = set()
        """Removed ones that the disk has kept so far: it is read-only."""
        self._segment_max = max(4_096, min(_SEGMENT_MAX, bytes_max // 64))
        self.bytes = 0
        """On disk."""

    def fits(self, size: int, lane_bytes: int) -> bool:
        """Say whether a tag that holds `lane_bytes` may add a record of `size` bytes.

        It may have three times what is free: three quarters of the spool where it is alone. N such tags leave 1/(1+3N)
        free, so a tag that the gateway does not take never shuts out the others.

        Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998.
        """
        free = self.bytes_max - self.bytes
        return size <= free and lane_bytes + size <= 3 * free

    def event_bytes_max(self) -> int:
        """Return the size of the largest event that an empty spool takes."""
        return max(0, self.bytes_max * 3 // 4 - 1_024)

    def begin(self) -> Segment:
        """Return a new segment. Raises `Overloaded` where none can be made."""
        segment = Segment(self._next_path())
        if self._fsync:
            try:
                segment.path.touch(0o600)
                segment = Segment(segment.path)
                sync_folder(self._slot)
            except OSError as error:
                told = f"the spool {self._slot} takes no new file: {error}; {disk_remedy(error)}."
                raise Overloaded(told) from error
        return segment

    def _next_path(self) -> Path:
        return self._slot / f"{next(self._numbers):012d}.seg"

    def append(self, segment: Segment, kind: int, payload: bytes) -> None:
        """Append a record. Raises `Overloaded` when the disk is full; nothing was written then."""
        if segment not in self._open:
            self._open[segment] = None
            if len(self._open) > _OPEN_FILES:
                oldest = next(iter(self._open))
                del self._open[oldest]
                oldest.close(sync=self._fsync)
                self._look(oldest)
        try:
            self.bytes += segment.append(kind, payload)
        finally:
            self._look(segment)

    def _look(self, segment: Segment) -> None:
        if not segment.is_sound:
            self._unsound.add(segment)

    @property
    def is_sound(self) -> bool:
        """Whether nothing of it has to be written anew because the disk failed."""
        return not self._unsound

    def append_entry(self, segment: Segment, tag: str, entry: bytes) -> None:
        """Append an event."""
        name = tag.encode()
        self.append(segment, ENTRY, len(name).to_bytes(2, "little") + name + entry)

    def note_chunk(self, chunk: Chunk) -> None:
        """Note which id the events before it have: a chunk sent under an id that nobody remembers would count twice."""
        self.append(chunk.segment, CHUNK, msgpack.packb([chunk.tag, chunk.id]))

    def note_ack(self, chunk: Chunk) -> None:
        """Note that nothing of this chunk is to be sent any more."""
        chunk.segment.open_chunks -= 1
        # A spool that cannot note the ack sends the chunk once more after a restart; the gateway knows it then.
        with suppress(Overloaded):
            self.append(chunk.segment, ACK, chunk.id.encode())

    def is_full(self, segment: Segment) -> bool:
        """Say whether no further chunk should begin in it."""
        return segment.size >= self._segment_max

    def is_overfull(self, segment: Segment) -> bool:
        """Say whether its open chunk should be closed although it is small."""
        return segment.size >= 2 * self._segment_max

    def is_spent(self, segment: Segment) -> bool:
        """Say whether a segment in use, whose chunks are all acked, is better removed than used further."""
        return segment.size >= min(_KEPT, self._segment_max)

    def remove(self, segment: Segment) -> None:
        """Delete a segment; where the disk refuses, once it does not."""
        self._open.pop(segment, None)
        self._unsound.discard(segment)
        try:
            self.bytes -= segment.remove()
            self._left.discard(segment)
        except OSError as error:
            if segment not in self._left:
                log.error("%s is done with and cannot be deleted: %s; %s", segment.path, error, disk_remedy(error))
            self._left.add(segment)

    def put_on_disk(self, segment: Segment) -> None:
        """Put on the disk what was appended to a segment. Raises `Overloaded` where that fails."""
        try:
            self.sync(self.duplicates({segment}) if segment.size else {})
        except OSError as error:
            told = f"the spool {self._slot} is not put on the disk: {error}; {disk_remedy(error)}."
            raise Overloaded(told) from error

    def duplicates(self, segments: set[Segment]) -> dict[Segment, int]:
        """Return descriptors for `sync`, which may be called without the lock."""
        return {segment: segment.duplicate() for segment in segments} if self._fsync else {}

    def sync(self, descriptors: dict[Segment, int]) -> None:
        """Put on the disk what was written to these, and close them. Raises `OSError`; what failed is unsound then."""
        failure: OSError | None = None
        for segment, fd in descriptors.items():
            try:
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                segment.is_sound, failure = False, error
                self._look(segment)
        if failure is not None:
            raise failure

    def keep_slot(self) -> None:
        """Hold a slot that nobody removed: this one again, or another one. Raises `Overloaded` where none is to be had.

        What lay in it is another matter: `Segment.is_there`.
        """
        for segment in list(self._left):
            self.remove(segment)
        if _is_lock(self._slot, self._slot_fd):
            return
        try:
            self._slot.mkdir(parents=True, exist_ok=True)
            slot, fd = self._slot, _lock(self._slot)
            if fd < 0:
                slot, fd = _take_slot(self.folder)
            numbers = _numbers(slot)
        except OSError as error:
            told = f"the spool {self.folder} was removed and cannot be made anew: {error}; {disk_remedy(error)}."
            raise Overloaded(told) from error
        log.error("somebody removed %s while it was in use; its events go on in %s", self._slot / "lock", slot)
        os.close(self._slot_fd)
        self._slot, self._slot_fd, self._numbers = slot, fd, numbers

    def close(self) -> None:
        """Close all files and free the slot."""
        for segment in list(self._open):
            segment.close()
        os.close(self._slot_fd)

    def forsake(self) -> None:
        """Close the descriptors that this process got by a fork; the slot stays its parent's."""
        for segment in self._open:
            segment.close()
        os.close(self._slot_fd)

    # -- what others left

    def recover(self) -> list[Chunk]:
        """Return what this slot holds without an ack, oldest first. Once, before anything is appended."""
        return self.read([Segment(path) for path in _segments(self._slot)])

    def adopt(self) -> tuple[list[Segment], OSError | None]:
        """Move the segments of all free slots here and return them, for `load`; and why a slot could not be had."""
        found: list[Segment] = []
        failure = None
        for slot in sorted(self.folder.glob("slot-*")):
            try:
                if slot == self._slot or not _segments(slot) or (fd := _lock(slot)) < 0:
                    continue
                try:
                    for path in _segments(slot):
                        found.append(Segment(path.rename(self._next_path())))
                finally:
                    os.close(fd)
            except OSError as error:
                failure = error
        return found, failure

    def read(self, segments: list[Segment]) -> list[Chunk]:
        """Return the chunks in these segments that have no ack."""
        contents = self.load(segments)
        acked = acks_of(contents)
        return [chunk for segment, records in contents for chunk in self.chunks(segment, records, acked)]

    def load(self, segments: list[Segment]) -> Contents:
        """Return the records of these segments, for `chunks`. Without the lock. What cannot be read stays on disk."""
        contents = []
        for segment in segments:
            try:
                contents.append((segment, self._contents(segment)))
            except OSError as error:
                log.error("%s cannot be read: %s; it stays, and the next start tries it again", segment.path, error)
        return contents

    def chunks(self, segment: Segment, records: Records, acked: set[bytes]) -> list[Chunk]:
        """Return the chunks of a segment that are not `acked`; events whose chunk was not closed become a new one.

        `acked` has the acks of all segments that were loaded with it.
        """
        self.bytes += segment.size
        own = {payload for kind, payload in records if kind == ACK}
        closed, loose = _chunks(segment, records)
        for chunk in loose:
            _name_loose(chunk, own)
            # Where it cannot be noted, it is made again of the same after the next crash.
            with suppress(Overloaded):
                self.note_chunk(chunk)
        chunks: list[Chunk] = []
        for chunk in closed + loose:
            segment.open_chunks += 1
            if chunk.id.encode() not in acked:
                chunks.append(chunk)
            elif chunk.id.encode() in own:
                segment.open_chunks -= 1
            else:
                self.note_ack(chunk)
        if not segment.open_chunks:
            self.remove(segment)
        return chunks

    def _contents(self, segment: Segment) -> Records:
        records, rest = segment.read()
        if is_damage(rest):
            kept = self.folder / f"{self._slot.name}-{segment.path.stem}.damaged"
            # Before the segment loses them.
            with kept.open("wb") as file:
                file.write(rest)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.folder)
            log.error("%s is damaged; %d bytes of it cannot be read and are kept in %s", segment.path, len(rest), kept)
        if rest:
            segment.end_before(rest)
        return records


def entry_cost(tag: str) -> int:
    """Return what an event of this tag takes beside its entry."""
    return HEAD.size + 2 + len(tag.encode())


def acks_of(contents: Contents) -> set[bytes]:
    """Return the ids that have an ack in any of them: older trees wrote acks into the newest file."""
    return {payload for _, records in contents for kind, payload in records if kind == ACK}


def _chunks(segment: Segment, records: list[tuple[int, bytes]]) -> tuple[list[Chunk], list[Chunk]]:
    """Return the chunks whose ids were noted, and those without an id, of events whose chunk was not closed."""
    closed: list[Chunk] = []
    loose: dict[str, Chunk] = {}
    times: Counter[str] = Counter()
    for kind, payload in records:
        if kind == ENTRY:
            end = 2 + int.from_bytes(payload[:2], "little")
            tag = payload[2:end].decode()
            loose.setdefault(tag, Chunk(tag, segment, 0.0)).add(payload[end:])
        elif kind == CHUNK:
            tag, name = msgpack.unpackb(payload)
            if (chunk := loose.pop(tag, None)) is not None:
                # Older trees gave equal parts of a chunk one id and noted one ack, whichever of them the gateway has:
                # it is taken for the first. Rather twice than never.
                chunk.id = chunk.content_id(f"{name}/{times[name]}") if times[name] else name
                times[name] += 1
                closed.append(chunk)
    return closed, list(loose.values())


def _name_loose(chunk: Chunk, acked: set[bytes]) -> None:
    """Give an id to a chunk that has none, the same after each crash; one of the content alone is of an older tree."""
    chunk.id = chunk.content_id()
    if chunk.id.encode() not in acked:
        chunk.id = chunk.unnoted_id()


def _segments(slot: Path) -> list[Path]:
    return sorted(path for path in slot.glob("*.seg") if path.stem.isdecimal())


def _numbers(slot: Path) -> Iterator[int]:
    return itertools.count(1 + max((int(path.stem) for path in _segments(slot)), default=0))


def _is_lock(slot: Path, fd: int) -> bool:
    """Say whether the slot's lock is the file that this descriptor holds, and not one that was made after it."""
    try:
        return os.path.samestat(os.stat(slot / "lock"), os.fstat(fd))
    except OSError:
        return False


def _lock(slot: Path) -> int:
    """Return a descriptor that holds the slot, or -1 where a living process does."""
    fd = os.open(slot / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _take_slot(folder: Path) -> tuple[Path, int]:
    """Return the first slot of `folder` that no living process holds, and its lock."""
    for number in range(_SLOTS):
        slot = folder / f"slot-{number:02d}"
        slot.mkdir(parents=True, exist_ok=True)
        if (fd := _lock(slot)) >= 0:
            return slot, fd
    raise Overloaded(f"all {_SLOTS} slots of the spool {folder} are held by living processes; name another folder.")
