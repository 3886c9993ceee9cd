"""A real gateway on real sockets with a log in memory, clients that misbehave, and certificates made on the spot."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ingest_world import Counts, ShakyLog, dependencies

from headrace.contract.config import IngestConfig
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.forward_server import ForwardServer
from headrace.ingest.gateway.admission import Companion
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.loop import GatewayLoop
from headrace.ingest.tls_identity import TlsIdentity

NEVER_S = 60.0
"""Longest wait of a test for what must come; a machine with eight busy neighbours needs seconds, not this."""


class WallClock:
    """The real one."""

    def now_ms(self) -> int:
        return time.time_ns() // 10**6

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Running:
    """The server in a thread. `stop` fails the test if the loop met an exception that nobody handled."""

    def __init__(
        self,
        endpoint: Endpoint | None = None,
        companions: Sequence[Companion] = (),
        log: ShakyLog | None = None,
        stop: threading.Event | None = None,
        **config: Any,
    ) -> None:
        self.log, self.counts = log or ShakyLog(Random(0)), Counts()
        self._stop, self._up = stop or threading.Event(), threading.Event()
        self.faults: list[str] = []
        self.port = 0
        self.failure: BaseException | None = None
        settings = IngestConfig(**{"grace_ms": 0, **config})
        self.endpoint = endpoint or Endpoint(port=0)
        self.identity = TlsIdentity(settings) if settings.tls_cert else None
        clock = WallClock()
        self.gateway = Gateway(dependencies(self.log, self.counts, clock, config=settings), self.endpoint.name)
        self.forward = ForwardServer(settings, self.counts, clock, self.endpoint, self.identity)
        self.loop = GatewayLoop(self.gateway, settings, self.counts, clock, self.forward)
        self._companions = companions
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        if not self._up.wait(NEVER_S) or self.failure is not None:
            self._stop.set()
            self._thread.join(NEVER_S)
            raise self.failure or AssertionError("the gateway does not come up")

    def _serve(self) -> None:
        async def serve() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _loop, what: self.faults.append(str(what)))
            await self.loop.serve(self._stop, ready=self._ready, companions=self._companions)

        try:
            asyncio.run(serve())
        except BaseException as error:
            self.failure = error
            self._up.set()

    def _ready(self, port: int) -> None:
        self.port = port
        self._up.set()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(NEVER_S)
        assert not self._thread.is_alive()
        self.log.flush(0.2)
        assert self.failure is None, repr(self.failure)
        assert self.faults == []
        assert self.refused("internal") == 0

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self._stop.set()
            self._thread.join(NEVER_S)

    def refused(self, reason: str) -> int:
        """Return how many connections were refused for this reason."""
        return self.counts.totals[f"connections_refused_total:{reason}"]

    def ids(self) -> list[str]:
        """Return the ids of all appended events."""
        return sorted(row["event_id"] for row in self.log.rows())

    def connect(self, context: ssl.SSLContext | None = None) -> socket.socket:
        """Return a connection."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=NEVER_S)
        return plain if context is None else context.wrap_socket(plain, server_hostname="localhost")

    def held_bytes(self) -> int:
        """Return what the gateway holds of bytes that are not settled."""
        return self.loop.held_bytes()


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until it holds, or fail."""
    until = time.monotonic() + NEVER_S
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def frame(records: list[Any], chunk: str | None = None, tag: str = "shop.impression") -> bytes:
    """Return a message as a shipper writes it, dated now."""
    option = {} if chunk is None else {"chunk": chunk}
    return bytes(msgpack.packb([tag, [[int(time.time()), record] for record in records], option]))


def read_value(sock: socket.socket) -> Any:
    """Return the one MessagePack value that is due; None at the end of the connection."""
    values = read_values(sock, 1)
    return values[0] if values else None


def read_values(sock: socket.socket, count: int) -> list[Any]:
    """Return the next values: `count` of them, all that one more read brings with the last, fewer at the end."""
    unpacker = msgpack.Unpacker(raw=False, unicode_errors="surrogateescape")
    values: list[Any] = []
    while len(values) < count:
        data = sock.recv(65_536)
        if not data:
            break
        unpacker.feed(data)
        values.extend(unpacker)
    return values


def ended(sock: socket.socket) -> bool:
    """Say whether the gateway closes this connection, reading what it still says."""
    try:
        while sock.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


class Authority:
    """Signs certificates; its files lie in `folder`, which the test deletes with itself."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / "ca.pem"
        own = self._certificate(self._name, self._key.public_key(), authority=True)
        self.file.write_bytes(own.public_bytes(serialization.Encoding.PEM))

    def _certificate(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        authority: bool = False,
        host: str = "localhost",
        hours: tuple[int, int] = (-1, 1),
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        unsigned = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(hours=hours[0]))
            .not_valid_after(now + datetime.timedelta(hours=hours[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if host:
            names = x509.SubjectAlternativeName([x509.DNSName(host)])
            unsigned = unsigned.add_extension(names, critical=False)
        return unsigned.sign(self._key, hashes.SHA256())

    def issue(
        self, name: str, password: str = "", *, host: str = "localhost", hours: tuple[int, int] = (-1, 1)
    ) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key, encrypted where a password is given.

        It is for a `host` ("": none) and good from and until so many `hours` after now.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert_file, key_file = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certificate = self._certificate(subject, key.public_key(), host=host, hours=hours)
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
        return cert_file, key_file

    def client(self, identity: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Return what a client trusts this authority with, and shows of itself."""
        context = ssl.create_default_context(cafile=str(self.file))
        if identity is not None:
            context.load_cert_chain(*map(str, identity))
        return context
