"""TLS of the forward port: the step from a TCP connection to a Fluent one.

A connection is accepted plain and upgraded by hand, because only then a failed handshake is seen: asyncio's TLS
listener drops it silently, and a refusal that is not counted cannot be found.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from headrace.contract.config import IngestConfig
from headrace.ingest.gateway.chunk_identity import peer_of

if TYPE_CHECKING:
    from headrace.ingest.forward.forward_server import ForwardServer

_SHUTDOWN_S = 2.0
"""Longest wait for a peer's goodbye in TLS; the data is acked or not by then."""


class TlsHandshake(asyncio.Protocol):
    """A connection until its TLS handshake is done; then a `Connection` takes over."""

    def __init__(self, server: ForwardServer, context: ssl.SSLContext, config: IngestConfig) -> None:
        self._server, self._context, self._config = server, context, config
        self._early: list[bytes] = []
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, unless the gateway is full."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a forward connection is a stream")
        server = self._server
        if not server.can_enter():
            origin = peer_of(transport.get_extra_info("peername")).origin
            open_max = self._config.connections_max
            server.admission.refuse(origin, "connections_max", f"{open_max} connections are open")
            transport.abort()
            return
        server.begin_tls(self, transport)
        self._task = asyncio.get_running_loop().create_task(self._upgrade(transport))

    def data_received(self, data: bytes) -> None:
        """Keep what comes in the one turn of the loop between the handshake's end and the take-over."""
        self._early.append(data)

    def eof_received(self) -> None:
        """Note the end."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._ended = True

    def cancel(self) -> None:
        """End the handshake: the gateway stops."""
        if self._task is not None:
            self._task.cancel()

    async def _upgrade(self, plain: asyncio.Transport) -> None:
        origin = peer_of(plain.get_extra_info("peername")).origin
        handshake_s = self._config.handshake_ms / 1000
        try:
            transport = await asyncio.get_running_loop().start_tls(
                plain,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except ssl.SSLError as error:
            # OpenSSL's name of the fault, without its text: what the peer sent could be in that.
            self._server.admission.refuse(
                origin, "tls", f"the TLS handshake failed: {error.reason or type(error).__name__}"
            )
            return
        except ConnectionAbortedError:
            self._server.admission.refuse(origin, "handshake_timeout", f"no TLS handshake within {handshake_s:g} s")
            return
        except OSError:
            # It connected and left: a probe of the port, nothing that was refused.
            return
        finally:
            self._server.finish_tls(self)
        if transport is None:
            return
        connection = self._server.connection()
        transport.set_protocol(connection)
        connection.connection_made(transport)
        for data in self._early:
            connection.data_received(data)
        if self._ended:
            connection.close()
