"""Metrics for Prometheus, and the two probes, on one port a stage: /metrics, /readyz, /healthz."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from headrace.contract.errors import ConfigRejected
from headrace.contract.metrics import Name, Stage

# 1 ms to 60 s, four steps a decade: fine enough to read a p99 of the 1 s freshness budget.
BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0),
)


class PrometheusMetrics:
    """The metrics of one stage under `headrace_<stage>_<name>`; starts its HTTP server at once. Thread-safe.

    /healthz answers 200 while the process lives; /readyz answers 200 after `ready(True)`, else 503 and the reason.
    Raises `ConfigRejected` when the port is taken.
    """

    def __init__(self, stage: Stage, port: int, host: str = "127.0.0.1") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._prefix = f"headrace_{stage}_"
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._state = (False, "starting")
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            raise ConfigRejected(
                f"metrics of {stage} cannot listen on {host}:{port}: {error}. `headrace doctor` says who has the port."
            ) from error
        self._server.metrics = self
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Raise a counter; `reason` is its one label, from a bounded set."""
        self._metric(name, Counter).labels(reason).inc(amount)

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Set a gauge."""
        self._metric(name, Gauge).labels(reason).set(value)

    def observe(self, name: Name, value: float) -> None:
        """Add to a histogram."""
        self._metric(name, Histogram).observe(value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage does its work, and if not, what it waits for."""
        self._state = (is_ready, reason)

    def state(self) -> tuple[bool, str]:
        """Return what `ready` was told last."""
        return self._state

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def _metric(self, name: Name, kind: type[Any]) -> Any:
        metric = self._known.get(name)
        if metric is None:
            with self._lock:
                metric = self._known.get(name)
                if metric is None:
                    metric = self._known[name] = self._new(name, kind)
        return metric

    def _new(self, name: Name, kind: type[Any]) -> Any:
        full, words = self._prefix + name, name.replace("_", " ")
        if kind is Histogram:
            return Histogram(full, words, buckets=BUCKETS, registry=self.registry)
        return kind(full, words, ("reason",), registry=self.registry)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    metrics: PrometheusMetrics


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, generate_latest(self.server.metrics.registry), CONTENT_TYPE_LATEST)
        elif path == "/healthz":
            self._answer(200, b"alive\n")
        elif path == "/readyz":
            is_ready, reason = self.server.metrics.state()
            self._answer(200 if is_ready else 503, f"{reason or ('ready' if is_ready else 'not ready')}\n".encode())
        else:
            self._answer(404, b"/metrics, /readyz and /healthz are here.\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every second; a line each would bury what matters."""

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
