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
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.contract.errors import ConfigRejected
from headrace.ingest.gateway.chunk_identity import peer_of
from headrace.ingest.tls_identity import TlsIdentity

KEEP_ALIVE_S = 15
HEADERS_S = 20.0
"""Longest time between requests of one connection, headers included; longer than `KEEP_ALIVE_S`."""
DRAIN_S = 1
"""Longest wait for answers at the end: the gateway's `loop.DRAIN_S` is 2 s."""
_SWEEP_S = 1.0

Refuse = Callable[[str, str, str], None]
"""(origin, reason, why): counts a refusal."""


class ConnectionBounds:
    """Who is connected, and since when each waits for a request. The protocols enter and leave by themselves."""

    def __init__(self, connections_max: int, refuse: Refuse) -> None:
        self._connections_max, self.refuse = connections_max, refuse
        self._idle: dict[BoundedProtocol, float] = {}
        """Oldest first."""
        self._open: set[BoundedProtocol] = set()

    def enter(self, protocol: BoundedProtocol, now_s: float) -> bool:
        """Add a connection; at the bound the longest idle one is closed. False where none is idle."""
        if len(self._open) >= self._connections_max:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            oldest.cut("idle", "another connection wants its place")
        self._open.add(protocol)
        self._idle[protocol] = now_s
        return True

    def leave(self, protocol: BoundedProtocol) -> None:
        """Forget a connection."""
        self._open.discard(protocol)
        self._idle.pop(protocol, None)

    def busy(self, protocol: BoundedProtocol) -> None:
        """Note that a request has begun."""
        self._idle.pop(protocol, None)

    def idle(self, protocol: BoundedProtocol, now_s: float) -> None:
        """Note that its answer is out."""
        if protocol in self._open:
            self._idle[protocol] = now_s

    def sweep(self, now_s: float) -> None:
        """Close connections whose next request's headers do not end in time, or that send a body which is not read."""
        for protocol, since_s in list(self._idle.items()):
            if now_s - since_s <= HEADERS_S:
                break
            protocol.cut("headers_timeout", f"no whole request within {HEADERS_S:g} s")


class BoundedConfig(uvicorn.Config):
    """uvicorn's settings, and the bounds that its protocols keep."""

    def __init__(
        self, app: Any, bounds: ConnectionBounds, identity: TlsIdentity | None = None, **settings: Any
    ) -> None:
        """`settings` are uvicorn's, where they differ from the collector's."""
        chosen: dict[str, Any] = {
            "http": BoundedProtocol,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            # What uvicorn logs may hold a URL, and a URL may hold a token.
            "log_level": "critical",
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": DRAIN_S,
        }
        super().__init__(app, **(chosen | settings))
        self.bounds = bounds
        self.load()
        if identity is not None:
            self.ssl = _renewing(identity)


def _renewing(identity: TlsIdentity) -> ssl.SSLContext:
    """Return a context whose handshakes use the certificate as it is then, not as it was at the start."""
    context = identity.context

    def use_newest(handshake: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        handshake.context = identity.context

    context.sni_callback = use_newest
    return context


class BoundedProtocol(H11Protocol):
    """One HTTP connection."""

    @property
    def _bounds(self) -> ConnectionBounds:
        return cast(BoundedConfig, self.config).bounds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Enter, or be refused beyond the bound."""
        super().connection_made(transport)
        if not self._bounds.enter(self, self.loop.time()):
            self.cut("connections_max", "every connection of the collector waits for an answer")

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave."""
        self._bounds.leave(self)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Let uvicorn handle what has come; a request that has begun is not idle."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._bounds.busy(self)

    def on_response_complete(self) -> None:
        """Be idle again."""
        self._bounds.idle(self, self.loop.time())
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP."""
        self._bounds.refuse(self._origin(), "no_http", "what it sent is no HTTP request")
        super().send_400_response(msg)

    def cut(self, reason: str, why: str) -> None:
        """Close at once, counted."""
        self._bounds.refuse(self._origin(), reason, why)
        self._bounds.leave(self)
        self.transport.abort()

    def _origin(self) -> str:
        return peer_of(self.client).origin


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
            config.bounds.sweep(asyncio.get_running_loop().time())
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
