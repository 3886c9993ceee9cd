"""A forward server of a few lines: it acks what it is told to, and leaves the rest unacked as behind a ceiling."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import msgpack


class AckingGateway:
    """Acks all tags but the `shut` ones; a connection that brought one of those ends `close_s` later.

    `got` counts events by tag and id, acked ones alone.
    """

    def __init__(self, shut: set[str] | None = None, *, close_s: float = 0.05) -> None:
        self.shut, self._close_s = shut or set(), close_s
        self.got: Counter[tuple[str, Any]] = Counter()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> AckingGateway:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)

    def ids(self, tag: str) -> set[Any]:
        """Return the ids of a tag's events that were acked."""
        return {name for of, name in self.got if of == tag}

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        incoming = msgpack.Unpacker(max_buffer_size=1 << 26)
        ends_s = float("inf")
        sock.settimeout(0.01)
        with sock, suppress(OSError):
            while not self._stop.is_set() and time.monotonic() < ends_s:
                with suppress(TimeoutError):
                    data = sock.recv(65_536)
                    if not data:
                        return
                    incoming.feed(data)
                for tag, body, option in incoming:
                    if tag in self.shut:
                        ends_s = min(ends_s, time.monotonic() + self._close_s)
                        continue
                    entries = msgpack.Unpacker()
                    entries.feed(body)
                    self.got.update((tag, record["event_id"]) for _, record in entries)
                    sock.sendall(msgpack.packb({"ack": option["chunk"]}))
