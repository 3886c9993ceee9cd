"""Goal: whoever calls, and whatever it gives, gets its answer within the bound. Method: a counting gateway; the lock
held as by a thread that a signal interrupted."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgpack
import pytest
from acking_gateway import AckingGateway
from gateway_world import Running, eventually

from headrace.contract.errors import EventRejected, Overloaded
from headrace.ingest.forward.endpoint import Endpoint
from headrace.sender import Sender
from headrace.sender.entry import pack_entry, time_ns_of
from headrace.sender.lanes import Chunk, Lane, Lanes
from headrace.sender.outbox import Outbox
from headrace.sender.segment import Segment


@contextmanager
def _files_open(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 500)), hard))
    socks = [socket.socket() for _ in range(count)]
    try:
        yield
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_service_with_thousands_of_open_connections_is_served(tmp_path: Path) -> None:
    with _files_open(1_100), AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        sender.emit("a", {"event_id": 1})
        assert sender.flush(20), repr(sender.last_error)
        assert gateway.got == {("a", 1): 1}


def test_each_address_of_a_name_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AckingGateway() as gateway:

        def found(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
            assert host == "gateway.test"
            kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [
                (socket.AF_INET6, *kind, ("::1", 1, 0, 0)),
                (socket.AF_INET, *kind, ("127.0.0.1", 1)),
                (socket.AF_INET, *kind, ("127.0.0.1", port)),
            ]

        monkeypatch.setattr(socket, "getaddrinfo", found)
        with Sender("", "gateway.test", gateway.port, spool_dir=tmp_path) as sender:
            sender.emit("a", {"event_id": 1})
            assert sender.flush(20), repr(sender.last_error)
            assert gateway.got == {("a", 1): 1}


@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_a_gateway_on_ipv6_is_reached(tmp_path: Path, host: str) -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with listener, Sender("", host, listener.getsockname()[1], spool_dir=tmp_path) as sender:
        if host == "localhost" and not any(each[0] == socket.AF_INET6 for each in socket.getaddrinfo(host, 1)):
            pytest.skip("localhost has no address of IPv6 here")
        sender.emit("a", {"event_id": 1})
        listener.settimeout(20)
        sock, _ = listener.accept()
        with sock:
            tag, _, option = next(_messages(sock))
            assert tag == "a"
            sock.sendall(msgpack.packb({"ack": option["chunk"]}))
            assert sender.flush(20)


def _messages(sock: socket.socket) -> Iterator[Any]:
    unpacker = msgpack.Unpacker()
    while data := sock.recv(65_536):
        unpacker.feed(data)
        yield from unpacker


_HANDLER = """
import os, signal, sys, time
from headrace.contract.errors import Overloaded
from headrace.sender import Sender
sender = Sender("", port=1, spool_dir=sys.argv[1], block_s=0.1)
sender.emit("a", {"event_id": 0})

def handler(*_):
    began = time.monotonic()
    try: sender.emit("a", {"event_id": 1})
    except Overloaded: print("overloaded")
    print("flushed", sender.flush(0.1))
    sender.close(0.1)
    print("closed", time.monotonic() - began < 10)
    sys.exit(3)

signal.signal(signal.SIGTERM, handler)
append = sender._outbox.spool.append_entry
def interrupted(*of):
    os.kill(os.getpid(), signal.SIGTERM)  # In the midst of `emit`, with the lock held.
    return append(*of)
sender._outbox.spool.append_entry = interrupted
sender.emit("a", {"event_id": 2})
"""


def test_a_signal_handler_in_the_midst_of_emit_may_emit_flush_and_close(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANDLER, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "overloaded\nflushed False\nclosed True\n" and done.returncode == 3, done.stderr
    with AckingGateway() as gateway:
        with Sender("", port=gateway.port, spool_dir=tmp_path) as heir:
            assert heir.flush(20)
        assert gateway.got[("a", 0)] == 1 and set(gateway.got.values()) == {1}


def test_a_lock_that_an_interrupt_left_held_ends_no_process_in_a_hang(tmp_path: Path) -> None:
    code = "import sys\nfrom headrace.sender import Sender\ns = Sender('', port=1, spool_dir=sys.argv[1])\n"
    code += "s.emit('a', {'event_id': 0})\ns._lock.acquire()  # KeyboardInterrupt came before the `try`.\n"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=True)


def test_a_time_is_seconds_or_a_datetime_with_its_zone_and_nothing_else(tmp_path: Path) -> None:
    moment = datetime(2026, 3, 1, 12, 0, 0, 123_456, UTC)
    with AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        for number, good in enumerate((moment, moment.timestamp(), 1_772_366_400, Decimal("1772366400.25"))):
            assert sender.emit_with_time("a", good, {"event_id": number})  # type: ignore[arg-type]
        wrong: tuple[Any, ...] = (
            *(None, "1772366400", b"1772366400", [1], object(), moment.replace(tzinfo=None)),
            *(Decimal("NaN"), Decimal("Infinity"), float("inf"), moment - timedelta(days=40_000), 1j),
        )
        for bad in wrong:
            with pytest.raises(EventRejected) as caught:
                sender.emit_with_time("a", bad, {"event_id": "bad"})
            assert caught.value.reason == "bad_time", bad
        assert sender.flush(20)
        assert set(gateway.got.values()) == {1} and gateway.ids("a") == {0, 1, 2, 3}
    assert time_ns_of(moment) == 1_772_366_400_123_456_000, "not through a float"


@pytest.mark.parametrize("label", [5, b"a", ["a"], object()])
def test_a_tag_is_text(tmp_path: Path, label: Any) -> None:
    sender = Sender("", port=1, spool_dir=tmp_path)
    with pytest.raises(TypeError, match="tag"):
        sender.emit(label, {"event_id": 1})
    assert sender.unacked == 0
    sender.close(0)


@pytest.mark.parametrize("data", [None, "text", [1], 5, b"x"])
def test_an_event_is_a_map(tmp_path: Path, data: Any) -> None:
    sender = Sender("", port=1, spool_dir=tmp_path)
    with pytest.raises(TypeError, match="map"):
        sender.emit("a", data)
    assert sender.unacked == 0
    sender.close(0)


def test_what_msgpack_cannot_write_is_refused_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    deep: Any = None
    for _ in range(2_000):
        deep = [deep]
    with AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        for value in (cycle, 1 << 64, -(1 << 63) - 1, "\ud800", deep):
            with pytest.raises(EventRejected, match=r"MessagePack|100 levels"):
                sender.emit("a", {"event_id": "bad", "value": value})
        for value in (Decimal(1), {1}, datetime.now(UTC), object(), 1j):
            with pytest.raises(TypeError):
                sender.emit("a", {"event_id": "bad", "value": value})
        sender.emit("a", {"event_id": "good"})
        assert sender.flush(20) and gateway.got == {("a", "good"): 1}


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_set_holds_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """Names of files, back-offs and deadlines go by no wall clock."""
    now_ns = time.time_ns()
    with AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        sender.emit("a", {"event_id": "before"})
        monkeypatch.setattr(time, "time_ns", lambda: now_ns + days * 86_400 * 10**9)
        monkeypatch.setattr(time, "time", lambda: now_ns / 1e9 + days * 86_400)
        sender.emit("a", {"event_id": "after"})
        assert sender.flush(20)
        assert gateway.got == {("a", "before"): 1, ("a", "after"): 1}


@pytest.mark.parametrize("tag", ["", " ", "a\0b", "a\nb", "*.**", "é" * 500, "../../x", "🙂"])
def test_a_tag_of_any_text_passes(tmp_path: Path, tag: str) -> None:
    with AckingGateway() as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        sender.emit(tag, {"event_id": 1})
        assert sender.flush(20) and gateway.got == {(tag, 1): 1}


def test_a_gateway_that_asks_for_a_key_is_told_of(tmp_path: Path) -> None:
    endpoint = Endpoint(port=0, shared_key="s3cret")
    with Running(endpoint) as gateway, Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
        sender.emit("a", {"event_id": 1})
        eventually(lambda: "shared key" in str(sender.last_error), "said")
        assert sender.unacked == 1
        sender.close(0)


class _Once:
    """A gateway that says `word` to the first message of each connection and closes it; the last one acks."""

    def __init__(self, words: list[bytes]) -> None:
        self._words = words
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.seen: list[tuple[str, int]] = []

    def serve(self) -> None:
        for word in self._words:
            sock, _ = self._listener.accept()
            with sock:
                _, _, option = next(_messages(sock))
                self.seen.append((option["chunk"], option["size"]))
                sock.sendall(word.replace(b"CHUNK", option["chunk"].encode()))
        sock, _ = self._listener.accept()
        with sock:
            for _, _, option in _messages(sock):
                self.seen.append((option["chunk"], option["size"]))
                sock.sendall(msgpack.packb({"ack": option["chunk"]}))
        self._listener.close()


_ACK = msgpack.packb({"ack": "C" * 24})[:-24] + b"CHUNK"


def test_an_ack_that_is_none_leaves_the_event_where_it_is(tmp_path: Path) -> None:
    words = [
        *(b"", b"\xc1", b"HTTP/1.1 400 Bad Request\r\n\r\n", _ACK[:-3], msgpack.packb({"ack": "of another"})),
        *(msgpack.packb({"ack": None}), msgpack.packb({b"ack": 5}), b"\x81" * 5_000, msgpack.packb([["ack"]] * 9)),
        *(b"\x81\xa3ack\xa2\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc0" * 100_000),
    ]
    gateway = _Once(words)
    thread = threading.Thread(target=gateway.serve)
    thread.start()
    sender = Sender("", port=gateway.port, spool_dir=tmp_path)
    sender.emit("a", {"event_id": 1})
    assert sender.flush(60)
    assert len(set(gateway.seen)) == 1 and len(gateway.seen) == len(words) + 1, "the same chunk under the same id"
    sender.close()
    thread.join(20)


def test_thousands_of_tags_that_wait_cost_each_turn_their_number_and_not_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lanes, asked = Lanes(64), 0
    for number in range(1_000):
        lanes.ready(Chunk(f"t{number}", Segment(Path("/nowhere")), 0.0))
    for _ in range(3):
        for _ in range(1_000):
            lanes.take(0.0)
        lanes.ended(0.0)
    assert all(lane.is_held for lane in lanes)

    def is_held(_lane: Lane) -> bool:
        nonlocal asked
        asked += 1
        return True

    monkeypatch.setattr(Lane, "is_held", property(is_held), raising=False)
    lanes.take(100.0)
    lanes.next_s(100.0, 0.01)
    assert asked < 10_000


def test_a_full_disk_holds_back_nothing_that_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Segment.append
    is_full = False

    def on_a_full_disk(self: Segment, kind: int, payload: bytes) -> int:
        if is_full:
            raise Overloaded("the disk is full")
        return append(self, kind, payload)

    monkeypatch.setattr(Segment, "append", on_a_full_disk)
    with AckingGateway() as gateway:
        outbox = Outbox(tmp_path, window=4, bytes_max=1 << 20, chunk_bytes=1 << 16, message_max=1 << 20, fsync=False)
        for tag in ("a", "b", "c"):
            outbox.add(tag, pack_entry(tag, 0, {"event_id": tag}), 0.0)
        is_full = True
        outbox.close_chunks(1.0, 0.01, away=False)
        taken = [outbox.lanes.take(1.0) for _ in range(3)]
        ids = {chunk.tag: chunk.id for chunk in taken if chunk is not None}
        assert set(ids) == {"a", "b", "c"}
        with pytest.raises(Overloaded):
            outbox.add("a", pack_entry("a", 0, {"event_id": "refused"}), 1.0)
        # Acked or not, a start after a crash sends them under the ids that the gateway knows.
        is_full = False
        outbox.add("a", pack_entry("a", 0, {"event_id": "later"}), 2.0)
        outbox.acked(ids["b"])
        outbox.spool.close()
        heir = Outbox(tmp_path, window=4, bytes_max=1 << 20, chunk_bytes=1 << 16, message_max=1 << 20, fsync=False)
        again = {chunk.id: len(chunk.body) for lane in heir.lanes for chunk in lane.ready}
        assert {ids["a"], ids["c"]} <= set(again) and ids["b"] not in again and sorted(again.values()) == [1, 1, 1]
        heir.spool.close()
        with Sender("", port=gateway.port, spool_dir=tmp_path) as sender:
            assert sender.flush(20)
        assert gateway.got == {("a", "a"): 1, ("a", "later"): 1, ("c", "c"): 1}
