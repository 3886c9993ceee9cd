"""Goal: the sender keeps each event until it is acked, over outages, restarts and full disks. Method: a forward server
of a few lines that acks when told, and the real one for what they must agree on."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import fluent.sender
import msgpack
import pytest
from ingest_world import Counts, ShakyLog, dependencies

from headrace.contract.config import IngestConfig
from headrace.contract.errors import Overloaded, Unavailable
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.run import run
from headrace.sender import Sender


class WallClock:
    def now_ms(self) -> int:
        return time.time_ns() // 10**6

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Running:
    """The real server in a thread, on a log in memory."""

    def __init__(self, port: int = 0, log: ShakyLog | None = None, *, shared_key: str = "", **config: Any) -> None:
        self.log, self.counts, self._stop = log or ShakyLog(Random(0)), Counts(), threading.Event()
        self._up = threading.Event()
        self.port = 0
        endpoint = Endpoint(port=port, shared_key=shared_key)
        self._thread = threading.Thread(
            target=run,
            args=(
                dependencies(self.log, self.counts, WallClock(), config=IngestConfig(**config)),
                endpoint,
                self._stop,
            ),
            kwargs={"ready": self._ready},
        )
        self._thread.start()
        # A minute: on a machine's first run the gateway compiles its decoders before it is ready.
        assert self._up.wait(60)

    def _ready(self, port: int) -> None:
        self.port = port
        self._up.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def ids(self) -> list[str]:
        return sorted(row["event_id"] for row in self.log.rows())


@pytest.fixture
def gateway() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


def _record(number: int) -> dict[str, Any]:
    return {"event_id": f"e{number:06d}", "request_id": f"r{number}", "user_id": number % 50, "item_id": number}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_thousands_of_events_arrive_once_and_the_spool_is_empty(gateway: Running, tmp_path: Path) -> None:
    sender = Sender("shop", port=gateway.port, spool_dir=tmp_path)
    for number in range(5_000):
        sender.emit("impression", _record(number))
    assert sender.flush(10)
    sender.close()
    assert gateway.ids() == [f"e{n:06d}" for n in range(5_000)]
    assert list(tmp_path.rglob("*.seg")) == []


def test_an_event_is_there_soon(gateway: Running, tmp_path: Path) -> None:
    with Sender("shop", port=gateway.port, spool_dir=tmp_path) as sender:
        waits = []
        for number in range(20):
            begin = time.monotonic()
            sender.emit("impression", _record(number))
            assert sender.flush(2)
            waits.append(time.monotonic() - begin)
    # 10 ms flush + 20 ms batch + polls; a median of 200 ms leaves room for a busy machine.
    assert sorted(waits)[10] < 0.2


def test_an_outage_is_bridged_and_a_full_spool_says_so(tmp_path: Path) -> None:
    port = _free_port()
    sender = Sender("shop", port=port, spool_dir=tmp_path, spool_bytes_max=40_000)
    taken = 0
    with pytest.raises(Overloaded, match="Is the gateway up"):
        for number in range(10_000):
            sender.emit("impression", _record(number))
            taken += 1
    assert 100 < taken < 1_000
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.seg")) < 45_000
    running = Running(port)
    assert sender.flush(10)
    sender.emit("impression", _record(99_999))
    sender.close()
    running.stop()
    assert running.ids() == sorted([f"e{n:06d}" for n in range(taken)] + ["e099999"])


def test_a_gateway_that_restarts_and_a_broker_that_denies_change_nothing(tmp_path: Path) -> None:
    port, log = _free_port(), ShakyLog(Random(5), fault=0.02)
    running = Running(port, log)
    sender = Sender("shop", port=port, spool_dir=tmp_path)
    for number in range(3_000):
        sender.emit("impression", _record(number))
        if number % 1_000 == 500:
            running.stop()
            running = Running(port, log)
    assert sender.flush(20)
    sender.close()
    running.stop()
    assert sorted(set(running.ids())) == [f"e{n:06d}" for n in range(3_000)]


_CHILD = """
import sys
from headrace.sender import Sender
sender = Sender("shop", port=int(sys.argv[1]), spool_dir=sys.argv[2])
for number in range(100_000):
    record = {"request_id": f"r{number}", "user_id": number % 50, "item_id": number}
    sender.emit("impression", record)
    print(number, flush=True)
"""


@pytest.mark.parametrize("up", [False, True])
def test_kill_9_loses_nothing_that_emit_took(tmp_path: Path, up: bool) -> None:
    port = _free_port()
    running = Running(port) if up else None
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(port), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 700:
            child.send_signal(signal.SIGKILL)
            break
    printed = 700 + len(child.stdout.readlines())
    child.stdout.close()
    child.wait()
    running = running or Running(port)
    sender = Sender("shop", port=port, spool_dir=tmp_path)
    assert sender.flush(10)
    sender.close()
    running.stop()
    by_id = {row["event_id"]: row["request_id"] for row in running.log.rows()}
    found = sorted(by_id.values(), key=lambda r: int(r[1:]))
    assert len(found) == len(set(found)), "events without ids of their own count once over the restart"
    assert found[: printed + 1] == [f"r{n}" for n in range(printed + 1)]
    assert len(found) <= printed + 2


def test_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    port = _free_port()
    sender = Sender("shop", port=port, spool_dir=tmp_path)
    for number in range(10):
        sender.emit("impression", _record(number))
    sender.close(timeout=0)
    (segment,) = tmp_path.rglob("*.seg")
    segment.write_bytes(segment.read_bytes()[:-5])
    running = Running(port)
    with Sender("shop", port=port, spool_dir=tmp_path) as sender:
        assert sender.flush(5)
    running.stop()
    assert running.ids() == [f"e{n:06d}" for n in range(9)]


def test_whatever_the_thread_meets_it_goes_on(
    gateway: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, met = Sender._next_messages, [MemoryError("injected"), KeyError("injected")]

    def next_messages(self: Sender) -> bytes:
        made = told(self)
        if made and met:
            raise met.pop()
        return made

    monkeypatch.setattr(Sender, "_next_messages", next_messages)
    sender = Sender("shop", port=gateway.port, spool_dir=tmp_path)
    sender.emit("impression", _record(0))
    assert sender.flush(20) and not met
    sender.close()
    assert gateway.ids() == ["e000000"] and caplog.text.count("a fault while sending") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sender_whose_thread_died_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_self: Sender) -> None:
        raise SystemExit

    monkeypatch.setattr(Sender, "_adopt", dies)
    sender = Sender("shop", port=1, spool_dir=tmp_path)
    sender._thread.join(20)
    with pytest.raises(Unavailable, match="Make a new one"):
        sender.emit("impression", _record(0))
    sender.close(0.0)


def test_two_senders_share_a_folder_and_the_dead_one_is_inherited(gateway: Running, tmp_path: Path) -> None:
    nowhere = _free_port()
    first = Sender("shop", port=gateway.port, spool_dir=tmp_path)
    second = Sender("shop", port=nowhere, spool_dir=tmp_path)
    second.emit("impression", _record(1))
    second.close(timeout=0)
    first.emit("impression", _record(2))
    third = Sender("shop", port=gateway.port, spool_dir=tmp_path)
    assert first.flush(5)
    assert third.flush(5)
    third.close()
    first.close()
    assert gateway.ids() == ["e000001", "e000002"]


def test_plain_fluent_logger_works_too(gateway: Running) -> None:
    for nanos in (False, True):
        sender = fluent.sender.FluentSender("shop", port=gateway.port, nanosecond_precision=nanos)
        assert sender.emit("impression", _record(int(nanos)))
        assert sender.emit("click", {"request_id": "r1", "user_id": 1, "item_id": 1})
        sender.close()
    until = time.monotonic() + 5
    while len(gateway.log.rows()) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert sorted(r["_kind"] for r in gateway.log.rows()) == ["feedback", "feedback", "impression", "impression"]


def test_hostile_bytes_are_refused_and_counted(gateway: Running) -> None:
    for data, reason in (
        (b"\xc1", "bad_frame"),
        (b"GET / HTTP/1.1\r\n\r\n", "bad_frame"),
        (b"\x93\xa1t\xdd\x40\0\0\0", "too_large"),
    ):
        with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
            before = gateway.counts.totals[f"connections_refused_total:{reason}"]
            sock.sendall(data)
            sock.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                # What is too large is told so, by a word that our sender knows; the rest ends without one.
                said = sock.makefile("rb").read()
                assert said == (msgpack.packb({"refused": reason, "bytes_max": 1 << 24}) if "large" in reason else b"")
            assert gateway.counts.totals[f"connections_refused_total:{reason}"] == before + 1


def test_no_chunk_outgrows_its_bound_while_the_gateway_reads_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sender = Sender("shop", port=listener.getsockname()[1], spool_dir=tmp_path, chunk_bytes=20_000)
        sender.emit("impression", _record(0))
        sock, _ = listener.accept()
        for number in range(1, 40_000):
            sender.emit("impression", _record(number))
        unpacker, seen, largest = msgpack.Unpacker(max_buffer_size=1 << 26), 0, 0
        with sock:
            sock.settimeout(20)
            while seen < 40_000:
                unpacker.feed(sock.recv(65_536))
                for what in unpacker:
                    body = what[1] if isinstance(what[1], bytes) else msgpack.packb(what[1])
                    seen += what[2]["size"] if isinstance(what[1], bytes) else len(what[1])
                    largest = max(largest, len(body))
                    sock.sendall(msgpack.packb({"ack": what[2]["chunk"]}))
            assert sender.flush(20)
        sender.close()
    assert 20_000 <= largest < 20_200


def test_reading_stops_at_the_bound_and_goes_on(tmp_path: Path) -> None:
    log = ShakyLog(Random(0))
    log.away = True
    running = Running(log=log, buffer_bytes_max=200_000, chunk_bytes_max=100_000)
    sender = Sender("shop", port=running.port, spool_dir=tmp_path, chunk_bytes=20_000)
    for number in range(30_000):
        sender.emit("impression", _record(number))
    time.sleep(0.5)
    assert running.counts.totals["buffer_bytes"] < 600_000
    assert sender.unacked == 30_000
    log.away = False
    assert sender.flush(20)
    sender.close()
    running.stop()
    assert len(set(running.ids())) == 30_000


@pytest.mark.parametrize("key", ["s3cret", "wrong", None])
def test_a_shared_key_is_asked_for_before_anything_is_taken(key: str | None) -> None:
    running = Running(shared_key="s3cret")
    event = msgpack.packb(["shop.impression", [[int(time.time()), _record(1)]], {"chunk": "c"}])
    with socket.create_connection(("127.0.0.1", running.port)) as sock, sock.makefile("rb") as stream:
        sock.settimeout(5)
        incoming = msgpack.Unpacker(stream, read_size=1)
        kind, option = incoming.unpack()
        assert kind == "HELO"
        if key is not None:
            digest = hashlib.sha512(b"salt" + b"me" + option["nonce"] + key.encode()).hexdigest()
            sock.sendall(msgpack.packb(["PING", "me", "salt", digest, "", ""]))
            assert incoming.unpack()[1] is (key == "s3cret")
        with contextlib.suppress(OSError):
            sock.sendall(event)
        try:
            answer = incoming.unpack()
        except (msgpack.OutOfData, ConnectionResetError):
            answer = None
    running.stop()
    assert answer == ({"ack": "c"} if key == "s3cret" else None)
    assert len(running.log.rows()) == (1 if key == "s3cret" else 0)
    refusals = {None: "no_ping", "wrong": "shared_key", "s3cret": ""}
    assert key == "s3cret" or running.counts.totals[f"connections_refused_total:{refusals[key]}"] == 1


def test_connections_beyond_the_bound_are_refused() -> None:
    running = Running(connections_max=3)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port))) for _ in range(4)]
        socks[3].settimeout(5)
        assert socks[3].recv(1) == b""
        assert running.counts.totals["connections_refused_total:connections_max"] == 1
        socks[0].sendall(msgpack.packb(["shop.impression", 1, _record(1), {"chunk": "c"}]))
        socks[0].settimeout(5)
        assert msgpack.unpackb(socks[0].recv(100)) == {"ack": "c"}
    running.stop()
