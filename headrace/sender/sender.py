"""The sender: `emit` on the caller's side, a thread that speaks with the gateway, and what a fork does to both."""

from __future__ import annotations

import atexit
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgpack
from fluent.sender import EventTime, FluentSender

from headrace.contract.errors import ConfigRejected, EventRejected, Overloaded, Unavailable, disk_remedy
from headrace.sender.entry import pack_entry, time_ns_of
from headrace.sender.lanes import Chunk
from headrace.sender.outbox import Outbox
from headrace.sender.segment import Segment
from headrace.sender.spool import acks_of

log = logging.getLogger("headrace.sender")

_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 2.0
_STABLE_S = 1.0
"""A connection that lived so long is followed by the next one at once."""
_ADOPT_S = 5.0
"""Time between looks for what dead processes left."""
_BATCH = 1_048_576
_MESSAGE_MAX = 16_777_216
"""The gateway's `ingest.chunk_bytes_max` where it is not changed; a gateway with another says so when it refuses."""
_SILENT = (
    " without a word; its log says why. Where it has a certificate (ingest.tls_cert), it takes TLS alone, which this "
    "sender does not speak: send through a shipper on this host (deploy/fluentd/tls.conf, deploy/fluent-bit/tls.conf)"
)
_EXIT_S = 1.0
"""How long the interpreter's end waits for acks; what has none by then stays in the spool."""

_LIVE: weakref.WeakSet[Sender] = weakref.WeakSet()


class Sender(FluentSender):  # type: ignore[misc]
    """fluent-logger's interface (`emit`, `emit_with_time`, `close`) with acks and a spool. Any thread may call it.

    Args:
        flush_ms: longest time that an event waits for others to join its chunk.
        chunk_bytes: a chunk is closed at this size; while the gateway is away, chunks grow to it.
        event_bytes_max: largest event, in MessagePack. Below `ingest.batch_bytes` of the gateway, which makes a larger
            one a dead letter; raise both together.
        window: most chunks of one tag on their way without an ack.
        spool_bytes_max: bound of the spool on disk, and so of the memory that mirrors it; beyond it `emit` raises. One
            tag alone may take three quarters, and less the more others wait.
        block_s: longest that `emit` waits for the lock.
        ack_timeout_s: a chunk without an ack for so long ends the connection and is sent again.
    """

    socket: Any
    """The connection, None while there is none."""

    def __init__(
        self,
        tag_prefix: str,
        host: str = "127.0.0.1",
        port: int = 24224,
        *,
        spool_dir: str | os.PathLike[str],
        flush_ms: int = 10,
        chunk_bytes: int = 524_288,
        event_bytes_max: int = 786_432,
        window: int = 64,
        spool_bytes_max: int = 67_108_864,
        block_s: float = 1.0,
        ack_timeout_s: float = 60.0,
        fsync: bool = False,
        timeout: float = 3.0,
    ) -> None:
        super().__init__(tag_prefix, host, port, timeout=timeout, nanosecond_precision=True, forward_packet_error=False)
        if event_bytes_max > _MESSAGE_MAX - 4_096:
            raise ConfigRejected(f"event_bytes_max is {event_bytes_max}; a message has at most {_MESSAGE_MAX} bytes.")
        self._flush_s = flush_ms / 1000
        self._chunk_bytes, self._event_max, self._window, self._fsync = chunk_bytes, event_bytes_max, window, fsync
        self._spool_max, self._block_s, self._ack_timeout_s = spool_bytes_max, block_s, ack_timeout_s
        self._folder = Path(spool_dir)
        self._failure: BaseException | None = None
        self._stop = False
        try:
            self._begin()
        except OSError as error:
            raise Unavailable(
                f"the spool {self._folder} cannot be used: {error}; {disk_remedy(error)}, or name another spool_dir."
            ) from error
        _LIVE.add(self)

    def _begin(self) -> None:
        """Take a slot of the spool and start the thread; in the process that calls, once."""
        self._lock = threading.Condition(threading.Lock())
        self._outbox = Outbox(
            self._folder,
            window=self._window,
            bytes_max=self._spool_max,
            chunk_bytes=self._chunk_bytes,
            message_max=_MESSAGE_MAX,
            fsync=self._fsync,
        )
        self._retry_s = _RETRY_FIRST_S
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        os.set_blocking(self._wake_r, False)
        self._adopted_s = float("-inf")
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="headrace-sender", daemon=True)
        self._thread.start()

    # -- the caller's side

    @property
    def unacked(self) -> int:
        """Events that the gateway has not acked yet."""
        return self._outbox.unacked if self._is_ours else 0

    @property
    def spool_bytes(self) -> int:
        """Bytes that the spool takes on disk."""
        return self._outbox.spool.bytes if self._is_ours else 0

    @property
    def rejected(self) -> int:
        """Events that the gateway refused for good, since the start of this process; they are in `rejects_file`."""
        return self._outbox.rejects.count if self._is_ours else 0

    @property
    def rejects_file(self) -> Path:
        """Where refused events lie, one JSON object a line."""
        return self._outbox.rejects.path

    @property
    def held_tags(self) -> list[str]:
        """Tags that the gateway leaves unacked while it takes others."""
        return [lane.tag for lane in self._outbox.lanes if lane.is_held] if self._is_ours else []

    @property
    def last_error(self) -> BaseException | None:
        """What last went wrong between this sender and the gateway."""
        return self._failure or self._outbox.failure

    @last_error.setter
    def last_error(self, error: BaseException | None) -> None:
        self._failure = error

    def clear_last_error(self, _thread_id: object = None) -> None:
        """Forget it."""
        self._failure = None

    def emit(self, label: str | None, data: dict[str, Any]) -> bool:
        """Keep one event until the gateway has it; its time is now.

        Returns False after `close`. Raises `EventRejected` on an event that the gateway could not take (too large, a
        number or a time beyond 64 bits), `TypeError` on a type that msgpack cannot write, `Overloaded` when the spool
        is full or was busy for `block_s`, `Unavailable` when the thread died. Nothing was taken then.
        """
        return self._keep(label, time.time_ns(), data)

    def emit_with_time(self, label: str | None, timestamp: float | Decimal | datetime | EventTime, data: Any) -> bool:
        """Like `emit`, at a time in seconds since 1970, a `datetime` with its zone, or an `EventTime`."""
        return self._keep(label, time_ns_of(timestamp), data)

    def _keep(self, label: str | None, time_ns: int, data: dict[str, Any]) -> bool:
        tag = (f"{self.tag}.{label}" if self.tag else label) if label else self.tag
        if not self._is_ours:
            self._begin_again()
        entry = self._entry(tag, time_ns, data)
        if not self._lock.acquire(timeout=self._block_s):
            raise self._busy()
        try:
            if self._stop:
                return False
            if not self._thread.is_alive():
                raise Unavailable(
                    "this sender sends nothing: its thread died. Make a new one; it sends what is in the spool."
                )
            wake = self._outbox.add(tag, entry, time.monotonic())
        finally:
            self._lock.release()
        if wake:
            self._wake()
        return True

    def _busy(self) -> Overloaded:
        return Overloaded(f"the spool was busy for {self._block_s} s; offer the event again.")

    def _entry(self, tag: str, time_ns: int, data: dict[str, Any]) -> bytes:
        entry = pack_entry(tag, time_ns, data)
        most = min(self._event_max, self._outbox.body_max(tag), self._outbox.spool.event_bytes_max())
        if len(entry) > most or len(tag.encode()) > 1_024:
            raise EventRejected(
                "too_large",
                f"an event of tag {tag[:100]} takes {len(entry)} bytes, and {most} pass (of the tag 1024). Log less, "
                "or raise event_bytes_max here and ingest.batch_bytes at the gateway.",
            )
        return entry

    # No wait for the lock is without a bound: a signal handler may interrupt who holds it, in this very thread.

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything is acked; say whether that came in time."""
        if not self._is_ours:
            return True
        until_s = time.monotonic() + timeout
        if not self._lock.acquire(timeout=max(0.0, timeout)):
            return False
        try:
            return self._lock.wait_for(lambda: self._outbox.unacked == 0, max(0.0, until_s - time.monotonic()))
        finally:
            self._lock.release()

    def close(self, timeout: float = 5.0) -> None:
        """Flush, then stop. What has no ack by then stays in the spool for the next sender.

        Takes `timeout` twice, and 2 s, at most.
        """
        _LIVE.discard(self)
        if self._stop or not self._is_ours:
            self._stop = True
            return
        self.flush(timeout)
        is_held = self._lock.acquire(timeout=min(timeout, self._block_s))
        self._stop = True
        if is_held:
            self._lock.release()
        self._wake()
        self._thread.join(timeout=min(timeout, self.timeout) + 2)

    # -- a fork

    @property
    def _is_ours(self) -> bool:
        return self._pid == os.getpid()

    def _begin_again(self) -> None:
        """Begin in a process that was forked from the one that made this sender; what it holds stays the parent's."""
        if not _FORKED.lock.acquire(timeout=self._block_s):
            raise self._busy()
        try:
            if self._stop or self._is_ours:
                return
            self._forsake()
            try:
                self._begin()
            except OSError as error:
                told = f"the spool {self._folder} takes no new slot: {error}; {disk_remedy(error)}."
                raise Overloaded(told) from error
            _LIVE.add(self)
        finally:
            _FORKED.lock.release()

    def _forsake(self) -> None:
        """Close the parent's descriptors here. No shutdown: the connection is the parent's, and goes on."""
        if self._pid < 0:
            return
        self._pid = -1
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        for fd in (self._wake_r, self._wake_w):
            os.close(fd)
        self._outbox.spool.forsake()
        self.lock = threading.Lock()

    # -- the background thread

    def _tell_if_empty(self) -> None:
        if self._outbox.unacked == 0:
            self._lock.notify_all()

    def _wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_w, b"w")

    def _work(self) -> None:
        try:
            while not self._stop:
                began_s = time.monotonic()
                try:
                    self._adopt()
                    self._reconnect()
                    self._converse(self.socket)
                except (OSError, ValueError, msgpack.UnpackException, Overloaded) as error:
                    self._failure = error
                except Exception as error:
                    # A fault of ours: what is kept stays kept, and the next connection may do better.
                    self._failure = error
                    log.exception("headrace.sender: a fault while sending; it goes on")
                self._close()
                with self._lock:
                    self._outbox.lanes.ended(time.monotonic())
                    self._outbox.cut_large()
                    self._tell_if_empty()
                if time.monotonic() - began_s > _STABLE_S:
                    self._retry_s = _RETRY_FIRST_S
                self._wait_away(self._retry_s)
                self._retry_s = min(_RETRY_MAX_S, self._retry_s * 2)
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._outbox.close()
            for fd in (self._wake_r, self._wake_w):
                os.close(fd)
            self._wake_r = self._wake_w = -1

    def _reconnect(self) -> None:
        """Connect, to the first address of the name that answers, IPv6 too; the name is looked up each time."""
        if self.socket is None and not self.host.startswith("unix://"):
            self.socket = socket.create_connection((self.host, self.port), timeout=self.timeout)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._reconnect()

    def _adopt(self) -> None:
        """Write anew what somebody removed of ours, and take over what dead processes left.

        A process that was forked for one request may leave something.
        """
        if time.monotonic() - self._adopted_s < _ADOPT_S:
            return
        self._adopted_s = time.monotonic()
        with self._lock, suppress(Overloaded):
            self._outbox.keep_on_disk()
        spool = self._outbox.spool
        try:
            found, error = spool.adopt()
        except OSError as cause:
            found, error = [], cause
        if error is not None:
            # Such as a slot of another user. What is ours goes on.
            if repr(error) != repr(self._failure):
                log.warning("what dead processes left in %s cannot be taken over: %s", self._folder, error)
            self._failure = error
        contents = spool.load(found)
        acked = acks_of(contents)
        for segment, records in contents:
            # A file at a time: reading a whole spool would keep callers waiting.
            with self._lock:
                self._outbox.requeue(spool.chunks(segment, records, acked))

    def _wait_away(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop and (left := until - time.monotonic()) > 0:
            with self._lock, suppress(Overloaded):
                self._outbox.close_chunks(time.monotonic(), self._flush_s, away=True)
            time.sleep(min(left, 0.05))

    def _converse(self, sock: socket.socket) -> None:
        """Send chunks and take acks until told to stop. Raises `OSError` when the connection is of no more use."""
        sock.setblocking(False)
        words = msgpack.Unpacker(max_buffer_size=1_048_576)
        ready = select.poll()
        ready.register(sock, select.POLLIN)
        ready.register(self._wake_r, select.POLLIN)
        out = memoryview(b"")
        while not self._stop:
            self._adopt()
            if not out:
                out = memoryview(self._next_messages())
            # Not select(), which takes no descriptor above 1023: a service with a thousand connections has those.
            ready.modify(sock, select.POLLIN | (select.POLLOUT if out else 0))
            events = dict(ready.poll(self._pause_s() * 1_000))
            if self._wake_r in events:
                os.read(self._wake_r, 4_096)
            told = events.get(sock.fileno(), 0)
            if told & ~select.POLLOUT:
                self._hear(sock, words)
            if told & select.POLLOUT and out:
                try:
                    out = out[sock.send(out[:262_144]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    # What the gateway said before it closed is still to be read.
                    while True:
                        self._hear(sock, words)
            with self._lock:
                oldest_s = self._outbox.lanes.oldest_sent_s()
            if oldest_s is not None and time.monotonic() - oldest_s > self._ack_timeout_s:
                raise OSError(f"no ack for {self._ack_timeout_s} s")

    def _hear(self, sock: socket.socket, words: msgpack.Unpacker) -> None:
        try:
            data = sock.recv(65_536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise OSError("the gateway closed the connection" + (_SILENT if not words.tell() else ""))
        words.feed(data)
        for word in words:
            if isinstance(word, list) and word[:1] == ["HELO"]:
                raise OSError(
                    "the gateway asks for a shared key (HEADRACE_SHARED_KEY), which this sender does not speak: send "
                    "through a shipper on this host (deploy/fluentd/tls.conf, deploy/fluent-bit/tls.conf)"
                )
            if not isinstance(word, dict):
                continue
            if isinstance(word.get("ack"), str):
                with self._lock:
                    self._outbox.acked(word["ack"])
                    self._tell_if_empty()
                self._retry_s = _RETRY_FIRST_S
            elif word.get("refused") == "too_large" and isinstance(most := word.get("bytes_max"), int) and most > 0:
                with self._lock:
                    self._outbox.message_max = min(self._outbox.message_max, most)
                raise OSError(f"the gateway takes no message above {most} bytes")

    def _next_messages(self) -> bytes:
        """Return the chunks that may go now, at most about 1 MiB of them."""
        parts: list[bytes] = []
        segments: set[Segment] = set()
        size, now_s = 0, time.monotonic()
        with self._lock:
            with suppress(Overloaded):
                self._outbox.close_chunks(now_s, self._flush_s, away=False)
            if not self._outbox.spool.is_sound:
                # Before it is sent: that the next sync succeeds says nothing of what an earlier one lost.
                self._outbox.keep_on_disk()
            while size < _BATCH and (chunk := self._outbox.lanes.take(now_s)) is not None:
                segments.add(chunk.segment)
                parts.append(_message(chunk))
                size += chunk.size
            to_sync = self._outbox.spool.duplicates(segments)
        self._outbox.spool.sync(to_sync)
        return b"".join(parts)

    def _pause_s(self) -> float:
        """Return how long the thread may sleep: until something is due, or until it is woken."""
        with self._lock:
            now_s = time.monotonic()
            due_s = self._outbox.lanes.next_s(now_s, self._flush_s)
        return 0.5 if due_s is None else min(0.5, max(0.0, due_s - now_s))


def _message(chunk: Chunk) -> bytes:
    """Return a chunk as a PackedForward message."""
    option = {"chunk": chunk.id, "size": len(chunk.body)}
    return bytes(msgpack.packb([chunk.tag, b"".join(chunk.body), option], use_bin_type=True))


class _Forked:
    """What a fork needs: a lock that is never the parent's, held by a thread that is not here."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self) -> None:
        """In the child, at once: let go of what is the parent's. A sender begins anew with its first event."""
        self.lock = threading.Lock()
        for sender in list(_LIVE):
            with suppress(OSError):
                sender._forsake()


def _close_all() -> None:
    """At the interpreter's end: a moment for what is on its way, all senders together."""
    until = time.monotonic() + _EXIT_S
    closing: list[Callable[..., None]] = [sender.close for sender in list(_LIVE)]
    for close in closing:
        close(timeout=max(0.0, until - time.monotonic()))


_FORKED = _Forked()
os.register_at_fork(after_in_child=_FORKED)
atexit.register(_close_all)
