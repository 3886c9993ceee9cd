"""Goal: what only processes show: a port that several gateways share, SIGTERM with chunks on their way, memory under
hostile input, ten thousand connections. Method: gateways as real processes whose log is a file."""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pytest
from gateway_world import NEVER_S, ended, eventually, frame, read_value, read_values
from ingest_world import impression

SCRIPT = Path(__file__).resolve().parents[2] / "worlds" / "ingest" / "gateway_process.py"


class Process:
    """One gateway process."""

    def __init__(self, folder: Path, name: str, port: int = 0, receipt_s: float = 0.0, **settings: int) -> None:
        self.log = folder / f"{name}.log"
        words = [f"{key}={value}" for key, value in settings.items()]
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(self.log), str(port), name, str(receipt_s), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said, self._process.communicate()[1]
        self.port = int(said)
        self._told = False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=NEVER_S)

    def terminate(self) -> None:
        """Send SIGTERM, once: Python takes its handler away before a process is quite over."""
        if not self._told:
            self._told = True
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> dict[str, Any]:
        """Send SIGTERM, see it end well within 5 s of a busy machine, return what it says of itself."""
        self.terminate()
        out, errors = self._process.communicate(timeout=NEVER_S)
        assert self._process.returncode == 0, errors
        assert "Traceback" not in errors, errors
        self.errors = errors
        said: dict[str, Any] = json.loads(out)
        return said

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def ids(self) -> list[str]:
        return [event for line in self.lines() for event in line.get("ids", [])]


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


def test_gateways_share_a_port_and_one_that_leaves_takes_nothing_with_it(
    tmp_path: Path, processes: list[Process]
) -> None:
    processes.append(Process(tmp_path, "g1"))
    processes.append(Process(tmp_path, "g2", processes[0].port))
    first, second = processes
    socks = [first.connect() for _ in range(40)]
    for number, sock in enumerate(socks):
        sock.sendall(frame([impression(number)], f"c{number}"))
    assert [read_value(sock) for sock in socks] == [{"ack": f"c{n}"} for n in range(40)]
    # The kernel spreads connections by a hash of their ports: 40 on one side is 1 in 10^12.
    assert first.ids() and second.ids()
    assert Counter(first.ids() + second.ids()) == {f"e{n}": 1 for n in range(40)}
    # One ends: its shippers connect again and find the other.
    first.end()
    for number in range(20):
        with second.connect() as sock:
            sock.sendall(frame([impression(100 + number)], f"d{number}"))
            assert read_value(sock) == {"ack": f"d{number}"}
    for sock in socks:
        sock.close()
    second.end()
    for process in processes:
        last = {line["partition"]: line["bye"] for line in process.lines() if "bye" in line}
        assert last == dict.fromkeys(range(4), True)


def test_sigterm_acks_what_was_read_says_goodbye_and_takes_nobody_new(tmp_path: Path, processes: list[Process]) -> None:
    # Receipts come half a second late, so SIGTERM finds every chunk on its way.
    processes.append(Process(tmp_path, "g1", receipt_s=0.5))
    (gateway,) = processes
    with gateway.connect() as sock:
        for number in range(100):
            sock.sendall(frame([impression(number)], f"c{number}"))
        eventually(lambda: len(gateway.ids()) == 100, "read and sent")
        gateway.terminate()
        assert sorted(a["ack"] for a in read_values(sock, 100)) == sorted(f"c{n}" for n in range(100))
        assert ended(sock)
    gateway.end()
    with pytest.raises(OSError):
        gateway.connect()
    assert sorted(gateway.ids()) == sorted(f"e{n}" for n in range(100))
    assert [line["bye"] for line in gateway.lines()[-4:]] == [True] * 4


def test_sigterm_with_kafka_away_ends_in_time_without_an_ack_or_a_goodbye(
    tmp_path: Path, processes: list[Process]
) -> None:
    processes.append(Process(tmp_path, "g1", receipt_s=3_600))
    (gateway,) = processes
    with gateway.connect() as sock:
        sock.sendall(frame([impression(1)], "c1"))
        eventually(lambda: bool(gateway.ids()), "sent")
        begun = time.monotonic()
        gateway.end()
        assert read_value(sock) is None
    # The supervisor's patience is 5 s; the drain's own bound is 2 s.
    assert time.monotonic() - begun < 5
    assert not any(line.get("bye") for line in gateway.lines())


def _bomb(plain_bytes: int, how: str) -> bytes:
    """Return a message whose body is nothing but zeros when unpacked."""
    zeros = b"\0" * (1 << 20)
    if how == "gzip":
        packed = b"".join(gzip.compress(zeros * 16) for _ in range(plain_bytes >> 24))
    else:
        packed = pa.Codec("zstd").compress(zeros * (plain_bytes >> 20), asbytes=True)
    return bytes(msgpack.packb(["shop.impression", packed, {"compressed": how, "chunk": "bomb"}]))


def test_declared_lengths_and_bombs_cost_no_memory(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(Process(tmp_path, "calm"))
    with processes[0].connect() as sock:
        sock.sendall(frame([impression(1)], "c1"))
        assert read_value(sock) == {"ack": "c1"}
    calm_kib = processes[0].end()["peak_kib"]
    processes.append(Process(tmp_path, "hostile"))
    gateway = processes[1]
    giga = (1 << 30).to_bytes(4, "big")
    tag = b"\xafshop.impression"
    claims = [
        b"\xdb" + giga,
        b"\xdd" + giga,
        b"\xdf" + giga,
        b"\xc9" + giga + b"\0",
        b"\x92" + tag + b"\xc6" + giga,
        b"\x92" + tag + b"\xdd" + giga,
        b"\x93" + tag + b"\x00\x81\xa1a\xdb" + giga,
        b"\x92" + tag + b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"[" * 100_000 + b"\xff",
        b'["' + b"x" * 100_000 + b"\xff\xfe",
    ]
    bombs = [_bomb(1 << 30, "gzip"), _bomb(1 << 30, "zstd"), _bomb(1 << 24, "gzip") * 40]
    for wire in claims + bombs:
        with gateway.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(wire)
                sock.sendall(b"\0" * 100_000)
                sock.shutdown(socket.SHUT_WR)
            assert ended(sock), wire[:20]
    with gateway.connect() as sock:
        sock.sendall(frame([impression(2)], "c2"))
        assert read_value(sock) == {"ack": "c2"}
    said = gateway.end()
    refused = {k: n for k, n in said["counts"].items() if k.startswith("connections_refused_total:")}
    assert refused["connections_refused_total:too_large"] >= 6, refused
    assert "connections_refused_total:internal" not in refused
    # One message of 16 MiB, unpacked, its scan and its dead letter; 1 GiB is what was claimed.
    assert said["peak_kib"] - calm_kib < 200 * 1024, (calm_kib, said["peak_kib"], refused)


_CLIENTS = """
import socket, sys, time
port, count = int(sys.argv[1]), int(sys.argv[2])
socks = []
for _ in range(count):
    socks.append(socket.create_connection(("127.0.0.1", port), timeout=30))
print(len(socks), flush=True)
sys.stdin.readline()
"""


def test_ten_thousand_idle_connections_leave_room_for_a_shipper(tmp_path: Path, processes: list[Process]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # As many as one process may have here: 10,000 needs `ulimit -Hn` of some 11,000.
    count = min(10_000, (hard if hard != resource.RLIM_INFINITY else 1 << 20) - 600)
    processes.append(Process(tmp_path, "g1", connections_max=count + 10))
    (gateway,) = processes
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        clients = subprocess.Popen(
            [sys.executable, "-c", _CLIENTS, str(gateway.port), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert clients.stdout is not None
        assert clients.stdout.readline().strip() == str(count)
        with gateway.connect() as sock:
            for number in range(20):
                sock.sendall(frame([impression(number)], f"c{number}"))
                assert read_value(sock) == {"ack": f"c{number}"}
    finally:
        clients.communicate("\n")
    said = gateway.end()
    assert not [key for key in said["counts"] if key.startswith("connections_refused_total")]
    print(f"{count} idle connections, {said['peak_kib'] >> 10} MiB")
