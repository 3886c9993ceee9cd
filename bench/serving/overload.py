"""What serving does with three times the requests that it can answer: those that it answers, and those that it refuses.

Method: one process serves the demo shop's spec and recipe as `bench/serving/rank.py` does. A load generator in a
process of its own, on the other core where there are two, first finds the capacity with a few connections that ask
without pause.
Then it sends requests at set times, `--times` the capacity, whether or not the ones before are answered (an open
loop), over as many kept connections as it takes; time is from the moment that a request was due. One in ten has one
candidate, the others have 100. The same again with a bound that is never reached shows what it prevents.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

# One thread, as the stack starts every stage: BLAS threads that wait for each other spin.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.figures import Figure, show
from harness.shop_serving import bodies, shop_dependencies, shop_visits

from headrace.serving.api.app import ServingApp, make_app
from headrace.serving.processes import answer_requests, listen

QUEUE_MS = 100
CONNECTIONS_MAX = 1_000
"""Of the load generator. A request that finds none free is not sent, and counts as unsent."""
MANY, FEW = 100, 1
HEAD = b"POST /v1/rank HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def serve(folder: Path, listener: socket.socket, queue_ms: int) -> int:
    """Answer until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    found = shop_dependencies(folder, shop_visits())
    config = msgspec.structs.replace(found.config, queue_ms=queue_ms)
    app = ServingApp(replace(found, config=config))
    return answer_requests(make_app(app), listener, stop, jobs={})


def begin(folder: Path, core: int, queue_ms: int) -> tuple[int, int]:
    """Return the process that serves, and its port."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        status = 1
        try:
            status = serve(folder, listener, queue_ms)
        finally:
            os._exit(status)
    listener.close()
    return pid, port


class Load:
    """Requests to one port, and what came of them: (candidates, status) -> seconds from when each was due."""

    def __init__(self, port: int) -> None:
        self._port, self._free = port, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        self._opened = 0
        self.took: dict[tuple[int, int], list[float]] = {}
        self.lost: Counter[str] = Counter()
        self._bodies = {size: [next(stream) for _ in range(100)] for size, stream in _streams()}
        self._sent = 0

    async def ask(self, size: int, due_s: float) -> None:
        """Send one request and note what comes."""
        if self._free:
            reader, writer = self._free.pop()
        elif self._opened < CONNECTIONS_MAX:
            self._opened += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        else:
            self.lost["unsent"] += 1
            return
        self._sent += 1
        body = self._bodies[size][self._sent % 100]
        try:
            writer.write(HEAD % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.lost[type(error).__name__] += 1
            self._opened -= 1
            writer.close()
            return
        self._free.append((reader, writer))
        self.took.setdefault((size, int(head[9:12])), []).append(time.perf_counter() - due_s)

    async def without_pause(self, seconds: float, clients: int = 3) -> float:
        """Return the answers a second of a few clients that ask without pause."""
        until_s, before = time.perf_counter() + seconds, self._sent

        async def client(number: int) -> None:
            turn = number
            while time.perf_counter() < until_s:
                turn += 1
                await self.ask(FEW if turn % 10 == 0 else MANY, time.perf_counter())

        await asyncio.gather(*(client(number) for number in range(clients)))
        return (self._sent - before) / seconds

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Send `rate` requests a second, by chance as clients that know nothing of each other."""
        random = np.random.default_rng(1)
        due_s, tasks = time.perf_counter(), list[asyncio.Task[None]]()
        until_s = due_s + seconds
        while due_s < until_s:
            due_s += random.exponential(1 / rate)
            if (early_s := due_s - time.perf_counter()) > 0.001:
                await asyncio.sleep(early_s)
            size = FEW if len(tasks) % 10 == 0 else MANY
            tasks.append(asyncio.create_task(self.ask(size, due_s)))
        await asyncio.wait(tasks, timeout=60.0)


def _streams() -> list[tuple[int, object]]:
    visits = shop_visits()
    return [(size, bodies(visits, size)) for size in (FEW, MANY)]


def measure(port: int, times: float, seconds: float, rate: float | None) -> tuple[float, Load]:
    """Return the capacity, measured where `rate` is None, and the load at `times` the capacity."""

    async def run() -> tuple[float, Load]:
        warm = Load(port)
        await warm.without_pause(2.0)
        capacity = await warm.without_pause(min(5.0, seconds)) if rate is None else rate
        load = Load(port)
        await load.at_rate(times * capacity, seconds)
        return capacity, load

    return asyncio.run(run())


def figures_of(load: Load, name: str, seconds: float, peer: dict[str, float]) -> list[Figure]:
    """Return the figures of one load; `peer` has those without a bound, by the same names."""
    total = sum(map(len, load.took.values())) + sum(load.lost.values())
    found: dict[str, tuple[float, str]] = {}
    for size, words in ((MANY, "100"), (FEW, "1")):
        answered = np.array(load.took.get((size, 200), [np.nan])) * 1_000
        asked = sum(len(took) for (each, _), took in load.took.items() if each == size)
        found[f"p50_{words}"] = round(float(np.quantile(answered, 0.5)), 1), "ms"
        found[f"p99_{words}"] = round(float(np.quantile(answered, 0.99)), 1), "ms"
        found[f"answered_{words}"] = round(len(load.took.get((size, 200), [])) / max(1, asked), 3), "share"
    refused = np.array([t for (_, status), took in load.took.items() if status == 429 for t in took] or [np.nan])
    answered = sum(len(took) for (_, status), took in load.took.items() if status == 200)
    found["answered_per_s"] = round(answered / seconds, 1), "1/s"
    found["refused"] = round(len(refused) / total, 3), "share"
    found["refused_p50"] = round(float(np.quantile(refused, 0.5)) * 1_000, 1), "ms"
    found["refused_p99"] = round(float(np.quantile(refused, 0.99)) * 1_000, 1), "ms"
    others = sum(len(took) for (_, status), took in load.took.items() if status not in (200, 429))
    found["lost"] = round((others + sum(load.lost.values())) / total, 4), "share"
    return [
        Figure(f"overload_{name}_{each}", value, unit)
        if not peer
        else Figure(f"overload_{name}_{each}", value, unit, peer="no bound", peer_value=peer.get(each))
        for each, (value, unit) in found.items()
    ]


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 s in place of 30")
    parser.add_argument("--times", type=float, default=3.0, help="of the capacity (%(default)g)")
    arguments = parser.parse_args()
    seconds = 5.0 if arguments.quick else 30.0
    cores = sorted(os.sched_getaffinity(0))
    figures: list[Figure] = []
    capacity: float | None = None
    for name, queue_ms in (("bound", QUEUE_MS), ("no_bound", 60_000)):
        with tempfile.TemporaryDirectory(prefix="headrace-overload-", dir="/dev/shm") as folder:
            pid, port = begin(Path(folder), cores[0], queue_ms)
            os.sched_setaffinity(0, {cores[-1]})
            try:
                capacity, load = measure(port, arguments.times, seconds, capacity)
            finally:
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
                os.sched_setaffinity(0, set(cores))
        figures += figures_of(load, name, seconds, {})
        offered = arguments.times * capacity
        print(f"{name}: capacity {capacity:.0f} requests/s, offered {offered:.0f}; {dict(load.lost)}")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    show(figures)


if __name__ == "__main__":
    main()
