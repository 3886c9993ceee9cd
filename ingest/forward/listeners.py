"""The sockets that a gateway listens on: TCP, plain or TLS; UDP for the heartbeat; a Unix socket.

A port that cannot be opened ends the start (`ConfigRejected`); one that is lost later ends the stage.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from typing import TYPE_CHECKING, cast

from headrace.contract.errors import ConfigRejected
from headrace.ingest.forward.endpoint import Endpoint

if TYPE_CHECKING:
    from headrace.ingest.forward.forward_server import ForwardServer

log = logging.getLogger("headrace.ingest")

_BACKLOG = 1_024
_SOCKET_MODE = 0o660
_PROBE_S = 0.5


class Listeners:
    """All listening sockets of one gateway's forward port."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._datagrams: asyncio.DatagramTransport | None = None
        self._unix: tuple[str, int] | None = None

    async def open(self, server: ForwardServer, endpoint: Endpoint) -> int:
        """Listen on all of them, or on none; return the TCP port. Raises `ConfigRejected` where one cannot be had."""
        try:
            port = await self._open_port(server, endpoint)
            if endpoint.socket_path:
                await self._open_unix(server, endpoint.socket_path)
        except BaseException:
            self.close()
            raise
        return port

    async def _open_port(self, server: ForwardServer, endpoint: Endpoint) -> int:
        loop, host, port = asyncio.get_running_loop(), endpoint.host, endpoint.port
        shared = endpoint.share_port or None
        try:
            tcp = await loop.create_server(
                server.protocol, host, port, reuse_address=True, reuse_port=shared, backlog=_BACKLOG
            )
            self._servers.append(tcp)
            port = int(tcp.sockets[0].getsockname()[1])
            self._datagrams, _ = await loop.create_datagram_endpoint(
                lambda: Heartbeat(server), local_addr=(host, port), reuse_port=shared
            )
        except OSError as error:
            raise ConfigRejected(
                f"cannot listen on {host}:{port}, TCP and UDP (heartbeats): {error.strerror or error}. "
                "Is another gateway there? Several share a port with --share-port, each with a --name of its own."
            ) from error
        return port

    async def _open_unix(self, server: ForwardServer, path: str) -> None:
        try:
            if await asyncio.to_thread(_answers, path):
                raise ConfigRejected(f"another process listens on {path}; give this gateway a socket of its own.")
            # asyncio removes an unused socket file. The mode must be right before anybody can reach the new one.
            before = os.umask(0o777 & ~_SOCKET_MODE)
            try:
                unix = await asyncio.get_running_loop().create_unix_server(
                    lambda: server.protocol(trusted=True), path, backlog=_BACKLOG
                )
            finally:
                os.umask(before)
        except OSError as error:
            raise ConfigRejected(f"cannot listen on the socket {path}: {error.strerror or error}.") from error
        self._servers.append(unix)
        self._unix = (path, os.stat(path).st_ino)
        log.info("forward on %s", path)

    def close(self) -> None:
        """Accept nobody any more; connections go on. More than once is fine."""
        for listener in self._servers:
            listener.close()
        if self._datagrams is not None:
            self._datagrams.close()
        if self._unix is not None:
            path, number = self._unix
            # Only ours: a successor may have put its own there.
            if os.path.exists(path) and os.stat(path).st_ino == number:
                os.unlink(path)
        self._servers, self._datagrams, self._unix = [], None, None


def _answers(path: str) -> bool:
    """Say whether a process listens on the socket at `path`."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


class Heartbeat(asyncio.DatagramProtocol):
    """fluentd's UDP heartbeat: one zero byte is answered with one. Nothing else is, so it amplifies nothing."""

    def __init__(self, server: ForwardServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # A cast: Python 3.11's datagram transport does not say that it is one.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        """Answer, unless this gateway is about to end."""
        if data == b"\0" and self._transport is not None and not self._server.admission.is_draining():
            self._transport.sendto(b"\0", addr)
