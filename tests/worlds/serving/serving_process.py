"""A small serving stage in a process of its own: real workers, a real socket, a shared region, no Kafka.

    python serving_process.py FOLDER WORKERS [JOB]

Prints the port. GET / answers the process id, GET /slow too, after 0.3 s, GET /draining whether it was told to end,
GET /renewals how often its first process was renewed, GET /region what the shared region of that process is. JOB
"fails" makes a job of the first process fail as soon as the file FOLDER/fail is there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from headrace.serving.draining import Ending
from headrace.serving.model.region_file import open_region, region_path
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.processes import Workers, answer_requests, listen, run_processes
from headrace.serving.renewal import RENEWALS, Renewal, inherited, run_anew

DIM, ROWS_MAX = 2, 100


PORT, DRAIN_S = "SERVING_PROCESS_PORT", "SERVING_PROCESS_DRAIN_S"


def work(shared: SharedModel, listener: socket.socket, folder: Path, workers: Workers | None, renewal: Renewal) -> int:
    """Answer until SIGTERM, which uvicorn raises again when it has stopped, or SIGHUP."""
    stop, told = threading.Event(), list[bool]()
    for number_of_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_of_signal, lambda *_: stop.set())

    async def number(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(os.getpid()))

    async def slow(request: Request) -> PlainTextResponse:
        await asyncio.sleep(0.3)
        return PlainTextResponse(str(os.getpid()))

    async def draining(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(bool(told)))

    async def region(request: Request) -> PlainTextResponse:
        return PlainTextResponse(shared.refused())

    async def renewals(request: Request) -> PlainTextResponse:
        return PlainTextResponse(os.environ.get(RENEWALS, "0"))

    def fail() -> None:
        while not stop.wait(0.02):
            if (folder / "fail").exists():
                raise ValueError("told to fail")

    if workers is not None:
        shared.note_refusal("seen by all")
    routes = [Route("/", number), Route("/region", region), Route("/renewals", renewals)]
    routes += [Route("/slow", slow), Route("/draining", draining)]
    jobs = {"job": fail} if workers is not None else {}
    return answer_requests(
        Starlette(routes=routes),
        listener,
        stop,
        jobs=jobs,
        workers=workers,
        renewal=renewal,
        ending=Ending(drain_s=float(os.environ.get(DRAIN_S, "0")), drains=lambda: told.append(True)),
    )


def opened(path: Path) -> SharedModel:
    """Open the region as its writer."""
    return open_region(path, dim=DIM, rows_max=ROWS_MAX, is_good=lambda meta: True)


def main() -> int:
    """Run the stage."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    renewal, port = Renewal(), int(os.environ.get(PORT, "0"))
    listener = inherited("127.0.0.1", port) or listen("127.0.0.1", port)
    os.environ[PORT] = str(listener.getsockname()[1])
    kept = os.dup(listener.fileno())
    path = region_path(folder, dim=DIM, rows_max=ROWS_MAX, memory=folder / "no memory")
    print(listener.getsockname()[1], flush=True)
    status = run_processes(
        count,
        open_region=lambda: opened(path),
        work=lambda shared, workers: work(shared, listener, folder, workers, renewal),
    )
    if renewal.is_asked and status == 0:
        run_anew(kept, sys.orig_argv, dict(os.environ))
    return status


if __name__ == "__main__":
    sys.exit(main())
