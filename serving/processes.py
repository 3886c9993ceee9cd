"""The processes of serving: all of them answer on one port, the first one also updates the model that they share.

1. The first process makes the shared region, or takes over the one of an earlier stage, and forks the workers. Each
   worker reads it by the mapping that it was born with, and lets go of it when the region grows. No thread is begun
   before, whose locks a worker would find held for ever.
2. Each process answers requests in its main thread; the other jobs of a process are threads beside it.
3. A job that fails ends its process. A worker that ends ends the stage: the supervisor starts all of it again.
4. SIGHUP asks the first process for a restart that keeps the port (`renewal.py`), SIGTERM for an end without a request
   that is dropped (`draining.py`).
5. At the end the first process asks the workers to stop, waits for at most 3 s, and kills those that are left. The
   region stays, so that the next stage serves at once. A worker also ends when the first process dies.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from starlette.applications import Starlette

from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.process.awake import awake_s
from headrace.process.http_bounds import BoundedConfig, ConnectionBounds
from headrace.process.open_files import connections_within
from headrace.serving.draining import DrainingServer, Ending
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.renewal import DRAIN_S, Renewal

logger = logging.getLogger("headrace.serve")

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


class Workers:
    """The processes that the first one forked."""

    def __init__(self) -> None:
        self._pids: list[int] = []

    def start(self, number: int, work: Callable[[], int]) -> None:
        """Fork worker `number`. `work` returns its exit status; an exception is logged and makes it 1."""
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            os._exit(_status_of(number, work))
        self._pids.append(pid)

    def watch(self, stop: threading.Event) -> None:
        """Return when `stop` is set. Raises `Unavailable` when a worker ends before that."""
        while not stop.wait(0.2):
            for pid in tuple(self._pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                self._pids.remove(pid)
                if not stop.is_set():
                    raise Unavailable(f"worker {pid} ended with status {status}.")

    def ask_to_end(self, number: int = signal.SIGINT) -> None:
        """Send a signal to each worker; SIGINT ends it without draining."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, patience_s: float) -> None:
        """Wait until all workers have ended, for at most `patience_s`."""
        until = awake_s() + patience_s
        while self._pids and awake_s() < until:
            for pid in tuple(self._pids):
                with suppress(ChildProcessError):
                    if os.waitpid(pid, os.WNOHANG) == (0, 0):
                        continue
                self._pids.remove(pid)
            time.sleep(0.02)

    def end(self, patience_s: float = 3.0) -> None:
        """Ask the workers to stop, wait for them for at most `patience_s`, all together, and kill what is left.

        A worker that hangs would keep the port of the next stage.
        """
        self.ask_to_end()
        until = awake_s() + patience_s
        for pid in self._pids:
            with suppress(ChildProcessError, ProcessLookupError):
                while (is_left := os.waitpid(pid, os.WNOHANG) == (0, 0)) and awake_s() < until:
                    time.sleep(0.02)
                if is_left:
                    logger.error("worker %d did not end in %.0f s and is killed", pid, patience_s)
                    os.kill(pid, signal.SIGKILL)

    def __len__(self) -> int:
        return len(self._pids)


def run_processes(
    count: int, *, open_region: Callable[[], SharedModel], work: Callable[[SharedModel, Workers | None], int]
) -> int:
    """Run `count` processes until they end, and return the exit status of the first, which is this one.

    Args:
        open_region: makes the shared model or takes it over.
        work: what a process does, with the workers in the first process and with None in a worker.
    """
    shared, workers = open_region(), Workers()

    def as_reader(number: int) -> int:
        shared.become(number)
        return work(shared, None)

    try:
        for number in range(1, count):
            workers.start(number, partial(as_reader, number))
        return work(shared, workers)
    finally:
        workers.end()


def answer_requests(
    app: Starlette,
    listener: socket.socket,
    stop: threading.Event,
    *,
    jobs: Mapping[str, Callable[[], None]],
    workers: Workers | None = None,
    turned: Callable[[], None] = lambda: None,
    connections_max: int = 2_048,
    refused: Callable[[str], None] = lambda _: None,
    renewal: Renewal | None = None,
    begins: Callable[[], None] = lambda: None,
    ending: Ending = Ending(),  # noqa: B008
) -> int:
    """Answer requests until `stop` or SIGTERM, with `jobs` in threads beside it; return the exit status.

    The loop that answers calls `turned` about once a second. A job returns soon after `stop` is set. One that raises
    ends the process with status 1.

    Args:
        connections_max: beyond it the connection that has been idle longest gives way.
        refused: gets the reason for which a connection was closed.
        renewal: whether a restart is asked for, which ends it like `stop`, but for its connections.
        begins: called when the jobs have begun, before the first connection is accepted.
        ending: what SIGTERM does, and what else answers in the same loop.
    """
    bounds = ConnectionBounds(connections_within(connections_max), lambda _origin, reason, _why: refused(reason))

    async def tell() -> None:
        bounds.sweep(awake_s())
        turned()
        if renewal is not None and renewal.is_asked:
            await _drain(server, bounds)

    server = DrainingServer(
        BoundedConfig(
            app,
            bounds,
            log_level=None,
            timeout_graceful_shutdown=math.ceil(ending.answer_s),
            callback_notify=tell,
            timeout_notify=1,
        ),
        ending,
        is_first=workers is not None,
        hand_on=lambda: workers.ask_to_end(signal.SIGTERM) if workers else None,
        # Only then: the jobs keep the model and the counters fresh while it drains.
        drained=stop.set,
    )
    failures: list[str] = []

    def failed(what: str) -> None:
        failures.append(what)
        server.should_exit = True

    jobs = dict(jobs)
    if workers:
        jobs["workers"] = lambda: workers.watch(stop)
    if renewal is not None:
        renewal.begin(partial(_end_jobs, stop, workers))
    threads = [_begun(name, job, stop, failed) for name, job in jobs.items()]
    begins()
    if not stop.is_set():
        server.run(sockets=[listener])
    stop.set()
    is_renewed = renewal is not None and renewal.is_asked
    # Workers that drain do so as this process did, a moment later.
    _await_all(workers, threads, DRAIN_S + ending.answer_s if is_renewed or server.is_drained else 0.0)
    return 1 if failures else 0


def _begun(
    name: str, job: Callable[[], None], stop: threading.Event, failed: Callable[[str], None]
) -> threading.Thread:
    """Return the thread that runs a job. `failed` is told where it raises, or returns before `stop` is set."""

    def guarded() -> None:
        try:
            job()
            if not stop.is_set():
                raise Unavailable(f"{name} has ended by itself")
        except BaseException as error:
            logger.exception("%s failed; the stage ends", name)
            failed(f"{name}: {error}")

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread


def _await_all(workers: Workers | None, threads: Sequence[threading.Thread], patience_s: float) -> None:
    """Wait for the workers' own end, then tell them to, and wait a second for the threads."""
    if workers:
        workers.wait(patience_s)
        workers.ask_to_end()
    # 1 s for all: a thread that still waits for a broker ends with the process.
    until = awake_s() + 1.0
    for thread in threads:
        thread.join(max(0.0, until - awake_s()))


def _end_jobs(stop: threading.Event, workers: Workers | None) -> None:
    """Let all but the answering of requests end, for a renewal; the workers drain their connections too."""
    stop.set()
    if workers:
        workers.ask_to_end(signal.SIGHUP)


async def _drain(server: DrainingServer, bounds: ConnectionBounds) -> None:
    """Send clients to new connections, stop accepting, let the last answers out, and end. The next image accepts on."""
    bounds.drain()
    await asyncio.sleep(DRAIN_S)
    await server.accept_no_more(shuts=False)
    server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return the socket that all processes accept on. Raises `ConfigRejected` when the port is taken."""
    # The protocol is given: asyncio sets TCP_NODELAY on no other socket, and an answer would wait 40 ms for an ack.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigRejected(f"{host}:{port} is taken ({error}); choose another PORT_BASE.") from error
    listener.listen(512)
    listener.set_inheritable(True)
    return listener


def _status_of(number: int, work: Callable[[], int]) -> int:
    """Return the exit status of `work`. Whatever it raises ends here, in the forked process, with a line in the log."""
    try:
        return work()
    except BaseException:
        logger.exception("worker %d failed", number)
        return 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGINT)
