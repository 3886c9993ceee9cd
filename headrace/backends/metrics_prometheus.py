"""Metrics for Prometheus: one small HTTP server a stage, with /metrics, /healthz and /readyz."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headrace.contract.errors import ConfigRejected
from headrace.contract.metrics import Name, Stage

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class PrometheusMetrics:
    """Metrics of one stage, named `headrace_<stage>_<name>`, served on `port` once `serve` was called."""

    def __init__(self, stage: Stage) -> None:
        self.registry = CollectorRegistry()
        self._stage = stage
        self._lock = threading.Lock()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._reason: str | None = "starting"

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Raise a counter."""
        with self._lock:
            counter = self._counters.get(name)
            if counter is None:
                full = f"headrace_{self._stage}_{name}"
                counter = self._counters[name] = Counter(full, name, ["reason"], registry=self.registry)
        counter.labels(reason).inc(amount)

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Set a gauge."""
        with self._lock:
            gauge = self._gauges.get(name)
            if gauge is None:
                full = f"headrace_{self._stage}_{name}"
                gauge = self._gauges[name] = Gauge(full, name, ["reason"], registry=self.registry)
        gauge.labels(reason).set(value)

    def observe(self, name: Name, value: float) -> None:
        """Add to a histogram of seconds."""
        with self._lock:
            histogram = self._histograms.get(name)
            if histogram is None:
                full = f"headrace_{self._stage}_{name}"
                histogram = Histogram(full, name, buckets=_SECONDS, registry=self.registry)
                self._histograms[name] = histogram
        histogram.observe(value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage is ready, or why not."""
        self._reason = None if is_ready else reason or "not ready"

    @property
    def not_ready(self) -> str | None:
        """Why the stage is not ready; None when it is."""
        return self._reason

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def serve(self, port: int, host: str = "127.0.0.1") -> None:
        """Answer on `port` from a thread of its own, for as long as the process lives."""
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = 404, b"try /metrics, /healthz or /readyz\n"
                if self.path == "/metrics":
                    status, body = 200, metrics.text()
                elif self.path == "/healthz":
                    status, body = 200, b"ok\n"
                elif self.path == "/readyz":
                    reason = metrics.not_ready
                    status, body = (200, b"ready\n") if reason is None else (503, f"{reason}\n".encode())
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        try:
            server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigRejected(f"{host}:{port} for metrics is taken: {error}. Choose another PORT_BASE.") from error
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
