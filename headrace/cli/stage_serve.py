"""Answer POST /v1/rank on the live model, which changes while it answers."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import uvicorn
from prometheus_client import generate_latest

from headrace.backends.metrics_memory import MemoryMetrics
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.runtime import HOST, Runtime, add_common, open_runtime
from headrace.contract.errors import ConfigRejected
from headrace.serving.app import Face, make_app
from headrace.serving.features import FeatureMemory
from headrace.serving.feedback import ImpressionLog
from headrace.serving.live import Updater
from headrace.serving.shared_model import SharedModel

HELP = "answer POST /v1/rank on the live model, which changes while it answers"
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
    path = _region(runtime.home)
    shared = _open(runtime, path, reader=0, create=True)
    listener = _listen(runtime.port("serving"))
    children: list[int] = []
    for number in range(1, workers):
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
            os._exit(_work(runtime, _open(runtime, path, reader=number, create=False), listener, None))
        children.append(child)
    try:
        return _work(runtime, shared, listener, children)
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)
        shared.remove()


def _work(runtime: Runtime, shared: SharedModel, listener: socket.socket, children: list[int] | None) -> int:
    """Answer requests; with `children`, update the model and watch them too. Returns the exit status."""
    stop, is_first = threading.Event(), children is not None
    features, config = FeatureMemory(), runtime.config.serve
    prometheus = runtime.metrics("serve") if is_first else None
    metrics = prometheus or MemoryMetrics()
    updater: Updater | None = None
    if is_first:
        updater = Updater(
            model_name=runtime.project.name,
            dim=runtime.project.recipe.dim,
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
        metrics_text=lambda: bytes(generate_latest(prometheus.registry)) if prometheus is not None else b"",
        clock=runtime.clock,
        impressions=impressions,
        refused=lambda: updater.refused if updater is not None else "",
    )
    server = uvicorn.Server(
        uvicorn.Config(make_app(face), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
    )
    jobs = [threading.Thread(target=features.follow, args=(runtime.reader(), runtime.topics.features, stop))]
    if updater is not None:
        jobs.append(threading.Thread(target=updater.run, name="updater"))
        if prometheus is not None:
            jobs.append(threading.Thread(target=_tell_readiness, args=(face, prometheus, stop)))
    failures: list[int] = []
    if children:
        jobs.append(threading.Thread(target=_watch, args=(children, server, failures, stop)))
    for job in jobs:
        job.daemon = True
        job.start()
    server.run(sockets=[listener])
    stop.set()
    impressions.close()
    for job in jobs:
        job.join(2)
    return 1 if failures else 0


def _tell_readiness(face: Face, metrics: PrometheusMetrics, stop: threading.Event) -> None:
    while not stop.is_set():
        reason = face.not_ready()
        metrics.ready(not reason, reason)
        stop.wait(0.1 if reason else 1.0)


def _watch(children: list[int], server: uvicorn.Server, failures: list[int], stop: threading.Event) -> None:
    """End the stage when a worker died: the supervisor starts all of it again."""
    while not stop.is_set():
        child, status = os.waitpid(-1, os.WNOHANG)
        if child and not stop.is_set():
            logger.error("worker %d ended with status %d; restarting the stage", child, status)
            children.remove(child)
            failures.append(child)
            server.should_exit = True
            return
        time.sleep(0.2)


def _region(home: Path) -> Path:
    """Return the file of the shared model: in memory where the system has /dev/shm, one for each local state."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        folder = home / "run"
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"headrace-model-{hashlib.sha256(str(home).encode()).hexdigest()[:16]}"


def _open(runtime: Runtime, path: Path, *, reader: int, create: bool) -> SharedModel:
    rows_max, dim = runtime.config.serve.rows_max, runtime.project.recipe.dim
    return SharedModel(path, dim=dim, rows_max=rows_max, reader=reader, create=create)


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise ConfigRejected(f"{HOST}:{port} is taken ({error}); choose another PORT_BASE.") from error
    listener.listen(512)
    listener.set_inheritable(True)
    return listener
