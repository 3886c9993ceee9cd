"""A gateway in this process: the core, its loop, the forward port and its companions, put together."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence

from headrace.ingest.compile_decoders import compile_decoders
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.forward_server import ForwardServer
from headrace.ingest.gateway.admission import Companion
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.loop import GatewayLoop, Ready
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.open_files import allow_open_files

log = logging.getLogger("headrace.ingest")

_FILES_SPARE = 512
"""Open files beside connections: Kafka, metrics, logs."""


def run(
    deps: GatewayDependencies,
    endpoint: Endpoint,
    stop: threading.Event,
    *,
    ready: Ready = lambda port: None,
    companions: Sequence[Companion] = (),
    identity: TlsIdentity | None = None,
) -> None:
    """Serve until `stop` is set, then drain within `loop.DRAIN_S` and return. `ready` gets the bound port.

    With an `identity` the port speaks TLS. Raises `ConfigRejected` where a port or socket cannot be had.
    """
    begun_s = deps.clock.monotonic()
    compile_decoders(deps)
    log.info("decoders ready after %.1f s; a machine's first start compiles them", deps.clock.monotonic() - begun_s)
    gateway = Gateway(deps, endpoint.name)
    forward = ForwardServer(deps.config, deps.metrics, deps.clock, endpoint, identity)
    loop = GatewayLoop(gateway, deps.config, deps.metrics, deps.clock, forward)
    connections_max = deps.config.connections_max
    allowed = allow_open_files(connections_max + _FILES_SPARE)
    if allowed < connections_max + _FILES_SPARE:
        log.warning(
            "open files are limited to %d, ingest.connections_max is %d: raise ulimit -n", allowed, connections_max
        )
    asyncio.run(loop.serve(stop, ready=ready, companions=companions))
    deps.producer.flush(0.2)
