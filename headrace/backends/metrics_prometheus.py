"""Metrics for Prometheus, and the two probes, on one port a stage: /metrics, /readyz, /healthz."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
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
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from headrace.backends.health import Health
from headrace.contract.errors import ConfigRejected
from headrace.contract.interfaces.labels import joined, label_values
from headrace.contract.metrics import METRICS, Kind, Name, Stage

# 1 ms to 60 s, four steps a decade: fine enough to read a p99 of the 1 s freshness budget.
BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0),
)

LABELLED_REASON: frozenset[Name] = frozenset(
    {
        "events_appended_total",
        "positives_total",
        "negatives_total",
        "feedback_duplicate_total",
        "feedback_late_total",
        "feedback_orphan_total",
        "lag_records",
        "gap_total",
        "requests_total",
        "errors_total",
        "source_settled_total",
        "lines_skipped_total",
        "events_refused_total",
        "dead_letter_ceiling_shut",
        "pages_total",
        "versions_total",
        "pages_known",
        "window_auc",
        "window_log_loss",
        "window_normalized_entropy",
        "window_calibration",
        "window_samples",
        "slice_auc",
        "slice_log_loss",
        "slice_normalized_entropy",
        "slice_calibration",
        "label_rate",
        "label_rate_usual",
        "label_rate_score",
        "label_rate_jumps_total",
    }
)
"""Metrics whose one label used to be called `reason`. Version 0.1 exports that label too, last; the next one does not.

It holds the values of the other labels, joined by a space. It stands on the same series, not on another one beside it:
queries by either label find the series, and a sum over all series counts nothing twice.
"""


class PrometheusMetrics:
    """The metrics of one stage under `headrace_<stage>_<name>`; starts its HTTP server at once. Thread-safe.

    /readyz and /healthz answer 200 or 503 with the reason, by what `health` says at that moment.
    Raises `ConfigRejected` when the port is taken.
    """

    def __init__(self, stage: Stage, port: int, host: str = "127.0.0.1") -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._prefix = f"headrace_{stage}_"
        # A counter that appears with its first count rises from nothing, which increase() does not see.
        plain: list[Name] = [
            n for n, d in METRICS.items() if d.kind == "counter" and stage in d.stages and not d.labels
        ]
        self._known: dict[str, Any] = {name: self._new(name) for name in plain}
        self._lock = threading.Lock()
        self.health = Health()
        self.registry.register(_HealthCollector(self._prefix, self.health))
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            raise ConfigRejected(
                f"metrics of {stage} cannot listen on {host}:{port}: {error}. `headrace doctor` names its owner."
            ) from error
        self._server.metrics = self
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def add(self, name: Name, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        self._series(name, "counter", labels).inc(amount)

    def set(self, name: Name, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._series(name, "gauge", labels).set(value)

    def observe(self, name: Name, value: float) -> None:
        """Add to a histogram."""
        self._series(name, "histogram", {}).observe(value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage does its work, and if not, what it waits for."""
        self.health.ready(is_ready, reason)

    def state(self) -> tuple[bool, str]:
        """Return what /readyz says."""
        return self.health.state()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()

    def _series(self, name: Name, kind: Kind, labels: Mapping[str, str]) -> Any:
        values, metric = label_values(name, kind, labels), self._known.get(name)
        if metric is None:
            with self._lock:
                metric = self._known.get(name)
                if metric is None:
                    metric = self._known[name] = self._new(name)
        if not values:
            return metric
        return metric.labels(*values, joined(values)) if name in LABELLED_REASON else metric.labels(*values)

    def _new(self, name: Name) -> Any:
        full, doc = self._prefix + name, METRICS[name]
        if doc.kind == "histogram":
            return Histogram(full, doc.meaning, buckets=BUCKETS, registry=self.registry)
        labels = (*doc.labels, "reason") if name in LABELLED_REASON else doc.labels
        return (Counter if doc.kind == "counter" else Gauge)(full, doc.meaning, labels, registry=self.registry)


class _HealthCollector(Collector):
    """What the probes say, at the moment of the scrape."""

    def __init__(self, prefix: str, health: Health) -> None:
        self._prefix, self._health = prefix, health

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield `ready` and `no_sign_seconds`."""
        names: tuple[Name, Name] = ("ready", "no_sign_seconds")
        ready, silent = (
            GaugeMetricFamily(self._prefix + n, METRICS[n].meaning, labels=METRICS[n].labels) for n in names
        )
        ready.add_metric((), float(self._health.state()[0]))
        for what, seconds in self._health.no_signs().items():
            silent.add_metric((what,), seconds)
        yield ready
        yield silent


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    metrics: PrometheusMetrics

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone meanwhile: nothing that the log needs to tell."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, generate_latest(self.server.metrics.registry), CONTENT_TYPE_LATEST)
        elif path == "/healthz":
            trouble = self.server.metrics.health.trouble()
            self._answer(503 if trouble else 200, f"{trouble or 'alive'}\n".encode())
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
