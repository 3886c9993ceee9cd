"""The end of a process of serving, after which no accepted request is without an answer.

1. SIGTERM asks for it. The process says that it is not ready, and the first one hands the signal on to the workers.
2. For `drain_s` requests are answered as before, and each answer ends its connection (`Connection: close`), so that
   clients and load balancers go elsewhere.
3. A worker then accepts no more. The first process does so a moment later, when it alone is left to accept: it takes
   what waits in the socket's queue, and shuts the socket, so that connections are refused from then on.
4. What was begun is answered. Kept connections that idled all the while are closed, and the process ends.

SIGINT (Ctrl-C, and the first process to workers that are not to go on) leaves out the first three steps. A further
SIGTERM changes nothing.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import uvicorn

from headrace.process.awake import awake_s
from headrace.process.http_bounds import BoundedConfig

LAST_S = 0.1
"""For what was accepted just before nothing is any more."""
WORKERS_STOP_S = 0.3
"""By when the workers have stopped accepting: they look ten times a second at what they were told."""


class Beside(Protocol):
    """Another way in, which runs in the same loop."""

    async def begin(self) -> None:
        """Accept requests."""

    async def end(self) -> None:
        """Answer what was begun, within a bound, and accept nothing more."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ends, and what ends with it."""

    drain_s: float = 0.0
    """How long SIGTERM lets it answer."""
    drains: Callable[[], None] = lambda: None
    """Called when that time begins."""
    answer_s: float = 2.0
    """Longest time that is waited for answers that were begun, at the end."""
    beside: Beside | None = None


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains before it ends."""

    def __init__(
        self,
        config: BoundedConfig,
        ending: Ending,
        *,
        is_first: bool,
        hand_on: Callable[[], None],
        drained: Callable[[], None],
    ) -> None:
        """`hand_on` is called when draining begins, `drained` just before nothing is accepted any more."""
        super().__init__(config)
        self._bounds, self._ending, self._is_first = config.bounds, ending, is_first
        self._hand_on, self._drained = hand_on, drained
        self._is_asked, self._until_s = False, 0.0
        self.is_drained = False
        """True: SIGTERM was obeyed, and the workers end as this process does."""
        self._listening: list[socket.socket] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: SIGTERM asks for draining, SIGINT ends at once."""
        if sig == signal.SIGTERM:
            self._captured_signals.append(sig)
            self._is_asked = True
        else:
            super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept on all ways in."""
        self._listening = sockets or []
        await super().startup(sockets)
        if self._ending.beside is not None:
            await self._ending.beside.begin()

    async def on_tick(self, counter: int) -> bool:
        """Go on with draining, ten times a second."""
        if self._is_asked and not self.should_exit:
            now_s = awake_s()
            if not self._until_s:
                self._until_s = now_s + self._ending.drain_s
                self._bounds.drain()
                self._ending.drains()
                self._hand_on()
            if now_s >= self._until_s:
                self.is_drained = True
                self._drained()
                await self.accept_no_more(shuts=self._is_first)
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the last answers out."""
        if self._ending.beside is not None:
            await self._ending.beside.end()
        await super().shutdown(sockets)

    async def accept_no_more(self, *, shuts: bool) -> None:
        """Stop accepting and let the last answers out. Where it `shuts`, no process accepts on the socket any more."""
        if shuts:
            await asyncio.sleep(WORKERS_STOP_S)
        taken = [each for listener in self._listening if shuts for each in _shut(listener)]
        for server in self.servers:
            server.close()
        for each in taken:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, each)
        await asyncio.sleep(LAST_S)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        made: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )
        return made


def _shut(listener: socket.socket) -> list[socket.socket]:
    """Return the connections that wait in the queue of a socket, and let it refuse all further ones."""
    taken: list[socket.socket] = []
    with suppress(OSError):  # Nothing waits any more; or as many files are open as may be.
        while True:
            taken.append(listener.accept()[0])
    listener.shutdown(socket.SHUT_RDWR)
    return taken
