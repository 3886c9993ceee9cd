"""uvicorn in the gateway's loop and in serving, with the bounds that it lacks: connections, and a request's time.

uvicorn (with h11) parses, keeps alive, pipelines and drains. What is added: a connection beyond the bound takes the
place of the one that has idled longest, or is refused; one that sends its headers drop by drop is closed; bytes that
are no HTTP are counted; signals stay with the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from headrace.contract.errors import ConfigRejected
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.awake import awake_s
from headrace.process.http_bounds import BoundedConfig, ConnectionBounds

DRAIN_S = 1
"""Longest wait for answers at the end: the gateway's `loop.DRAIN_S` is 2 s."""
_SWEEP_S = 1.0


def collector_config(app: Any, bounds: ConnectionBounds, identity: TlsIdentity | None) -> BoundedConfig:
    """Return uvicorn's settings for the collector."""
    config = BoundedConfig(app, bounds, timeout_graceful_shutdown=DRAIN_S)
    if identity is not None:
        config.ssl = _renewing(identity)
    return config


def _renewing(identity: TlsIdentity) -> ssl.SSLContext:
    """Return a context whose handshakes use the certificate as it is then, not as it was at the start."""
    context = identity.context

    def use_newest(handshake: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        handshake.context = identity.context

    context.sni_callback = use_newest
    return context


class EmbeddedServer(uvicorn.Server):
    """uvicorn that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to the stage."""
        yield


async def serve(config: BoundedConfig, listener: socket.socket, stopping: asyncio.Event) -> None:
    """Serve on `listener` until `stopping`, then answer what has begun for at most `DRAIN_S`."""
    server = EmbeddedServer(config)
    serving = asyncio.get_running_loop().create_task(server.serve([listener]))
    try:
        while not stopping.is_set() and not serving.done():
            config.bounds.sweep(awake_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _SWEEP_S)
        server.should_exit = True
        await serving
    finally:
        serving.cancel()
        listener.close()


def listen(host: str, port: int, *, share_port: bool) -> socket.socket:
    """Return a listening socket. Raises `ConfigRejected` where the port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio switches Nagle's delay off: without, each answer takes 40 ms more.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigRejected(f"the collector cannot use host {host!r}: {error.strerror}. Name another one.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(1_024)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigRejected(
            f"the collector cannot listen on {host}:{port}: {error.strerror}. "
            "Stop what has the port, or move all ports with PORT_BASE=."
        ) from error
    return listener
