"""What an answer of `POST /v1/rank` costs, and how long it takes, at 1, 20, 100 and 500 candidates.

Method: one process serves the demo shop's spec and recipe with made-up weights, counters and crawled values
(`harness/shop_serving.py`) as `headrace serve` does, by the same functions. A client in a process of its own, on the
other core where there are two, asks over one kept connection, one request after the other. CPU is that of the serving
process, by the kernel's own count; time is that of the client from the first byte sent to the last one read.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

# One thread, as the stack starts every stage: BLAS threads that wait for each other spin.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show
from harness.shop_serving import bodies, shop_dependencies, shop_visits

from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.processes import answer_requests, listen

SIZES = (1, 20, 100, 500)
PREPARED = 200
"""Different requests a size; they are asked in turn."""


def cpu_s(pid: int) -> float:
    """Return how long a process has run on a processor, all threads together."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def serve(folder: Path, listener: socket.socket) -> int:
    """Answer until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    app = ServingApp(shop_dependencies(folder, shop_visits()))
    return answer_requests(make_app(app), listener, stop, jobs={})


def begin(folder: Path, core: int) -> tuple[int, int]:
    """Return the process that serves, and its port, once it answers."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        status = 1
        try:
            status = serve(folder, listener)
        finally:
            os._exit(status)
    listener.close()
    return pid, port


def ask(connection: http.client.HTTPConnection, body: bytes) -> bytes:
    """Return an answer's bytes. Raises `RuntimeError` where it is none."""
    connection.request("POST", "/v1/rank", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {data[:300]!r}")
    return data


def measure(port: int, pid: int, candidates: int, seconds: float) -> list[Figure]:
    """Return the figures of one size."""
    stream = bodies(shop_visits(), candidates)
    prepared = [next(stream) for _ in range(PREPARED)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for body in prepared[:20]:
        size = len(ask(connection, body))
    taken, before, started = [], cpu_s(pid), time.perf_counter()
    while time.perf_counter() - started < seconds or len(taken) < 100:
        at = time.perf_counter()
        ask(connection, prepared[len(taken) % PREPARED])
        taken.append(time.perf_counter() - at)
    spent = cpu_s(pid) - before
    connection.close()
    taken_ms = np.array(taken) * 1_000
    name = f"rank_{candidates}"
    return [
        Figure(f"{name}_cpu_ms", round(spent / len(taken) * 1_000, 3), "ms/request"),
        Figure(f"{name}_p50_ms", round(float(np.quantile(taken_ms, 0.5)), 3), "ms"),
        Figure(f"{name}_p99_ms", round(float(np.quantile(taken_ms, 0.99)), 3), "ms"),
        Figure(f"{name}_answer_bytes", size, "bytes"),
    ]


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 s a size in place of 20")
    quick = parser.parse_args().quick
    cores = sorted(os.sched_getaffinity(0))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="headrace-serving-", dir="/dev/shm") as folder:
        pid, port = begin(Path(folder), cores[0])
        os.sched_setaffinity(0, {cores[-1]})
        try:
            for candidates in SIZES:
                figures += measure(port, pid, candidates, 2.0 if quick else 20.0)
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    show(figures)


if __name__ == "__main__":
    main()
