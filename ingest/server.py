"""The gateway's sockets: Fluent forward over TCP on asyncio. It reads, hands over, acks; decisions are the gateway's.

Bounds: connections (refused beyond), bytes read and not yet settled (all connections stop being read beyond it, go on
below three quarters), one message, acks that a peer does not read. Nothing is dropped to keep a bound: what is not
acked, its shipper still has.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from headrace.contract.clock import Clock
from headrace.contract.config import IngestConfig
from headrace.contract.log import Producer
from headrace.contract.metrics import Metrics
from headrace.contract.project import Project
from headrace.contract.topics import Topics
from headrace.ingest.batcher import Outcome
from headrace.ingest.forward_protocol import Decoder, Ping, Refused, encode_ack
from headrace.ingest.gateway import Gateway, Peer, peer_of
from headrace.ingest.handshake import Handshake

log = logging.getLogger("headrace.ingest")

DRAIN_S = 2.0
"""Longest wait for receipts at shutdown: with the producer's own 2 s a stage stays under the supervisor's 5 s."""
_TICK_BUSY_S, _TICK_IDLE_S = 0.002, 0.01
_PONG_BYTES_MAX = 4_096
_ACK_BYTES_MAX = 1_048_576
"""A peer that leaves this many bytes of acks unread is cut off. 1 MiB is some 20,000 acks."""


class Server:
    """Connections of one gateway, and the task that keeps it ticking."""

    def __init__(
        self, gateway: Gateway, config: IngestConfig, metrics: Metrics, clock: Clock, place: Place | None = None
    ) -> None:
        self.place = place or Place()
        self.gateway, self.config, self.metrics, self._clock = gateway, config, metrics, clock
        self.connections: set[Connection] = set()
        self.partial_bytes = 0
        self.paused = False
        self.draining = False

    def balance(self) -> None:
        """Stop or go on reading, by the bytes that are held."""
        held, most = self.gateway.buffer_bytes + self.partial_bytes, self.config.buffer_bytes_max
        if not self.paused and held > most:
            log.warning("holding %d bytes, bound %d: reading stops until Kafka has them", held, most)
            self.pause()
        elif self.paused and not self.draining and held <= most * 3 // 4:
            self.paused = False
            log.info("holding %d bytes: reading goes on", held)
            for connection in self.connections:
                connection.resume()
        if self.paused and self.partial_bytes > most // 2 and self.connections:
            # Messages that never end fill the bound: nobody could finish. The largest goes; its sender still has it.
            max(self.connections, key=lambda c: c.partial_bytes).refuse("partial_bound", "unfinished messages")

    def pause(self) -> None:
        """Read from nobody."""
        self.paused = True
        for connection in self.connections:
            connection.pause()

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
        listener = await loop.create_server(
            lambda: Connection(self), host, port, reuse_address=True, reuse_port=share_port or None, backlog=1024
        )
        bound = listener.sockets[0].getsockname()[1]
        log.info("forward on %s:%d, gateway epoch %d", host, bound, self.gateway.epoch)
        stopping = asyncio.Event()
        tasks = [loop.create_task(companion.run(self, stopping)) for companion in companions]
        # One turn of the loop: a companion that listens has its port when we say that we are ready.
        await asyncio.sleep(0)
        ready(bound)
        try:
            while not stop.is_set():
                self._tick()
                _raise_failed(tasks)
                await asyncio.sleep(_TICK_BUSY_S if self.gateway.open_chunks else _TICK_IDLE_S)
            listener.close()
            stopping.set()
            await self._drain(tasks)
        finally:
            listener.close()
            await _end(tasks)
            for connection in list(self.connections):
                connection.close()
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


class Connection(asyncio.Protocol):
    """One shipper."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._decoder = Decoder(server.config.chunk_bytes_max, greets=bool(server.place.shared_key))
        self._handshake: Handshake | None = None
        self._transport: asyncio.Transport | None = None
        self._peer = Peer("unknown")
        self.partial_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the peer in, or refuse it beyond the bound."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a forward connection is a stream")
        self._transport = transport
        self._peer = peer_of(transport.get_extra_info("peername"))
        server = self._server
        if len(server.connections) >= server.config.connections_max:
            self.refuse("connections_max", f"{server.config.connections_max} connections are open")
            return
        server.connections.add(self)
        server.metrics.set("connections_open", len(server.connections))
        if server.place.shared_key:
            self._handshake = Handshake(server.place.shared_key, server.place.name, os.urandom(16))
            transport.write(self._handshake.helo())
        if server.paused:
            self.pause()

    def data_received(self, data: bytes) -> None:
        """Decode, offer; on what is no forward message, close."""
        server = self._server
        try:
            for message, size in self._decoder.feed(data):
                if isinstance(message, Ping):
                    self._greet(message)
                    continue
                acked = None if message.chunk is None else partial(self._ack, encode_ack(message))
                server.gateway.offer(message, size, self._peer, acked)
        except Refused as refused:
            self.refuse(refused.reason, str(refused))
            return
        self._account(self._decoder.pending_bytes)
        if server.gateway.buffer_bytes + server.partial_bytes > server.config.buffer_bytes_max:
            server.balance()

    def _greet(self, ping: Ping) -> None:
        if self._handshake is None or self._transport is None:
            raise Refused("no_ping", "a PING that nobody asked for")
        pong, refusal = self._handshake.answer(ping.value)
        self._transport.write(pong)
        if refusal:
            raise Refused(refusal, "the handshake failed: does the client have this gateway's shared key?")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the peer; its chunks go on, their acks go nowhere."""
        self._transport = None
        self._account(0)
        self._server.connections.discard(self)
        self._server.metrics.set("connections_open", len(self._server.connections))

    def refuse(self, reason: str, why: str) -> None:
        """Close at once, counted; nothing further is acked here."""
        self._server.metrics.add("connections_refused_total", reason=reason)
        log.warning("%s refused (%s): %s", self._peer.origin, reason, why)
        self._account(0)
        if self._transport is not None:
            # A PONG with its refusal may still go out; a peer that reads nothing is not waited for.
            if self._transport.get_write_buffer_size() > _PONG_BYTES_MAX:
                self._transport.abort()
            else:
                self._transport.close()
            self._transport = None
        self._server.connections.discard(self)

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing() and not self._transport.is_reading():
            self._transport.resume_reading()

    def close(self) -> None:
        """Write what is left, then close."""
        if self._transport is not None:
            self._transport.close()

    def _account(self, pending: int) -> None:
        self._server.partial_bytes += pending - self.partial_bytes
        self.partial_bytes = pending

    def _ack(self, data: bytes, _outcome: Outcome) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        # In one piece: fluent-bit parses a single read.
        self._transport.write(data)
        self._server.metrics.add("chunks_acked_total")
        if self._transport.get_write_buffer_size() > _ACK_BYTES_MAX:
            self.refuse("slow_reader", "acks stay unread")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a gateway listens and what it is called."""

    host: str = "127.0.0.1"
    port: int = 24224
    name: str = "gateway"
    """Stable over restarts: a newer epoch of the same name replaces the older in the watermark."""
    shared_key: str = ""
    """With one, each connection begins with Fluent's handshake; a secret, so it comes from the environment."""
    share_port: bool = False
    """Several gateway processes on one port (SO_REUSEPORT); each needs a name of its own."""


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
) -> None:
    """Serve until `stop` is set, then drain within `DRAIN_S` and return. `ready` gets the bound port."""
    gateway = Gateway(project, config, topics, partitions, producer, metrics, clock, place.name)
    server = Server(gateway, config, metrics, clock, place)
    serving = server.serve(
        place.host, place.port, stop, share_port=place.share_port, ready=ready, companions=companions
    )
    asyncio.run(serving)
    producer.flush(0.2)
