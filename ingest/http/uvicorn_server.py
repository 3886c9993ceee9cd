"""uvicorn in the gateway's loop and in serving, with the bounds that it lacks: connections, and a request's time.

uvicorn (with h11) parses, keeps alive, pipelines and drains. What is added: a connection beyond the bound takes the
place of the one that has idled longest, or is refused; one that sends its headers drop by drop is closed; bytes that
are no HTTP are counted; signals stay with the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any, cast

import uvicorn

from headrace.contract.errors import ConfigRejected
from headrace.ingest.tls_handshake import TlsHandshake
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.awake import awake_s
from headrace.process.http_bounds import ALL_WAIT, BoundedConfig, BoundedProtocol, ConnectionBounds

DRAIN_S = 1
"""Longest wait for answers at the end: the gateway's `loop.DRAIN_S` is 2 s."""
_SWEEP_S = 1.0


class Handshakes:
    """TLS handshakes of the collector's port, which take a place among its connections; a `TlsPort`."""

    def __init__(self, config: BoundedConfig, settings: Mapping[str, Any], open_now: set[TlsHandshake]) -> None:
        """`settings` are what uvicorn gives each connection, `open_now` the handshakes of the whole port."""
        self._config, self._settings, self._open = config, settings, open_now

    def begin_tls(self, handshake: TlsHandshake, _transport: asyncio.Transport, origin: str) -> bool:
        """Note a handshake; False, counted, where there is no room for it."""
        if not self._config.bounds.make_room(len(self._open)):
            self.refuse(origin, "connections_max", ALL_WAIT)
            return False
        self._open.add(handshake)
        return True

    def finish_tls(self, handshake: TlsHandshake) -> None:
        """Note that it is over."""
        self._open.discard(handshake)

    def refuse(self, origin: str, reason: str, why: str) -> None:
        """Count and log a refusal."""
        self._config.bounds.refuse(origin, reason, why)

    def upgraded(self) -> asyncio.Protocol:
        """Return what reads requests."""
        return BoundedProtocol(**self._settings)


class CollectorConfig(BoundedConfig):
    """uvicorn's settings for the collector. TLS is ours: uvicorn's own drops a failed handshake without a word."""

    def __init__(self, app: Any, bounds: ConnectionBounds, identity: TlsIdentity | None, handshake_ms: int) -> None:
        super().__init__(app, bounds, timeout_graceful_shutdown=DRAIN_S)
        self.handshakes: set[TlsHandshake] = set()
        if identity is None:
            return

        def begin(**settings: Any) -> asyncio.Protocol:
            # The certificate as it is now: it may have been renewed since the start.
            return TlsHandshake(Handshakes(self, settings, self.handshakes), identity.context, handshake_ms)

        self.http_protocol_class = cast(Any, begin)


class EmbeddedServer(uvicorn.Server):
    """uvicorn that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to the stage."""
        yield


async def serve(config: CollectorConfig, listener: socket.socket, stopping: asyncio.Event) -> None:
    """Serve on `listener` until `stopping`, then answer what has begun for at most `DRAIN_S`."""
    server = EmbeddedServer(config)
    serving = asyncio.get_running_loop().create_task(server.serve([listener]))
    try:
        while not stopping.is_set() and not serving.done():
            config.bounds.sweep(awake_s())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _SWEEP_S)
        for handshake in list(config.handshakes):
            handshake.cancel()
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
