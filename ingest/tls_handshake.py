"""TLS of a port: the step from a TCP connection to one of Fluent forward or HTTP.

A connection is accepted plain and upgraded by hand, because only then a failed handshake is seen: asyncio's TLS
listener drops it silently, and a refusal that is not counted cannot be found. asyncio sends the client no alert when it
refuses one: what is wrong stands in our log alone, with its remedy.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol

from headrace.ingest.gateway.chunk_identity import peer_of

_SHUTDOWN_S = 2.0
"""Longest wait for a peer's goodbye in TLS; the data is acked or not by then."""


class TlsPort(Protocol):
    """Whose port it is: a bound on handshakes, a count of refusals, and what takes over."""

    def begin_tls(self, handshake: TlsHandshake, transport: asyncio.Transport, origin: str) -> bool:
        """Note that one begins; False, counted, where there is no room for it."""

    def finish_tls(self, handshake: TlsHandshake) -> None:
        """Note that it is over, well or not."""

    def refuse(self, origin: str, reason: str, why: str) -> None:
        """Count and log a refusal."""

    def upgraded(self) -> asyncio.Protocol:
        """Return what handles the connection from here on."""


class TlsHandshake(asyncio.Protocol):
    """A connection until its TLS handshake is done; then the port's own protocol takes over."""

    def __init__(self, port: TlsPort, context: ssl.SSLContext, handshake_ms: int) -> None:
        self._port, self._context, self._handshake_s = port, context, handshake_ms / 1000
        self._early: list[bytes] = []
        self._ended = self._lost = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake, unless the gateway is full."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a connection to a TLS port is a stream")
        origin = peer_of(transport.get_extra_info("peername")).origin
        if not self._port.begin_tls(self, transport, origin):
            transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._upgrade(transport, origin))

    def data_received(self, data: bytes) -> None:
        """Keep what comes in the one turn of the loop between the handshake's end and the take-over."""
        self._early.append(data)

    def eof_received(self) -> None:
        """Note the end."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._lost = True

    def cancel(self) -> None:
        """End the handshake: the gateway stops."""
        if self._task is not None:
            self._task.cancel()

    async def _upgrade(self, plain: asyncio.Transport, origin: str) -> None:
        try:
            transport = await asyncio.get_running_loop().start_tls(
                plain,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except ssl.SSLError as error:
            self._port.refuse(origin, "tls", f"the TLS handshake failed: {fault_of(error)}")
            return
        except ConnectionAbortedError:
            self._port.refuse(origin, "handshake_timeout", f"no TLS handshake within {self._handshake_s:g} s")
            return
        except OSError:
            # It connected and left: a probe of the port, nothing that was refused.
            return
        finally:
            self._port.finish_tls(self)
        if transport is not None:
            self._hand_over(transport)

    def _hand_over(self, transport: asyncio.Transport) -> None:
        protocol = self._port.upgraded()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._early:
            protocol.data_received(data)
        if self._lost:
            protocol.connection_lost(None)
        elif self._ended:
            transport.close()


def fault_of(error: ssl.SSLError) -> str:
    """Return OpenSSL's name of a fault, with its cause and remedy where they are known.

    Without OpenSSL's text: what the peer sent could be in that.
    """
    name = error.reason or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"{name}: the client's certificate is refused: {error.verify_message}. Renew it there, or name who signed "
            "it in ingest.tls_client_ca"
        )
    return f"{name}: {_REMEDIES[name]}" if name in _REMEDIES else name


_NO_TLS = "what it sent is no TLS, and this port takes nothing else: set TLS at the client"
_TOO_OLD = "it speaks no TLS that we share: 1.2 or newer"
_REMEDIES = {
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "to the client, ingest.tls_cert has ended: renew the file (it is served within 30 s), or set the client's clock"
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "the client refuses ingest.tls_cert: it is not valid yet, or does not name the host by which the client came "
        "in its subjectAltName. The client's log says which"
    ),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client refuses ingest.tls_cert; its log says why",
    "TLSV1_ALERT_UNKNOWN_CA": (
        "the client does not know who signed ingest.tls_cert: give it that authority's certificate, and put those "
        "between into ingest.tls_cert, behind our own"
    ),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client showed no certificate, and ingest.tls_client_ca asks for one",
    "HTTP_REQUEST": _NO_TLS,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "UNEXPECTED_MESSAGE": _NO_TLS,
    "UNSUPPORTED_PROTOCOL": _TOO_OLD,
    "TLSV1_ALERT_PROTOCOL_VERSION": _TOO_OLD,
    "NO_SHARED_CIPHER": _TOO_OLD,
}
"""By OpenSSL's name; those with ALERT are what the client told us."""
