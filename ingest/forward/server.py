"""The gateway's shell: sockets, deadlines and the loop that ticks. What is taken is the gateway's decision.

Bounds: connections (refused beyond, unless one that never sent a message can give way), bytes read and not yet settled
(all connections stop being read beyond it, go on below three quarters), one message and the time that it takes, the
handshake's time, acks that a peer does not read. Nothing is dropped to keep a bound: what is not acked, its shipper
still has.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.contract.config import IngestConfig
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.forward.connection import Connection
from headrace.ingest.forward.endpoint import Place as Place
from headrace.ingest.forward.listen import Listeners
from headrace.ingest.forward.refusals import Refusals
from headrace.ingest.forward.tls import Identity, TlsGate
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.warm import warm

log = logging.getLogger("headrace.ingest")

DRAIN_S = 2.0
"""Longest wait for receipts at shutdown: with the producer's own 2 s a stage stays under the supervisor's 5 s."""
_TICK_BUSY_S, _TICK_IDLE_S = 0.002, 0.01
_SWEEP_S, _RENEW_S = 0.25, 30.0
_LINGER_S = 30.0
"""How long a peer that ended its side may wait for its last acks."""
_FILES_SPARE = 512
"""Open files beside connections: Kafka, metrics, logs, the collector's."""


class Server:
    """Connections of one gateway, and the task that keeps it ticking."""

    def __init__(
        self,
        gateway: Gateway,
        config: IngestConfig,
        metrics: Metrics,
        clock: Clock,
        place: Place | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.place, self.identity = place or Place(), identity
        self.gateway, self.config, self.metrics, self._clock = gateway, config, metrics, clock
        self.refusals = Refusals(metrics, clock)
        self.connections: dict[Connection, None] = {}
        """In the order in which they are read on after a pause."""
        self.gates: set[TlsGate] = set()
        self.beneath_tls: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self.strangers: dict[Connection, float] = {}
        """Those that have not sent a whole message yet, oldest first, with the time of their coming."""
        self.unfinished: set[Connection] = set()
        """Those with a handshake or a message that has begun and not ended, and those that wait for last acks."""
        self.partial_bytes = 0
        self.paused = False
        self.draining = False

    def now_s(self) -> float:
        """Return the clock that deadlines are measured by."""
        return self._clock.monotonic()

    # -- who is connected

    def has_room(self) -> bool:
        """Say whether one more may come; at the bound a silent stranger gives way if there is one."""
        if len(self.connections) + len(self.gates) < self.config.connections_max:
            return True
        oldest = next(iter(self.strangers), None)
        if oldest is None or (self.now_s() - self.strangers[oldest]) * 1000 < self.config.handshake_ms:
            return False
        oldest.refuse("idle", "it never sent a message, and another connection wants its place")
        return True

    def take_in(self, connection: Connection) -> bool:
        """Enter a new connection, or say that there is no room."""
        if not self.has_room():
            return False
        self.connections[connection] = None
        self.strangers[connection] = self.now_s()
        self.metrics.set("connections_open", len(self.connections))
        return True

    def let_go(self, connection: Connection) -> None:
        """Forget a connection. More than once is fine."""
        self.connections.pop(connection, None)
        self.strangers.pop(connection, None)
        self.unfinished.discard(connection)
        self.metrics.set("connections_open", len(self.connections))

    # -- bounds

    def balance(self) -> None:
        """Stop or go on reading, by the bytes that are held."""
        held, most = self.gateway.buffer_bytes + self.partial_bytes, self.config.buffer_bytes_max
        if not self.paused and held > most:
            log.warning("holding %d bytes, bound %d: reading stops until Kafka has them", held, most)
            self.pause()
        elif self.paused and not self.draining and held <= most * 3 // 4:
            self.paused = False
            log.info("holding %d bytes: reading goes on", held)
            for connection in list(self.connections):
                # To the end of the order: if the bound is reached again on the way, the others come first next time.
                if self.connections.pop(connection, connection) is None:
                    self.connections[connection] = None
                    connection.resume()
                if self.paused:
                    break
        if self.paused and self.partial_bytes > most // 2 and self.unfinished:
            # Messages that never end fill the bound: nobody could finish. The largest goes; its sender still has it.
            max(self.unfinished, key=lambda c: c.partial_bytes).refuse("partial_bound", "unfinished messages")

    def pause(self) -> None:
        """Read from nobody."""
        self.paused = True
        for connection in self.connections:
            connection.pause()

    def _sweep(self) -> None:
        """Close what is overdue. While the gateway does not read, nobody can finish anything and nobody is blamed."""
        now_s, config = self.now_s(), self.config
        for connection in list(self.unfinished):
            waited_s = now_s - connection.since_s
            if connection.half_closed:
                if waited_s > _LINGER_S:
                    connection.close()
            elif self.paused:
                continue
            elif connection.greeting:
                if waited_s * 1000 > config.handshake_ms:
                    connection.refuse("handshake_timeout", f"no handshake within {config.handshake_ms} ms")
            elif waited_s * 1000 > config.message_ms:
                connection.refuse("message_timeout", f"a message took longer than {config.message_ms} ms")

    # -- the loop

    async def serve(
        self,
        host: str,
        port: int,
        stop: threading.Event,
        *,
        share_port: bool,
        ready: Ready,
        companions: Sequence[Companion] = (),
    ) -> None:
        """Serve until `stop`, then drain: cut, wait for receipts, ack, say goodbye.

        `companions` run in the same loop, from before `ready` until the drain; what one raises ends the server too.
        """
        loop = asyncio.get_running_loop()
        listeners = Listeners()
        await listeners.open(self, host, port, share_port=share_port)
        how = "with TLS" if self.identity is not None else "plain"
        log.info("forward on %s:%d %s, gateway epoch %d", host, listeners.port, how, self.gateway.epoch)
        stopping = asyncio.Event()
        tasks = [loop.create_task(companion.run(self, stopping)) for companion in companions]
        # One turn of the loop: a companion that listens has its port when we say that we are ready.
        await asyncio.sleep(0)
        ready(listeners.port)
        swept_s = renewed_s = self.now_s()
        try:
            while not stop.is_set():
                self._tick()
                _raise_failed(tasks)
                if self.now_s() - swept_s > _SWEEP_S:
                    swept_s = self.now_s()
                    self._sweep()
                if self.identity is not None and self.now_s() - renewed_s > _RENEW_S:
                    renewed_s = self.now_s()
                    self.identity.renew()
                await asyncio.sleep(_TICK_BUSY_S if self.gateway.open_chunks else _TICK_IDLE_S)
            listeners.close()
            stopping.set()
            await self._drain(tasks)
        finally:
            listeners.close()
            await _end(tasks)
            for gate in list(self.gates):
                gate.cancel()
            for connection in list(self.connections):
                connection.close()
            await asyncio.sleep(0)
            # Peers that do not answer TLS's goodbye are not waited for: what was due to them has been written.
            for transport in list(self.beneath_tls):
                transport.abort()
            await asyncio.sleep(0)

    def _tick(self) -> None:
        self.gateway.tick()
        self.balance()

    async def _drain(self, companions: Sequence[asyncio.Task[None]]) -> None:
        """Read from nobody, settle what is held; companions answer what they have begun meanwhile."""
        self.draining = True
        self.pause()
        until = self._clock.monotonic() + DRAIN_S
        while self._clock.monotonic() < until:
            self._tick()
            if all(task.done() for task in companions) and self.gateway.drained():
                break
            await asyncio.sleep(_TICK_BUSY_S)
        await _end(companions)
        if done := self.gateway.drained():
            self.gateway.goodbye()
        log.info("drained" if done else "not drained: unacked chunks stay with their senders")
        # One turn of the loop, so that the last acks are written before the sockets close.
        await asyncio.sleep(0.01)


Ready = Callable[[int], None]


class Companion(Protocol):
    """Another way in that shares the gateway and its loop: the HTTP collector, the Kafka source."""

    async def run(self, server: Server, stopping: asyncio.Event) -> None:
        """Offer to `server.gateway` until `stopping`, take nothing new then, answer what was begun and return.

        It has a part of `DRAIN_S` for that, is cancelled after it, and must wait while `server.paused`.
        """


def _raise_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs, wait for it, log what failed on the way."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.warning("a companion ended with %s: %s", type(outcome).__name__, outcome)


def run(
    project: Project,
    config: IngestConfig,
    topics: Topics,
    partitions: int,
    producer: Producer,
    metrics: Metrics,
    clock: Clock,
    place: Place,
    stop: threading.Event,
    ready: Ready = lambda port: None,
    companions: Sequence[Companion] = (),
    identity: Identity | None = None,
    privacy: Privacy | None = None,
) -> None:
    """Serve until `stop` is set, then drain within `DRAIN_S` and return. `ready` gets the bound port.

    With an `identity` the port speaks TLS. Raises `ConfigRejected` where a port or socket cannot be had.
    """
    begun_s = clock.monotonic()
    warm(project, config, topics, partitions, clock)
    log.info("decoders ready after %.1f s; a machine's first start compiles them", clock.monotonic() - begun_s)
    gateway = Gateway(project, config, topics, partitions, producer, metrics, clock, place.name, privacy)
    server = Server(gateway, config, metrics, clock, place, identity)
    _allow_files(config.connections_max)
    serving = server.serve(
        place.host, place.port, stop, share_port=place.share_port, ready=ready, companions=companions
    )
    asyncio.run(serving)
    producer.flush(0.2)


def _allow_files(connections_max: int) -> None:
    """Raise the soft limit of open files as far as the hard one allows; say so where connections will not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + _FILES_SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "open files are limited to %d, ingest.connections_max is %d: raise ulimit -n", hard, connections_max
        )
