"""What a web service imports: fluent-logger's sender that loses nothing. Chunks with acks, kept on disk until acked.

    sender = Sender("shop", port=24224, spool_dir="/var/spool/shop")
    sender.emit("impression", {"event_id": ..., "request_id": ..., "user_id": ...})

1. `emit` appends the event to the spool and returns: from here on a kill -9 of the process loses nothing. (It is in
   the kernel's cache; `fsync=True` puts each chunk on the disk before it is sent, for machines that lose power.)
2. A background thread closes a chunk every `flush_ms`, notes its id in the spool, and sends it; up to `window` chunks
   are on their way at once.
3. A chunk that is acked is noted, and segments of the spool whose chunks are all acked are removed, oldest first.
4. After a lost connection or a restart everything without an ack is sent again under the *same* chunk ids, so that the
   gateway counts it once.

Make one after forking; several processes may name the same `spool_dir`, each takes a slot of it and adopts what dead
processes left.
"""

from __future__ import annotations

import base64
import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import xxhash
from fluent.sender import EventTime, FluentSender

from headrace.contract.errors import Overloaded, Unavailable

log = logging.getLogger("headrace.sender")

_HEAD = struct.Struct("<IIB")
_TIME = struct.Struct(">II")
_ENTRY, _CHUNK, _ACK = 1, 2, 3
_SLOTS = 64
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 2.0
_SEGMENT_MAX = 4_194_304
"""A segment ends at 4 MiB: small enough to be removed soon, large enough to be made seldom."""


class _Segment:
    """One append-only file: [length, CRC-32, kind] and payload, again and again. A torn tail is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        self.open_chunks = 0
        self._fd = -1

    def append(self, kind: int, payload: bytes) -> None:
        """Write one record whole, or raise `Overloaded` and leave the file as it was."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        data = _HEAD.pack(len(payload), zlib.crc32(payload), kind) + payload
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(28, "a short write: the disk is full")
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise Overloaded(f"the spool {self.path.parent} takes no more: {error}; free the disk.") from error
        self.size += len(data)

    def sync(self) -> None:
        """Put what was written on the disk."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yield (kind, payload) up to the end or the first torn record."""
        data = self.path.read_bytes()
        at = 0
        while at + _HEAD.size <= len(data):
            length, crc, kind = _HEAD.unpack_from(data, at)
            payload = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(payload) != length or zlib.crc32(payload) != crc:
                return
            at += _HEAD.size + length
            yield kind, payload


class _Chunk:
    """Events of one tag that travel and are acked together."""

    __slots__ = ("body", "count", "id", "segment", "since_s", "size", "tag")

    def __init__(self, tag: str, segment: _Segment, since_s: float) -> None:
        self.tag, self.segment, self.since_s = tag, segment, since_s
        self.id = base64.b64encode(os.urandom(16)).decode()
        self.body: list[bytes] = []
        self.count = 0
        self.size = 0

    def add(self, entry: bytes) -> None:
        self.body.append(entry)
        self.count += 1
        self.size += len(entry)

    def message(self) -> bytes:
        """Return the PackedForward message."""
        option = {"chunk": self.id, "size": self.count}
        return bytes(msgpack.packb([self.tag, b"".join(self.body), option], use_bin_type=True))


class Sender(FluentSender):  # type: ignore[misc]
    """fluent-logger's interface (`emit`, `emit_with_time`, `close`) with acks and a spool.

    Args:
        flush_ms: longest time that an event waits for others to join its chunk.
        chunk_bytes: a chunk is closed at this size; while the gateway is away, chunks grow to it.
        window: most chunks on their way without an ack.
        spool_bytes_max: bound of the spool on disk, and so of the memory that mirrors it; beyond it `emit` raises.
        block_s: longest that `emit` waits for the lock.
        ack_timeout_s: without any ack for so long, the connection is given up and its chunks are sent again.
    """

    def __init__(
        self,
        tag_prefix: str,
        host: str = "127.0.0.1",
        port: int = 24224,
        *,
        spool_dir: str | os.PathLike[str],
        flush_ms: int = 10,
        chunk_bytes: int = 524_288,
        window: int = 64,
        spool_bytes_max: int = 67_108_864,
        block_s: float = 1.0,
        ack_timeout_s: float = 60.0,
        fsync: bool = False,
        timeout: float = 3.0,
    ) -> None:
        super().__init__(tag_prefix, host, port, timeout=timeout, nanosecond_precision=True, forward_packet_error=False)
        self._flush_s = flush_ms / 1000
        self._chunk_bytes, self._window, self._fsync = chunk_bytes, window, fsync
        self._spool_max, self._block_s, self._ack_timeout_s = spool_bytes_max, block_s, ack_timeout_s
        self._segment_max = max(4_096, min(_SEGMENT_MAX, spool_bytes_max // 8))
        self._lock = threading.Condition(threading.Lock())
        self._open: dict[str, _Chunk] = {}
        self._ready: deque[_Chunk] = deque()
        self._sent: dict[str, _Chunk] = {}
        self._unacked = 0
        self._stop = False
        self._retry_s = _RETRY_FIRST_S
        self._slot, self._slot_fd = _take_slot(Path(spool_dir))
        self._segments = self._recover()
        self._spool_bytes = sum(s.size for s in self._segments)
        self._begin_segment()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        os.set_blocking(self._wake_r, False)
        self._thread = threading.Thread(target=self._work, name="headrace-sender", daemon=True)
        self._thread.start()

    # -- the caller's side

    @property
    def unacked(self) -> int:
        """Events that the gateway has not acked yet."""
        return self._unacked

    @property
    def spool_bytes(self) -> int:
        """Bytes that the spool takes on disk."""
        return self._spool_bytes

    def emit(self, label: str | None, data: dict[str, Any]) -> bool:
        """Keep one event until the gateway has it; its time is now.

        Raises `Overloaded` when the spool is full (nothing was taken), `TypeError` on what msgpack cannot write,
        `Unavailable` in a process that was forked after the sender was made.
        """
        return self._keep(label, time.time_ns(), data)

    def emit_with_time(self, label: str | None, timestamp: float | EventTime, data: dict[str, Any]) -> bool:
        """Like `emit`, at a time in seconds or an `EventTime`."""
        if isinstance(timestamp, EventTime):
            seconds, nanos = _TIME.unpack(timestamp.data)
            return self._keep(label, seconds * 10**9 + nanos, data)
        return self._keep(label, round(timestamp * 1e9) if isinstance(timestamp, float) else timestamp * 10**9, data)

    def _keep(self, label: str | None, time_ns: int, data: dict[str, Any]) -> bool:
        tag = (f"{self.tag}.{label}" if self.tag else label) if label else self.tag
        entry = b"\x92\xd7\x00" + _TIME.pack(*divmod(time_ns, 10**9)) + msgpack.packb(data)
        name = tag.encode()
        payload = len(name).to_bytes(2, "little") + name + entry
        if not self._lock.acquire(timeout=self._block_s):
            raise Overloaded(f"the spool was busy for {self._block_s} s; offer the event again.")
        try:
            if self._stop:
                return False
            if not self._thread.is_alive():
                raise Unavailable(
                    "this sender sends nothing: its thread is not in this process, or died. Make a Sender in each "
                    "process, after a fork; what is in the spool is sent by the next one that starts."
                )
            if self._spool_bytes + len(payload) + _HEAD.size > self._spool_max:
                raise Overloaded(
                    f"{self._unacked} events wait in a spool of {self._spool_bytes} bytes, bound {self._spool_max}. "
                    "Is the gateway up? Offer the event again later, or raise spool_bytes_max."
                )
            self._append(_ENTRY, payload)
            chunk = self._open.get(tag)
            wake = chunk is None
            if chunk is None:
                chunk = self._open[tag] = _Chunk(tag, self._segments[-1], time.monotonic())
                self._segments[-1].open_chunks += 1
            chunk.add(entry)
            self._unacked += 1
            if chunk.size >= self._chunk_bytes:
                # Here and not by the thread, which may hang on a gateway that reads nothing: a chunk that went on
                # growing would be more than the gateway takes, for ever.
                wake = True
                with suppress(Overloaded):
                    self._close_chunk(tag)
        finally:
            self._lock.release()
        if wake:
            self._wake()
        return True

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything is acked; say whether that came in time."""
        with self._lock:
            return self._lock.wait_for(lambda: self._unacked == 0, timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Flush, then stop. What has no ack by then stays in the spool for the next sender."""
        if self._stop:
            return
        self.flush(timeout)
        with self._lock:
            self._stop = True
        self._wake()
        self._thread.join(timeout=self.timeout + 2)
        with self._lock:
            for segment in self._segments:
                segment.close()
                if self._unacked == 0:
                    segment.path.unlink(missing_ok=True)
        for fd in (self._wake_r, self._wake_w, self._slot_fd):
            os.close(fd)

    # -- the spool

    def _append(self, kind: int, payload: bytes) -> None:
        self._segments[-1].append(kind, payload)
        self._spool_bytes += _HEAD.size + len(payload)

    def _begin_segment(self) -> None:
        number = int(self._segments[-1].path.stem) + 1 if self._segments else 1
        self._segments.append(_Segment(self._slot / f"{number:012d}.seg"))

    def _recover(self) -> list[_Segment]:
        """Read what was left without an ack; events whose chunk had not been closed become a new one."""
        segments = [_Segment(path) for path in sorted(self._slot.glob("*.seg"))]
        acked = {bytes(p) for s in segments for kind, p in s.read() if kind == _ACK}
        for segment in segments:
            loose: dict[str, _Chunk] = {}
            for kind, payload in segment.read():
                if kind == _ENTRY:
                    end = 2 + int.from_bytes(payload[:2], "little")
                    tag = payload[2:end].decode()
                    loose.setdefault(tag, _Chunk(tag, segment, 0.0)).add(payload[end:])
                elif kind == _CHUNK:
                    tag, name = msgpack.unpackb(payload)
                    chunk = loose.pop(tag, None)
                    if chunk is not None and name.encode() not in acked:
                        chunk.id = name
                        self._requeue(chunk)
            for chunk in loose.values():
                # Its id was never noted; one made of its content is the same after the next crash too.
                chunk.id = _content_id(chunk)
                if chunk.id.encode() not in acked:
                    self._requeue(chunk)
        return segments

    def _requeue(self, chunk: _Chunk) -> None:
        chunk.segment.open_chunks += 1
        self._ready.append(chunk)
        self._unacked += chunk.count

    def _close_chunks(self, now_s: float, *, away: bool) -> None:
        """Close chunks that are due and note their ids, in the order in which they were begun. The lock is held."""
        for tag, chunk in list(self._open.items()):
            full = chunk.size >= self._chunk_bytes
            if full or (not away and now_s - chunk.since_s >= self._flush_s):
                self._close_chunk(tag)
        if not self._open and self._segments[-1].size >= self._segment_max:
            self._begin_segment()
        elif self._segments[-1].size >= 2 * self._segment_max:
            for tag in list(self._open):
                self._close_chunk(tag)
            self._begin_segment()

    def _close_chunk(self, tag: str) -> None:
        # Noted first: a chunk that was sent under an id that nobody remembers would count twice.
        self._append(_CHUNK, msgpack.packb([tag, self._open[tag].id]))
        self._ready.append(self._open.pop(tag))

    def _acked(self, name: str) -> None:
        with self._lock:
            chunk = self._sent.pop(name, None)
            if chunk is None:
                return
            # A spool that cannot note the ack sends the chunk once more after a restart; the gateway knows it then.
            with suppress(Overloaded):
                self._append(_ACK, name.encode())
            chunk.segment.open_chunks -= 1
            self._unacked -= chunk.count
            while len(self._segments) > 1 and self._segments[0].open_chunks == 0:
                gone = self._segments.pop(0)
                gone.close()
                gone.path.unlink(missing_ok=True)
                self._spool_bytes -= gone.size
            if self._unacked == 0:
                self._lock.notify_all()

    # -- the background thread

    def _wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_w, b"w")

    def _work(self) -> None:
        while not self._stop:
            try:
                self._reconnect()
                self._converse(self.socket)
            except Exception as error:
                # Whatever it is: a thread that ended would leave the spool to fill. What waits is sent again.
                self.last_error = error
                if not isinstance(error, OSError | ValueError | msgpack.UnpackException):
                    log.exception("the sender begins its connection again")
            self._close()
            with self._lock:
                # On the next connection under the same ids, before anything newer.
                self._ready.extendleft(reversed(self._sent.values()))
                self._sent.clear()
            self._wait_away(self._retry_s)
            self._retry_s = min(_RETRY_MAX_S, self._retry_s * 2)

    def _wait_away(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop and (left := until - time.monotonic()) > 0:
            with self._lock, suppress(Overloaded):
                self._close_chunks(time.monotonic(), away=True)
            time.sleep(min(left, 0.05))

    def _converse(self, sock: socket.socket) -> None:
        """Send chunks and take acks until told to stop. Raises `OSError` when the connection is of no more use."""
        sock.setblocking(False)
        acks = msgpack.Unpacker(max_buffer_size=1_048_576)
        out = memoryview(b"")
        heard_s = time.monotonic()
        while not self._stop:
            if not out:
                out = memoryview(self._next_messages())
            readers: list[Any] = [sock, self._wake_r]
            readable, writable, _ = select.select(readers, [sock] if out else [], [], self._pause_s())
            if self._wake_r in readable:
                os.read(self._wake_r, 4_096)
            if sock in readable:
                data = sock.recv(65_536)
                if not data:
                    raise OSError("the gateway closed the connection")
                acks.feed(data)
                for ack in acks:
                    if isinstance(ack, dict) and isinstance(ack.get("ack"), str):
                        self._acked(ack["ack"])
                heard_s, self._retry_s = time.monotonic(), _RETRY_FIRST_S
            if writable and out:
                out = out[sock.send(out[:262_144]) :]
            if not self._sent:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > self._ack_timeout_s:
                raise OSError(f"no ack for {self._ack_timeout_s} s")

    def _next_messages(self) -> bytes:
        """Return the chunks that may go now, at most about 1 MiB of them."""
        parts: list[bytes] = []
        segments: list[_Segment] = []
        size = 0
        with self._lock:
            with suppress(Overloaded):
                self._close_chunks(time.monotonic(), away=False)
            while self._ready and len(self._sent) < self._window and size < 1_048_576:
                chunk = self._ready.popleft()
                self._sent[chunk.id] = chunk
                if chunk.segment not in segments:
                    segments.append(chunk.segment)
                parts.append(chunk.message())
                size += chunk.size
        if self._fsync:
            for segment in segments:
                segment.sync()
        return b"".join(parts)

    def _pause_s(self) -> float:
        """Return how long the thread may sleep: until the next chunk is due, or until it is woken."""
        with self._lock:
            since = min((chunk.since_s for chunk in self._open.values()), default=None)
            room = len(self._sent) < self._window
        if since is None or not room:
            return 0.5
        return max(0.0, since + self._flush_s - time.monotonic())


def _content_id(chunk: _Chunk) -> str:
    data = xxhash.xxh3_128(chunk.tag.encode() + b"\0" + b"".join(chunk.body)).digest()
    return base64.b64encode(data).decode()


def _take_slot(folder: Path) -> tuple[Path, int]:
    """Return a slot of `folder` that no living process holds, and its lock; adopt the segments of other free slots."""
    mine: tuple[Path, int] | None = None
    for number in range(_SLOTS):
        slot = folder / f"slot-{number:02d}"
        if mine is not None and not slot.is_dir():
            continue
        slot.mkdir(parents=True, exist_ok=True)
        fd = os.open(slot / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            continue
        if mine is None:
            mine = slot, fd
            continue
        first = max((int(p.stem) for p in mine[0].glob("*.seg")), default=0) + 1
        for at, path in enumerate(sorted(slot.glob("*.seg"))):
            path.rename(mine[0] / f"{first + at:012d}.seg")
        os.close(fd)
    if mine is None:
        raise Overloaded(f"all {_SLOTS} slots of the spool {folder} are held by living processes; name another folder.")
    return mine
