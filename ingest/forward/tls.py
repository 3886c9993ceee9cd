"""TLS of the forward port: the context, its renewal, and the step from a TCP connection to a Fluent one.

A connection is accepted plain and upgraded by hand, because only then a failed handshake is seen: asyncio's TLS
listener drops it without a word, and a refusal that nobody counts is not refused but lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from typing import TYPE_CHECKING

from headrace.contract.config import IngestConfig
from headrace.contract.errors import ConfigRejected
from headrace.ingest.forward.connection import Connection
from headrace.ingest.gateway.gateway import peer_of

if TYPE_CHECKING:
    from headrace.ingest.forward.server import Server

log = logging.getLogger("headrace.ingest")

_SHUTDOWN_S = 2.0
"""Longest wait for a peer's goodbye in TLS; the data is acked or not by then."""


class Identity:
    """The gateway's certificate, read again when its files change: a renewed one needs no restart."""

    def __init__(self, config: IngestConfig, password: str = "") -> None:
        """Read the files. Raises `ConfigRejected` with what is wrong, never with the key or its password."""
        self._files, self._password = (config.tls_cert, config.tls_key or config.tls_cert), password
        self._client_ca = config.tls_client_ca
        self._seen = self._changed_ns()
        self.context = self._read()

    def renew(self) -> None:
        """Serve new connections with the files as they are now; keep the old certificate where they cannot be read."""
        seen = self._changed_ns()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context = self._read()
            log.info("certificate %s read again", self._files[0])
        except ConfigRejected as error:
            log.error("the old certificate stays: %s", error)

    def _changed_ns(self) -> tuple[int, ...]:
        files = [*self._files, self._client_ca] if self._client_ca else self._files
        return tuple(os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key = self._files
        try:
            # A password that is always given, if empty: OpenSSL would ask for it on the terminal and wait for ever.
            context.load_cert_chain(cert, key, password=lambda: self._password)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise ConfigRejected(
                f"TLS cannot begin with ingest.tls_cert {cert}, ingest.tls_key {key}"
                + (f", ingest.tls_client_ca {self._client_ca}" if self._client_ca else "")
                + f": {error}. The files are PEM; HEADRACE_TLS_PASSWORD opens a key that is encrypted."
            ) from error
        return context


class TlsGate(asyncio.Protocol):
    """A connection until its TLS handshake is done; then a `Connection` takes over."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self._server, self._context = server, context
        self._early: list[bytes] = []
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, unless the gateway is full."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a forward connection is a stream")
        server = self._server
        if not server.has_room():
            origin = peer_of(transport.get_extra_info("peername")).origin
            server.refusals.add(origin, "connections_max", f"{server.config.connections_max} connections are open")
            transport.abort()
            return
        server.gates.add(self)
        server.beneath_tls.add(transport)
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
        refusals, handshake_s = self._server.refusals, self._server.config.handshake_ms / 1000
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
            refusals.add(origin, "tls", f"the TLS handshake failed: {error.reason or type(error).__name__}")
            return
        except ConnectionAbortedError:
            refusals.add(origin, "handshake_timeout", f"no TLS handshake within {handshake_s:g} s")
            return
        except OSError:
            # It connected and left: a probe of the port, nothing that was refused.
            return
        finally:
            self._server.gates.discard(self)
        if transport is None:
            return
        connection = Connection(self._server)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        for data in self._early:
            connection.data_received(data)
        if self._ended:
            connection.close()
