"""Answer POST /v1/rank on the live model, which changes while it answers."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import generate_latest

from headrace.backends.health import LOOP, LOOP_HEALTHY_S, LOOP_READY_S, Health
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.addresses import HOST
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.contract.errors import ConfigRejected
from headrace.contract.privacy import KEY_NAME, Privacy
from headrace.serving.api.app import BODIES, DRAINING, RELEASE, ServingApp, make_app
from headrace.serving.api.dependencies import ServingDependencies
from headrace.serving.compile_ranking import compile_ranking
from headrace.serving.draining import Beside, Ending
from headrace.serving.features import FeatureMemory
from headrace.serving.gate.admit import can_serve
from headrace.serving.impression_log import ImpressionLog
from headrace.serving.model.growth import Room
from headrace.serving.model.region_file import open_region, region_path
from headrace.serving.model.shared_reader import WARM_EVERY_S, Told
from headrace.serving.model.shared_region import SharedModel
from headrace.serving.model.updater import Updater
from headrace.serving.processes import Workers, answer_requests, listen, run_processes
from headrace.serving.renewal import Renewal, await_read, inherited, run_anew

_LOOKING = "readiness"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the stage's flags."""
    add_common(parser)
    parser.add_argument("--workers", type=int, help="processes that share the port (serve.workers)")


def main(args: argparse.Namespace) -> int:
    """Run the stage until SIGTERM. The first process updates the model; all of them answer."""
    runtime = open_runtime(args)
    dim, rows_max = runtime.project.row_dim, runtime.config.serve.rows_max
    renewal, renewed = Renewal(), inherited(HOST, runtime.port("serving"))
    listener = renewed or listen(HOST, runtime.port("serving"))
    kept = os.dup(listener.fileno())
    path = region_path(runtime.home, dim=dim, rows_max=rows_max)

    def opened() -> SharedModel:
        is_good = partial(can_serve, project=runtime.project)
        room = Room(runtime.config.serve.memory_bytes)
        return open_region(path, dim=dim, rows_max=rows_max, is_good=is_good, room=room)

    compile_ranking()  # Before the workers are forked, which then have it too.
    status = run_processes(
        args.workers or runtime.config.serve.workers,
        open_region=opened,
        work=lambda shared, workers: _work(runtime, shared, listener, workers, renewal, renewed is not None),
    )
    if renewal.is_asked and status == 0:
        run_anew(kept, sys.orig_argv, dict(os.environ))
    return status


def _work(
    runtime: Runtime,
    shared: SharedModel,
    listener: socket.socket,
    workers: Workers | None,
    renewal: Renewal,
    waits: bool,
) -> int:
    """Answer requests; in the first process, which has `workers`, update the model too. Returns the exit status.

    Where it `waits`, requests wait too until the counters are read, and are not answered that they are not.
    """
    # uvicorn raises the signal again when it has stopped: this handler takes it, and the exit status is 0.
    stop, features = stop_event(), FeatureMemory(runtime.project.crawls)
    # Only the first process has the stage's metrics port; another one answers /metrics with its own requests.
    metrics = PrometheusMetrics("serve", 0) if workers is None else runtime.metrics("serve")
    impressions = ImpressionLog(
        runtime.project, port=runtime.port("forward"), spool_dir=runtime.home / "spool" / "serve", host=HOST
    )
    app = ServingApp(
        ServingDependencies(
            project=runtime.project,
            config=runtime.config.serve,
            shared=shared,
            features=features,
            metrics=metrics,
            metrics_text=lambda: bytes(generate_latest(metrics.registry)),
            clock=runtime.clock,
            impressions=impressions,
            privacy=Privacy(runtime.project, os.environ.get(KEY_NAME, "")),
        )
    )
    reader = runtime.reader()
    jobs: dict[str, Callable[[], None]] = {
        "counters": lambda: features.follow(
            reader, runtime.topics.features, stop, clock=runtime.clock, metrics=metrics
        ),
    }
    jobs |= {"what is told": lambda: _tell(app, stop), "what is prepared": lambda: _warm(shared, stop)}
    if workers is not None:
        updater = Updater(
            project=runtime.project,
            topics=runtime.topics,
            shared=shared,
            reader=runtime.reader(),
            blobs=runtime.blobs(),
            metrics=metrics,
            clock=runtime.clock,
            stop=stop,
            stuck_ms=runtime.config.serve.stuck_ms,
        )
        signs = ServeSigns(metrics.health, len(workers))
        jobs |= {"updater": updater.run, "readiness": lambda: _tell_readiness(app, updater, signs, metrics, stop)}
    metrics.health.expect(LOOP, ready_s=LOOP_READY_S, healthy_s=LOOP_HEALTHY_S)
    try:
        return answer_requests(
            make_app(app),
            listener,
            stop,
            jobs=jobs,
            workers=workers,
            turned=partial(metrics.health.seen, LOOP),
            connections_max=runtime.config.serve.connections_max,
            refused=lambda reason: metrics.add("connections_refused_total", reason=reason),
            renewal=renewal,
            begins=(lambda: await_read(app.is_reading, stop.wait)) if waits else lambda: None,
            ending=_ending(app, runtime, metrics),
        )
    finally:
        impressions.close()


def _ending(app: ServingApp, runtime: Runtime, metrics: PrometheusMetrics) -> Ending:
    """Return what SIGTERM does, and the other way in."""

    def drains() -> None:
        app.is_draining = True
        metrics.ready(False, DRAINING)

    config = runtime.config.serve
    return Ending(
        drain_s=config.drain_ms / 1_000,
        drains=drains,
        # What waits does so for twice `serve.queue_ms` at most, and then is computed.
        answer_s=2.0 + config.queue_ms / 500,
        beside=_over_grpc(app, runtime) if config.grpc else None,
    )


def _over_grpc(app: ServingApp, runtime: Runtime) -> Beside:
    """Return the other way in. Not before the fork: what gRPC begins does not outlive one.

    Raises `ConfigRejected` where gRPC is not installed.
    """
    try:
        from headrace.serving.api.open_inference.over_grpc import OpenInferenceGrpc
    except ImportError as error:
        raise ConfigRejected(f"serve.grpc is on, and {error}: pip install 'headrace[grpc]', or turn it off.") from error
    return OpenInferenceGrpc(
        app,
        RELEASE,
        host=HOST,
        port=runtime.port("serving_grpc"),
        bytes_max=BODIES.bytes_max,
        calls_max=runtime.config.serve.connections_max,
    )


def _tell(app: ServingApp, stop: threading.Event) -> None:
    while not stop.is_set():
        app.tell()
        stop.wait(0.5)


def _warm(shared: SharedModel, stop: threading.Event) -> None:
    while not stop.wait(WARM_EVERY_S):
        shared.warm()


class ServeSigns:
    """The signs of the processes of serving, and of the thread that looks for them."""

    def __init__(self, health: Health, workers: int) -> None:
        self._health, self._names = health, {number: f"worker {number}" for number in range(1, workers + 1)}
        for name in (*self._names.values(), _LOOKING):
            health.expect(name, ready_s=LOOP_READY_S, healthy_s=LOOP_HEALTHY_S)

    def look(self, told: Sequence[Told], now_ms: int) -> None:
        """Take what each process told last; call it about once a second."""
        self._health.seen(_LOOKING)
        for each in told:
            # The region may hold what a worker of an earlier stage told.
            if each.worker in self._names and now_ms - each.told_ms < LOOP_READY_S * 1_000:
                self._health.seen(self._names[each.worker])


def _tell_readiness(
    app: ServingApp, updater: Updater, signs: ServeSigns, metrics: PrometheusMetrics, stop: threading.Event
) -> None:
    while not stop.is_set():
        signs.look(app.deps.shared.told(), round(app.deps.clock.monotonic() * 1_000))
        reason = app.not_ready()
        metrics.ready(not reason, reason)
        app.measure_workers()
        updater.watch()
        stop.wait(0.1 if reason else 1.0)
