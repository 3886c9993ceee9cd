"""The turns of one event loop: one answer is computed at a time, and sockets are read between any two.

Without that, all requests that came while one was computed would be computed before the next ones are seen, and nobody
would know how long these have waited. `admission` decides; this module waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from headrace.contract.metrics import Metrics
from headrace.serving.api.admission import Admission, Ticket


class Turns:
    """For one event loop."""

    def __init__(self, bound_s: float, monotonic: Callable[[], float], metrics: Metrics) -> None:
        self._admission, self._monotonic, self._metrics = Admission(bound_s), monotonic, metrics
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._is_on = False

    @asynccontextmanager
    async def turn(self, size: int, *, since_s: float, until_s: float = math.inf) -> AsyncIterator[None]:
        """Wait for the turn of a request of `size` bytes; within the context it is computed, without waiting.

        Args:
            since_s: when it came.
            until_s: when its answer is of no use any more.

        Raises `BadRequest` with 429 or 504, and then it is not to be computed.
        """
        ticket = self._admission.offer(size, self._monotonic(), until_s)
        ticket.offered_s = since_s
        if self._is_on:
            await self._wait(ticket)
        else:
            self._is_on = True
            self._admission.take(self._monotonic())
        computed = False
        try:
            now_s = self._monotonic()
            self._metrics.observe("queue_seconds", now_s - since_s)
            self._admission.check(ticket, now_s)
            computed = True
            yield
        finally:
            self._admission.done(self._monotonic(), computed=computed)
            # Not at once: the next turn comes when the loop has looked at its sockets.
            asyncio.get_running_loop().call_soon(self._next)

    async def _wait(self, ticket: Ticket) -> None:
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            await future
        except asyncio.CancelledError:
            # Its turn had come, and goes on to the next one; or it never comes.
            if future.done() and not future.cancelled():
                self._admission.done(self._monotonic(), computed=False)
                asyncio.get_running_loop().call_soon(self._next)
            raise
        finally:
            self._waiting.pop(ticket, None)

    def _next(self) -> None:
        while (ticket := self._admission.take(self._monotonic())) is not None:
            future = self._waiting.get(ticket)
            if future is not None and not future.done():
                future.set_result(None)
                return
            self._admission.done(self._monotonic(), computed=False)
        self._is_on = False
