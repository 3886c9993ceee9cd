"""What the collector's tests share: a gateway with its real sockets in a thread of its own, on a log in memory."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from ingest_world import NOT_LATE, PROJECT, ShakyLog, dependencies

from headrace.backends.clock import SystemClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.contract.config import IngestConfig
from headrace.contract.project import Project
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.http.collector import Collector, CollectorEndpoint
from headrace.ingest.run import run
from headrace.ingest.tls_identity import TlsIdentity


class Observer:
    """A companion that offers nothing and lets the test ask the gateway."""

    def __init__(self) -> None:
        self.admission: Admission | None = None

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        self.admission = admission
        await stopping.wait()


class Site:
    """A running collector; `log.away` holds Kafka's receipts back."""

    def __init__(
        self,
        tokens: tuple[str, ...] = (),
        port: int = 0,
        host: str = "127.0.0.1",
        late: LateEvents = NOT_LATE,
        project: Project = PROJECT,
        **config: Any,
    ) -> None:
        self.late, self._project = late, project
        self.log, self.metrics, self.stop = ShakyLog(Random(1)), MemoryMetrics(), threading.Event()
        settings = IngestConfig(**{"grace_ms": 0, "batch_ms": 5, **config})
        self._ready = threading.Event()
        self._identity = TlsIdentity(settings) if settings.tls_cert else None
        endpoint = CollectorEndpoint(host=host, port=port, tokens=tokens)
        self.collector = Collector(settings, endpoint, self.metrics, SystemClock(), self._identity)
        self._observer = Observer()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(settings,))
        self._thread.start()
        self._ready.wait(120)
        self.port = self.collector.port
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self, settings: IngestConfig) -> None:
        try:
            run(
                dependencies(
                    self.log, self.metrics, SystemClock(), config=settings, late=self.late, project=self._project
                ),
                Endpoint(port=free_port()),
                self.stop,
                ready=lambda _port: self._ready.set(),
                companions=[self.collector, self._observer],
                identity=self._identity,
            )
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()

    def end(self) -> None:
        """Drain and stop."""
        self.stop.set()
        self.join()

    def join(self) -> None:
        """Wait for the end, and raise what brought it about."""
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def renew(self) -> None:
        """Let the gateway look at its certificate's files, as it does every half minute."""
        if self._identity is not None:
            self._identity.renew()

    @property
    def paused(self) -> bool:
        """Whether the gateway reads from nobody."""
        admission = self._observer.admission
        return admission is not None and not admission.is_open()

    def ids(self, kind: str | None = None) -> list[str]:
        """Return the ids of every appended event."""
        return [row["event_id"] for row in self.log.rows(kind)]


@contextmanager
def site(tokens: tuple[str, ...] = (), port: int = 0, **config: Any) -> Iterator[Site]:
    """Run a collector."""
    made = Site(tokens, port, **config)
    try:
        yield made
    finally:
        made.log.away = False
        made.end()


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
