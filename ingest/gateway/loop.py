"""The gateway's loop: what ticks the core, holds back whoever reads while too much is held, and drains at the end.

Bound: bytes read and not yet settled, those of unfinished messages included. Beyond it nobody reads; below three
quarters of it all go on. Nothing is dropped to keep the bound: what is not acked, its shipper still has.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.contract.config import IngestConfig
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.ingest.dead_letters.ceiling import Alert
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.admission import Admission, Companion
from headrace.ingest.gateway.batcher import Acked
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.counts import Refusals
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.sources.access_log_events import Mapped

log = logging.getLogger("headrace.ingest")

DRAIN_S = 2.0
"""Longest wait for receipts at shutdown: with the producer's own 2 s a stage stays under the supervisor's 5 s."""
_TICK_BUSY_S, _TICK_IDLE_S = 0.002, 0.01
_SWEEP_S = 0.25

Ready = Callable[[int], None]
"""Gets the port that is listened on, once everything is up."""


class Port(Protocol):
    """Connections that the loop tells when to read: the forward port."""

    @property
    def partial_bytes(self) -> int:
        """Bytes read of messages that have not ended."""

    async def listen(self, admission: Admission) -> int:
        """Listen, and offer what comes; return the port. Raises `ConfigRejected` where it cannot be had."""

    def sweep(self) -> None:
        """Close what is overdue."""

    def pause(self) -> None:
        """Read from nobody."""

    def resume(self) -> None:
        """Read on, from as many as possible before the gateway is full again."""

    def refuse_largest(self) -> None:
        """Refuse the connection whose unfinished message has the most bytes; its sender still has it."""

    def stop_listening(self) -> None:
        """Accept nobody any more; connections go on. More than once is fine."""

    async def close(self) -> None:
        """Close every connection."""


class GatewayLoop:
    """One gateway's turns, from the first connection to the goodbye. It is the `Admission` of every way in."""

    def __init__(self, gateway: Gateway, config: IngestConfig, metrics: Metrics, clock: Clock, port: Port) -> None:
        self._gateway, self._config, self._clock, self._port = gateway, config, clock, port
        self._refusals = Refusals(metrics, clock)
        self._paused = False
        self._draining = False

    # -- admission

    def offer(self, message: Message, size: int, peer: Peer, acked: Acked | None, *, refusable: bool = False) -> bool:
        """Take a message, as `Gateway.offer` does."""
        return self._gateway.offer(message, size, peer, acked, refusable=refusable)

    def mapped(self, message: Message) -> Mapped:
        """Return the events that lines of an access log are; any other message as it is."""
        return self._gateway.mapped(message)

    def refuses(self, message: Message, origin: str) -> str:
        """Say why a refusable message would be refused; empty where it is taken."""
        return self._gateway.refuses(message, origin)

    def now_ms(self) -> int:
        """Return the gateway's time."""
        return self._gateway.now_ms()

    def is_open(self) -> bool:
        """Say whether more may be read and offered."""
        return not self._paused

    def is_draining(self) -> bool:
        """Say whether the gateway is about to end."""
        return self._draining

    def must_wait(self) -> bool:
        """Compare what is held with its bound now; say whether a reader must wait."""
        if self.held_bytes() <= self._config.buffer_bytes_max:
            return False
        self._balance()
        return self._paused

    def refuse(self, origin: str, reason: str, why: str) -> None:
        """Count and log a refusal."""
        self._refusals.add(origin, reason, why)

    def alerts(self) -> Sequence[Alert]:
        """Return what the ceiling of dead letters has shut."""
        return self._gateway.ceiling.alerts(self.now_ms())

    # -- the bound

    def held_bytes(self) -> int:
        """Return the bytes that were read and are not settled."""
        return self._gateway.buffer_bytes + self._port.partial_bytes

    def _balance(self) -> None:
        """Stop or go on reading, by the bytes that are held."""
        held, most = self.held_bytes(), self._config.buffer_bytes_max
        if not self._paused and held > most:
            log.warning("holding %d bytes, bound %d: reading stops until Kafka has them", held, most)
            self._pause()
        elif self._paused and not self._draining and held <= most * 3 // 4:
            self._paused = False
            log.info("holding %d bytes: reading goes on", held)
            self._port.resume()
        if self._paused and self._port.partial_bytes > most // 2:
            # Messages that never end fill the bound: nobody could finish.
            self._port.refuse_largest()

    def _pause(self) -> None:
        self._paused = True
        self._port.pause()

    # -- turns

    async def serve(self, stop: threading.Event, *, ready: Ready, companions: Sequence[Companion] = ()) -> None:
        """Serve until `stop`, then drain: cut, wait for receipts, ack, say goodbye.

        `companions` run in the same loop, from before `ready` until the drain; what one raises ends the gateway too.
        """
        loop = asyncio.get_running_loop()
        port = await self._port.listen(self)
        log.info("gateway epoch %d", self._gateway.epoch)
        stopping = asyncio.Event()
        tasks = [loop.create_task(each.run(self, stopping), name=type(each).__name__) for each in companions]
        # One turn of the loop: a companion that listens has its port when we say that we are ready.
        await asyncio.sleep(0)
        ready(port)
        swept_s = self._clock.monotonic()
        try:
            while not stop.is_set():
                self._tick()
                _raise_failed(tasks)
                if self._clock.monotonic() - swept_s > _SWEEP_S:
                    swept_s = self._clock.monotonic()
                    self._port.sweep()
                await asyncio.sleep(_TICK_BUSY_S if self._gateway.open_chunks else _TICK_IDLE_S)
            self._port.stop_listening()
            stopping.set()
            await self._drain(tasks)
        finally:
            self._port.stop_listening()
            await _end(tasks)
            await self._port.close()

    def _tick(self) -> None:
        self._gateway.tick()
        self._balance()

    async def _drain(self, companions: Sequence[asyncio.Task[None]]) -> None:
        """Read from nobody, settle what is held; companions answer what they have begun meanwhile."""
        self._draining = True
        self._pause()
        until = self._clock.monotonic() + DRAIN_S
        while self._clock.monotonic() < until:
            self._tick()
            if all(task.done() for task in companions) and self._gateway.drained():
                break
            await asyncio.sleep(_TICK_BUSY_S)
        await _end(companions)
        if done := self._gateway.drained():
            self._gateway.goodbye()
        log.info("drained" if done else "not drained: unacked chunks stay with their senders")
        # One turn of the loop, so that the last acks are written before the sockets close.
        await asyncio.sleep(0.01)


def _raise_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
            raise Unavailable(f"{task.get_name()} has ended by itself; the gateway stops, and starts anew.")


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what still runs, wait for it, log what failed on the way."""
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            log.warning("a companion ended with %s: %s", type(outcome).__name__, outcome)
