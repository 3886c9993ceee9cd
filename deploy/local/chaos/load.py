"""Load for tests by breaking: events of any declared project at a rate, over shippers that keep what is not acked.

Half goes through `headrace.sender` (event ids, spool on disk), half through raw forward connections as fluentd makes
them: packed chunks, acked, sent again under their ids on the next connection; every other event there has no event id.
"""

from __future__ import annotations

import base64
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from random import Random
from typing import Any

import msgpack

from headrace.contract.errors import Overloaded
from headrace.contract.project import FieldType, Project
from headrace.process.awake import awake_s
from headrace.process.background import Background
from headrace.sender import Sender

Name = tuple[str, str]
"""Event type and request id: what identifies an event here, whether it brings an id or not."""

AGAIN_EVERY, BAD_EVERY, FEEDBACK_EVERY = 101, 97, 5
"""Of so many events, one is sent twice, one breaks its schema, one impression is answered."""
IN_FLIGHT_S = 20
"""The load pauses while it has no acks for as many events as it emits in so many seconds."""
TURN_S = 0.02
_ACK_TIMEOUT_S = 20.0
_RETRY_S = 0.2


class Events:
    """An endless, seeded stream of (type, tag, record) of a project, fields filled by their types."""

    def __init__(self, project: Project, seed: int) -> None:
        self._project, self._random = project, Random(seed)
        self._asked: deque[dict[str, Any]] = deque()
        self._number = 0

    def next(self) -> tuple[str, str, dict[str, Any]]:
        """Return an impression, or the answer to one from some hundred events ago."""
        self._number += 1
        project, name = self._project, f"{self._number:08d}"
        key = project.impression.key
        if project.feedback and self._number % FEEDBACK_EVERY == 0 and len(self._asked) > 20:
            kind, asked = self._random.choice(project.feedback), self._asked.popleft()
            record = self._fields(kind.fields) | {f: asked[f] for f in kind.fields if f in asked}
            record |= {"event_id": f"f{name}", "request_id": asked["request_id"], key: asked[key]}
            return kind.name, kind.tag, record
        record = self._fields(project.impression.fields) | {"event_id": f"i{name}", "request_id": f"r{name}"}
        if self._number % FEEDBACK_EVERY == 1:
            self._asked.append(record)
        return "impression", project.impression.tag, record

    def broken(self) -> tuple[str, dict[str, Any]]:
        """Return an impression without its partition key."""
        self._number += 1
        record = self._fields(self._project.impression.fields) | {"request_id": f"bad{self._number}"}
        del record[self._project.impression.key]
        return self._project.impression.tag, record | {"event_id": f"bad{self._number}"}

    def _fields(self, fields: dict[str, FieldType]) -> dict[str, Any]:
        draw, values = self._random, {}
        for name, kind in fields.items():
            number = draw.randrange(1_000)
            values[name] = {"int64": number, "float64": number / 8, "string": f"s{number}", "bool": number > 500}[kind]
        return values


class RawShipper:
    """One forward connection at a time, a chunk every TURN_S; what is not acked is sent again on the next one."""

    def __init__(self, port: int, random: Random) -> None:
        self._port, self._random = port, random
        self._lock = threading.Lock()
        self._entries: dict[str, list[Any]] = {}
        self._todo: deque[tuple[str, bytes, int]] = deque()
        self._sent: dict[str, tuple[bytes, int]] = {}
        self._stop = False
        self.unacked = 0
        self.background = Background()
        self._thread = self.background.thread("raw-shipper", self._work)

    def emit(self, tag: str, record: dict[str, Any]) -> None:
        """Take one event."""
        with self._lock:
            self._entries.setdefault(tag, []).append([msgpack.Timestamp.from_unix_nano(time.time_ns()), record])
            self.unacked += 1

    def close(self) -> None:
        """End the thread; what has no ack is forgotten."""
        self._stop = True
        self._thread.join(5)

    def _chunks(self) -> None:
        with self._lock:
            entries, self._entries = self._entries, {}
        for tag, rows in entries.items():
            name = base64.b64encode(self._random.randbytes(16)).decode()
            packer = msgpack.Packer()
            body = b"".join(
                b"\x92\xd7\x00" + t.seconds.to_bytes(4, "big") + t.nanoseconds.to_bytes(4, "big") + packer.pack(r)
                for t, r in rows
            )
            wire = msgpack.packb([tag, body, {"chunk": name, "size": len(rows)}], use_bin_type=True)
            self._todo.append((name, wire, len(rows)))

    def _work(self) -> None:
        while not self._stop:
            try:
                with socket.create_connection(("127.0.0.1", self._port), timeout=3) as sock:
                    self._converse(sock)
            except OSError:
                time.sleep(_RETRY_S)
            self._todo.extendleft((name, wire, size) for name, (wire, size) in reversed(self._sent.items()))
            self._sent = {}

    def _converse(self, sock: socket.socket) -> None:
        """Send and take acks until the connection breaks. Raises `OSError` then."""
        acks = msgpack.Unpacker()
        heard_s = awake_s()
        while not self._stop:
            self._chunks()
            while self._todo and len(self._sent) < 32:
                name, wire, size = self._todo.popleft()
                self._sent[name] = wire, size
                sock.settimeout(3)
                sock.sendall(wire)
            sock.settimeout(TURN_S)
            try:
                data = sock.recv(65_536)
            except TimeoutError:
                if self._sent and awake_s() - heard_s > _ACK_TIMEOUT_S:
                    raise OSError("no ack") from None
                if not self._sent:
                    heard_s = awake_s()
                continue
            if not data:
                raise OSError("closed by the gateway")
            heard_s = awake_s()
            acks.feed(data)
            for ack in acks:
                wire_size = self._sent.pop(ack["ack"], None)
                if wire_size is not None:
                    with self._lock:
                        self.unacked -= wire_size[1]


class Emitted:
    """What was emitted: good events once each, how many of them again, and the ids of broken ones."""

    def __init__(self) -> None:
        self.good: set[Name] = set()
        self.bad: set[str] = set()
        self.again = 0


class Load(Emitted):
    """Emits `rate` events a second from `start` to `stop`, and remembers what it emitted."""

    def __init__(self, project: Project, port: int, spool: Path, rate: int, seed: int) -> None:
        super().__init__()
        self._rate = rate
        self._events = Events(project, seed)
        self._sender = Sender("", port=port, spool_dir=spool, spool_bytes_max=1 << 30)
        self._raw = [RawShipper(port, Random(seed + n)) for n in range(2)]
        self.count = 0
        self.held_s = 0.0
        """For how long it paused."""
        self.wait = threading.Event()
        """While this is set it pauses: whoever looks on says that the stages are too far behind."""
        self._stop = threading.Event()
        self._background = Background()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = self._background.thread("load", self._drive)

    def stop(self) -> None:
        """Emit no more. Raises what ended the load before: less was emitted than was asked for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for background in (self._background, *(raw.background for raw in self._raw)):
            background.check()

    @property
    def unacked(self) -> int:
        """Events that no gateway has acked yet."""
        return self._sender.unacked + sum(raw.unacked for raw in self._raw)

    def settled(self, timeout_s: float) -> bool:
        """Wait for the last ack, then close the shippers; say whether it came."""
        until = awake_s() + timeout_s
        while self.unacked and awake_s() < until:
            time.sleep(0.05)
        done = not self.unacked
        for raw in self._raw:
            raw.close()
        self._sender.close(1.0)
        return done

    def _drive(self) -> None:
        begin, emitted = awake_s(), 0
        while not self._stop.is_set():
            if self.wait.is_set() or self.unacked > IN_FLIGHT_S * self._rate:
                # What was not emitted meanwhile is not owed: the rate that was held says how much that was.
                paused = awake_s()
                self._stop.wait(5 * TURN_S)
                self.held_s += awake_s() - paused
                begin, emitted = awake_s(), self.count
                continue
            due = emitted + int((awake_s() - begin) * self._rate)
            while self.count < due and not self._stop.is_set():
                self._emit()
            self._stop.wait(TURN_S)

    def _emit(self) -> None:
        self.count += 1
        if self.count % BAD_EVERY == 0:
            tag, record = self._events.broken()
            self.bad.add(record["event_id"])
            self._raw[0].emit(tag, record)
            return
        kind, tag, record = self._events.next()
        self.good.add((kind, record["request_id"]))
        if self.count % 2:
            self._keep(tag, record)
            if self.count % AGAIN_EVERY == 0:
                self.again += 1
                self.count += 1
                self._keep(tag, record)
            return
        if self.count % 4:
            del record["event_id"]
        self._raw[self.count // 4 % len(self._raw)].emit(tag, record)

    def _keep(self, tag: str, record: dict[str, Any]) -> None:
        while True:
            try:
                self._sender.emit(tag, record)
            except Overloaded:
                time.sleep(TURN_S)
            else:
                return


def seed_from_system() -> int:
    """Return a seed that nobody chose."""
    return int.from_bytes(os.urandom(4), "big")
