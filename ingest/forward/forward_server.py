"""The forward port: its connections, which of them are overdue, and which one gives way to a new one.

Bounds: connections (refused beyond, unless one that never sent a message can give way), one message and the time that
it takes, the handshake's time, acks that a peer does not read.
"""

from __future__ import annotations

import asyncio
import logging
import weakref

from headrace.contract.config import IngestConfig
from headrace.contract.errors import InvariantBroken
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.ingest.forward.connection import Connection
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.listeners import Listeners
from headrace.ingest.gateway.admission import Admission
from headrace.ingest.tls_handshake import TlsHandshake
from headrace.ingest.tls_identity import TlsIdentity
from headrace.process.awake import Awake

log = logging.getLogger("headrace.ingest")

_RENEW_S = 30.0
_LINGER_S = 30.0
"""How long a peer that ended its side may wait for its last acks."""


class ForwardServer:
    """All forward connections of one gateway. They enter and leave by themselves."""

    def __init__(
        self,
        config: IngestConfig,
        metrics: Metrics,
        clock: Clock,
        endpoint: Endpoint | None = None,
        identity: TlsIdentity | None = None,
    ) -> None:
        self._endpoint, self._identity = endpoint or Endpoint(), identity
        self._config, self._metrics, self._clock = config, metrics, clock
        self._listeners = Listeners()
        self._admission: Admission | None = None
        self._connections: dict[Connection, None] = {}
        """In the order in which reading is resumed after a pause."""
        self._never_sent: dict[Connection, float] = {}
        """Those that have not sent a whole message yet, oldest first, with the time at which they came."""
        self._unfinished: set[Connection] = set()
        """Those with a handshake or a message that has begun and not ended, and those that wait for last acks."""
        self._tls_handshakes: set[TlsHandshake] = set()
        self._beneath_tls: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._partial_bytes = 0
        self._awake = Awake(clock.monotonic)
        """Follows the sweeps: while the gateway stood still, no peer could be heard."""
        self._renewed_s = self.awake_s()

    # -- the loop's calls

    @property
    def partial_bytes(self) -> int:
        """Bytes read of messages that have not ended."""
        return self._partial_bytes

    @property
    def open_connections(self) -> int:
        """Connections, those in a TLS handshake included."""
        return len(self._connections) + len(self._tls_handshakes)

    async def listen(self, admission: Admission) -> int:
        """Listen, and offer what comes; return the port. Raises `ConfigRejected` where it cannot be had."""
        self._admission = admission
        port = await self._listeners.open(self, self._endpoint)
        if self._identity is not None:
            self._tell_end(self._identity)
        how = "with TLS" if self._identity is not None else "plain"
        log.info("forward on %s:%d %s", self._endpoint.host, port, how)
        return port

    def sweep(self) -> None:
        """Close what is overdue, and read the certificate again from time to time.

        While the gateway does not read, no message can be finished, so none is overdue.
        """
        now_s = self.awake_s()
        for connection in list(self._unfinished):
            waited_s = now_s - connection.since_s
            if connection.half_closed:
                if waited_s > _LINGER_S:
                    connection.close()
            elif not self.admission.is_open():
                continue
            elif connection.in_handshake:
                if waited_s * 1000 > self._config.handshake_ms:
                    connection.refuse("handshake_timeout", f"no handshake within {self._config.handshake_ms} ms")
            elif waited_s * 1000 > self._config.message_ms:
                connection.refuse("message_timeout", f"a message took longer than {self._config.message_ms} ms")
        if self._identity is not None and now_s - self._renewed_s > _RENEW_S:
            self._renewed_s = now_s
            self._identity.renew()
            self._tell_end(self._identity)

    def _tell_end(self, identity: TlsIdentity) -> None:
        self._metrics.set("tls_days_left", identity.days_left(self._clock.now_ms()))

    def pause(self) -> None:
        """Read from nobody."""
        for connection in self._connections:
            connection.pause()

    def resume(self) -> None:
        """Resume reading, in the order of the connections, until the gateway is full again."""
        for connection in list(self._connections):
            # To the end of the order: if the bound is reached again on the way, the others come first next time.
            if self._connections.pop(connection, connection) is None:
                self._connections[connection] = None
                connection.resume()
            if not self.admission.is_open():
                break

    def refuse_largest(self) -> None:
        """Refuse the connection whose unfinished message has the most bytes; its sender still has it."""
        if self._unfinished:
            max(self._unfinished, key=lambda c: c.partial_bytes).refuse("partial_bound", "unfinished messages")

    def stop_listening(self) -> None:
        """Accept nobody any more; connections go on."""
        self._listeners.close()

    async def close(self) -> None:
        """Close every connection; a peer that does not answer TLS's goodbye is not waited for."""
        for handshake in list(self._tls_handshakes):
            handshake.cancel()
        for connection in list(self._connections):
            connection.close()
        await asyncio.sleep(0)
        # What was due to them has been written.
        for transport in list(self._beneath_tls):
            transport.abort()
        await asyncio.sleep(0)

    # -- the connections' calls

    def awake_s(self) -> float:
        """Return monotonic seconds, without those in which the gateway stood still."""
        return self._awake.monotonic()

    @property
    def admission(self) -> Admission:
        """The gateway that listens."""
        if self._admission is None:
            raise InvariantBroken("a forward connection before the port listens")
        return self._admission

    def protocol(self, *, trusted: bool = False) -> asyncio.Protocol:
        """Return what handles a new connection. A `trusted` one came by the Unix socket: it has no TLS, no key."""
        if self._identity is not None and not trusted:
            return TlsHandshake(self, self._identity.context, self._config.handshake_ms)
        return self.connection(trusted=trusted)

    def connection(self, *, trusted: bool = False) -> Connection:
        """Return a connection that has not been made yet."""
        return Connection(self, self._config, self._endpoint, self._metrics, trusted=trusted)

    def can_enter(self) -> bool:
        """Say whether one more may come. At the bound, the oldest connection that never sent a message is closed."""
        if self.open_connections < self._config.connections_max:
            return True
        oldest = next(iter(self._never_sent), None)
        if oldest is None or (self.awake_s() - self._never_sent[oldest]) * 1000 < self._config.handshake_ms:
            return False
        oldest.refuse("idle", "it never sent a message, and another connection wants its place")
        return True

    def enter(self, connection: Connection) -> bool:
        """Add a new connection; False where it is one too many."""
        if not self.can_enter():
            return False
        self._connections[connection] = None
        self._never_sent[connection] = self.awake_s()
        self._metrics.set("connections_open", len(self._connections))
        return True

    def leave(self, connection: Connection) -> None:
        """Forget a connection. More than once is fine."""
        self._connections.pop(connection, None)
        self._never_sent.pop(connection, None)
        self._unfinished.discard(connection)
        self._metrics.set("connections_open", len(self._connections))

    def has_sent(self, connection: Connection) -> None:
        """Note that a connection has sent a whole message: it does not give way any more."""
        self._never_sent.pop(connection, None)

    def begin(self, connection: Connection) -> bool:
        """Note that a handshake or a message has begun, or that last acks are waited for: it can be overdue now.

        False where it had begun before.
        """
        is_new = connection not in self._unfinished
        self._unfinished.add(connection)
        return is_new

    def finish(self, connection: Connection) -> None:
        """Note that it is finished."""
        self._unfinished.discard(connection)

    def count_partial(self, more_bytes: int) -> None:
        """Add to the bytes of messages that have not ended; a negative number takes off."""
        self._partial_bytes += more_bytes

    # -- `TlsPort`

    def begin_tls(self, handshake: TlsHandshake, transport: asyncio.Transport, origin: str) -> bool:
        """Note a TLS handshake, and the connection beneath it; False, counted, where there is no room for it."""
        if not self.can_enter():
            self.refuse(origin, "connections_max", f"{self._config.connections_max} connections are open")
            return False
        self._tls_handshakes.add(handshake)
        self._beneath_tls.add(transport)
        return True

    def finish_tls(self, handshake: TlsHandshake) -> None:
        """Note that it is over, well or not."""
        self._tls_handshakes.discard(handshake)

    def refuse(self, origin: str, reason: str, why: str) -> None:
        """Count and log a refusal."""
        self.admission.refuse(origin, reason, why)

    def upgraded(self) -> Connection:
        """Return what handles a connection whose TLS handshake is done."""
        return self.connection()
