"""Answer POST /v1/rank on the live model, which changes while it answers."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn
from prometheus_client import generate_latest

from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.addresses import HOST
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.contract.privacy import KEY_NAME, Privacy
from headrace.serving.api.app import Face, make_app
from headrace.serving.features import FeatureMemory
from headrace.serving.feedback import ImpressionLog
from headrace.serving.model.shared_region import SharedModel, region_bytes
from headrace.serving.model.updater import Updater

logger = logging.getLogger("headrace.serve")
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)
    parser.add_argument("--workers", type=int, help="processes that share the port (serve.workers)")


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM. The first process updates the model; all of them answer."""
    runtime = open_runtime(args)
    workers = args.workers or runtime.config.serve.workers
    path = _region(runtime)
    shared = _open(runtime, path, reader=0, create=True)
    listener = _listen(runtime.port("serving"))
    children: list[int] = []
    for number in range(1, workers):
        child = os.fork()
        if child == 0:
            _die_with_parent()
            os._exit(_answer(runtime, path, number, listener))
        children.append(child)
    try:
        return _work(runtime, shared, listener, children)
    finally:
        _end(children)
        shared.remove()


def _answer(runtime: Runtime, path: Path, number: int, listener: socket.socket) -> int:
    """Work as process `number`; whatever is raised ends here, in the forked process, with its line in the log."""
    try:
        return _work(runtime, _open(runtime, path, reader=number, create=False), listener, None)
    except BaseException:
        logger.exception("worker %d failed", number)
        return 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)


def _work(runtime: Runtime, shared: SharedModel, listener: socket.socket, children: list[int] | None) -> int:
    """Answer requests; with `children`, update the model and watch them too. Returns the exit status."""
    # uvicorn raises the signal again when it has stopped: this handler takes it, and the exit status is 0.
    stop, is_first = stop_event(), children is not None
    features, config = FeatureMemory(runtime.project.crawls), runtime.config.serve
    # Only the first process has the stage's metrics port; another one answers /metrics with its own requests.
    metrics = runtime.metrics("serve") if is_first else PrometheusMetrics("serve", 0)
    updater: Updater | None = None
    if is_first:
        updater = Updater(
            project=runtime.project,
            topics=runtime.topics,
            shared=shared,
            reader=runtime.reader(),
            blobs=runtime.blobs(),
            metrics=metrics,
            clock=runtime.clock,
            stop=stop,
        )
    impressions = ImpressionLog(
        runtime.project, port=runtime.port("forward"), spool_dir=runtime.home / "spool" / "serve", host=HOST
    )
    face = Face(
        project=runtime.project,
        config=config,
        shared=shared,
        features=features,
        metrics=metrics,
        metrics_text=lambda: bytes(generate_latest(metrics.registry)),
        clock=runtime.clock,
        impressions=impressions,
        privacy=Privacy(runtime.project, os.environ.get(KEY_NAME, "")),
    )
    server = uvicorn.Server(
        uvicorn.Config(make_app(face), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    )
    failures: list[str] = []

    def guarded(name: str, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Exception as error:
                logger.exception("%s failed; the stage ends", name)
                failures.append(f"{name}: {error}")
                server.should_exit = True

        return threading.Thread(target=run, name=name, daemon=True)

    reader = runtime.reader()
    jobs = [guarded("counters", lambda: features.follow(reader, runtime.topics.features, stop))]
    if updater is not None:
        jobs.append(guarded("updater", updater.run))
        jobs.append(guarded("readiness", lambda: _tell_readiness(face, metrics, stop)))
    if children:
        jobs.append(guarded("workers", lambda: _watch(children, stop)))
    for job in jobs:
        job.start()
    if not stop.is_set():
        server.run(sockets=[listener])
    stop.set()
    _ask_to_end(children or [])
    impressions.close()
    # 1 s for all: a thread that still waits for a broker ends with the process.
    until = time.monotonic() + 1.0
    for job in jobs:
        job.join(max(0.0, until - time.monotonic()))
    return 1 if failures else 0


def _tell_readiness(face: Face, metrics: PrometheusMetrics, stop: threading.Event) -> None:
    while not stop.is_set():
        reason = face.not_ready()
        metrics.ready(not reason, reason)
        stop.wait(0.1 if reason else 1.0)


def _watch(children: list[int], stop: threading.Event) -> None:
    """End the stage when a worker died: the supervisor starts all of it again."""
    while not stop.wait(0.2):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child and not stop.is_set():
            children.remove(child)
            raise Unavailable(f"worker {child} ended with status {status}.")


def _ask_to_end(children: list[int]) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)


def _end(children: list[int]) -> None:
    """Ask the workers to stop, and wait for them for at most 3 s."""
    _ask_to_end(children)
    until = time.monotonic() + 3.0
    for child in children:
        with suppress(ChildProcessError):
            while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < until:
                time.sleep(0.02)


def _region(runtime: Runtime) -> Path:
    """Return the file of the shared model, one for each local state: in memory where /dev/shm has room for it."""
    name = f"headrace-model-{hashlib.sha256(str(runtime.home).encode()).hexdigest()[:16]}"
    memory, size = Path("/dev/shm"), region_bytes(runtime.project.recipe.row_dim, runtime.config.serve.rows_max)
    if os.access(memory, os.W_OK):
        (memory / name).unlink(missing_ok=True)
        if shutil.disk_usage(memory).free > size:
            return memory / name
    folder = runtime.home / "run"
    folder.mkdir(parents=True, exist_ok=True)
    logger.warning("/dev/shm has no room for %d MB; the model lies in %s", size // 1_000_000, folder)
    return folder / name


def _open(runtime: Runtime, path: Path, *, reader: int, create: bool) -> SharedModel:
    rows_max, dim = runtime.config.serve.rows_max, runtime.project.recipe.row_dim
    return SharedModel(path, dim=dim, rows_max=rows_max, reader=reader, create=create)


def _listen(port: int) -> socket.socket:
    # With the protocol told: asyncio sets TCP_NODELAY on no other socket, and an answer would wait 40 ms for an ack.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise ConfigRejected(f"{HOST}:{port} is taken ({error}); choose another PORT_BASE.") from error
    listener.listen(512)
    listener.set_inheritable(True)
    return listener
