"""Events/s from Fluent forward to Kafka on one core, acked, beside the same path written plainly.

Method: a broker of its own. The gateway runs on core 0 alone; the broker and the client on the others. The client sends
packed chunks of 1,000 events, each with an id of its own, and keeps 16 unacked. Ours is `headrace ingest`; the plain
one decodes each entry with msgpack, makes JSON of it and calls confluent-kafka's produce per event, and acks a chunk
when all its events have receipts (bench/peers/gateway.py). Sides take turns; figures are medians. Where fluentd or
fluent-bit is on the PATH, its own Kafka output takes part.

Two rates: by the wall, and per second of CPU that the gateway took, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from harness.broker import broker
from harness.figures import beside, show

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.contract.config import port
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local.layout import HOST, Layout

CHUNK_EVENTS = 1_000
WINDOW = 16
PLAIN_TOPIC = "plain"
PARTITIONS = 4
ID_DIGITS, CHUNK_DIGITS = 12, 9

PROJECT_FILE = """
from headrace.contract.project import FeedbackType, ImpressionType, Project, Task
from headrace.contract.spec import Categorical, FeatureSpec

FIELDS = {"user_id": "int64", "item_id": "int64", "price": "float64", "mobile": "bool", "query": "string",
          "agent": "string"}
PROJECT = Project(
    name="bench",
    impression=ImpressionType(tag="bench.impression", key="user_id", fields=FIELDS),
    feedback=(FeedbackType(name="click", tag="bench.click", fields={"item_id": "int64"}),),
    tasks=(Task(name="click", feedback="click", window_ms=10_000),),
    features=FeatureSpec(features=(Categorical(field="item_id"),)),
).checked()
"""
ENTRY_BYTES = (200, 1_000)


class Chunks:
    """Packed chunks of events of about `entry_bytes` each; every event's id is written in before a chunk goes."""

    def __init__(self, entry_bytes: int) -> None:
        rng = np.random.default_rng(7)
        pad = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0 Safari/537.36 " * 10
        entries, at, places = [], 0, []
        now = int(time.time())
        for number in range(CHUNK_EVENTS):
            own_id = f"{number:0{ID_DIGITS}d}"
            record = {
                "event_id": own_id,
                "request_id": own_id,
                "user_id": int(rng.integers(0, 100_000)),
                "item_id": int(rng.integers(0, 1_000_000)),
                "price": float(np.round(rng.random() * 100, 2)),
                "mobile": bool(rng.random() < 0.5),
                "query": f"q{int(rng.integers(0, 10_000))}",
                "agent": "",
            }
            event_time = msgpack.ExtType(0, now.to_bytes(4, "big") + b"\0\0\0\0")
            record["agent"] = pad[: max(8, entry_bytes - len(msgpack.packb([event_time, record])) - 1)]
            entry = msgpack.packb([event_time, record])
            first = entry.index(own_id.encode())
            places += [at + first, at + entry.index(own_id.encode(), first + ID_DIGITS)]
            entries.append(entry)
            at += len(entry)
        self._body = np.frombuffer(bytearray(b"".join(entries)), np.uint8)
        self._places_PD = np.array(places)[:, None] + np.arange(CHUNK_DIGITS)
        self.entry_bytes = len(self._body) / CHUNK_EVENTS
        self.sent = 0

    def next(self) -> bytes:
        """Return a whole forward message with new ids."""
        # An id is the chunk's number, then the event's within it, which never changes.
        self._body[self._places_PD] = np.frombuffer(b"%0*d" % (CHUNK_DIGITS, self.sent), np.uint8)
        self.sent += 1
        option = {"chunk": f"chunk-{self.sent}", "size": CHUNK_EVENTS}
        return bytes(msgpack.packb(["bench.impression", self._body.tobytes(), option]))


def drive(address: int, chunks: Chunks, seconds: float) -> tuple[int, float]:
    """Send for `seconds` with a window of unacked chunks; return (events acked, seconds until the last ack)."""
    unpacker, acked, sent = msgpack.Unpacker(), 0, 0
    with socket.create_connection((HOST, address), timeout=60) as link:
        begin = time.monotonic()
        until = begin + seconds
        while time.monotonic() < until or acked < sent:
            while sent - acked < WINDOW and time.monotonic() < until:
                link.sendall(chunks.next())
                sent += 1
            unpacker.feed(link.recv(65_536))
            acked += sum(1 for _ in unpacker)
        return acked * CHUNK_EVENTS, time.monotonic() - begin


def measure(
    command: list[str], env: dict[str, str], address: int, entry_bytes: int, seconds: float
) -> tuple[float, float]:
    """Start a gateway on core 0, warm it up, drive it; return events/s by the wall and by its CPU."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        seen = psutil.Process(process.pid)
        seen.cpu_affinity([0])
        _await(address, process)
        chunks = Chunks(entry_bytes)
        chunks.sent = int(time.time() * 1000) % 10**8
        drive(address, chunks, 2.0)
        before = sum(seen.cpu_times()[:2])
        events, wall = drive(address, chunks, seconds)
        return events / wall, events / (sum(seen.cpu_times()[:2]) - before)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _await(address: int, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the gateway ended: {process.stderr.read() if process.stderr else ''}")
        try:
            socket.create_connection((HOST, address), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"nothing listens on port {address} after 60 s")


def sides(layout: Layout, base: int) -> dict[str, tuple[list[str], int]]:
    """Return command line and port of every gateway that takes part."""
    ours, plain = port("forward", base), port("serving", base)
    here = Path(__file__).parent
    found = {
        "headrace": (
            [str(Path(sys.executable).with_name("headrace")), "ingest", "--project", str(layout.project)],
            ours,
        ),
        "plain": ([sys.executable, str(here / "peers" / "gateway.py"), layout.brokers, PLAIN_TOPIC, str(plain)], plain),
    }
    bit = shutil.which("fluent-bit")
    if bit:
        words = ["-i", "forward", "-p", f"listen={HOST}", "-p", f"port={plain}", "-o", "kafka", "-m", "*"]
        words += ["-p", f"brokers={layout.brokers}", "-p", f"topics={PLAIN_TOPIC}", "-f", "1"]
        found["fluent-bit"] = ([bit, *words], plain)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 4 s instead of five of 10 s")
    args = parser.parse_args()
    rounds, seconds, base = (1, 4.0, 24_100) if args.quick else (5, 10.0, 24_100)
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with broker(base, PROJECT_FILE, PARTITIONS) as layout:
        KafkaAdmin(layout.brokers).ensure_topics([TopicSpec(PLAIN_TOPIC, PARTITIONS, retention_ms=60_000)])
        env = os.environ | {
            "PORT_BASE": str(base),
            "HEADRACE_BROKERS": layout.brokers,
            "HEADRACE_STORE": layout.store,
            "HEADRACE_HOME": str(layout.home),
        }
        todo = sides(layout, base)
        for number in range(rounds):
            for size in ENTRY_BYTES:
                for name, (command, address) in todo.items():
                    rate = measure(command, env, address, size, seconds)
                    rates.setdefault((name, size), []).append(rate)
                    print(f"round {number + 1}: {name}, {size} bytes: {rate[0]:,.0f} events/s, {rate[1]:,.0f} a CPU s")
    by_size = {size: {name: found for (name, of), found in rates.items() if of == size} for size in ENTRY_BYTES}
    show([f for size in ENTRY_BYTES for f in beside(f"ingest_{size}_bytes", by_size[size], "plain", "gateway")])


if __name__ == "__main__":
    main()
