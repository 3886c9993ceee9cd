"""The bounds that uvicorn (with h11) lacks: on connections, and on the time that a request and its answer take.

A connection beyond the bound takes the place of the one that has idled longest, or is refused; one that sends its
headers drop by drop, or does not take its answer, is closed; bytes that are no HTTP are counted. So are a request with
two lengths, which a proxy may read in another way than we do, and a body in pieces of a few bytes, each of which costs
as much as a large one. Times are of the process awake (`awake.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from headrace.process.awake import awake_s

KEEP_ALIVE_S = 15
HEADERS_S = 20.0
"""Longest time between requests of one connection, headers included; longer than `KEEP_ALIVE_S`."""

ANSWER_S = 30.0
"""Longest time in which a client takes nothing of the answer that is written to it."""
ALL_WAIT = "as many connections as may be open wait for an answer"
_HEADERS_BYTES_MAX = 65_536
"""Of a request's line and headers, and of a chunk's."""
_PIECES_MAX, _PIECE_BYTES = 1_000, 32
"""Pieces of a body that may be smaller on average than this. A thousand take some 10 ms."""

Refuse = Callable[[str, str, str], None]
"""(origin, reason, why): counts a refusal."""


class ConnectionBounds:
    """Who is connected, and since when each waits for a request. The protocols enter and leave by themselves."""

    def __init__(
        self, connections_max: int, refuse: Refuse, origin_of: Callable[[Any], str] = lambda client: ""
    ) -> None:
        """`origin_of` names whose address this is, for `refuse`."""
        self._connections_max, self.refuse, self.origin_of = connections_max, refuse, origin_of
        self._idle: dict[BoundedProtocol, float] = {}
        """Oldest first."""
        self._open: set[BoundedProtocol] = set()
        self.is_draining = False
        """True: the answer to each request ends its connection."""
        self._full: dict[BoundedProtocol, float] = {}
        """Since when each waits until its client takes more of its answer. Oldest first."""

    def enter(self, protocol: BoundedProtocol, now_s: float) -> bool:
        """Add a connection; False where there is no room."""
        if not self.make_room():
            return False
        self._open.add(protocol)
        self._idle[protocol] = now_s
        return True

    def make_room(self, beginning: int = 0) -> bool:
        """Say whether one more may come beside `beginning` that are in their TLS handshakes.

        At the bound the longest idle one is closed for it. False where none is idle.
        """
        if len(self._open) + beginning < self._connections_max:
            return True
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        oldest.cut("idle", "another connection wants its place")
        return True

    def drain(self) -> None:
        """From now on let the answer to each request end its connection, those that are computed now included."""
        self.is_draining = True
        for protocol in self._open:
            protocol.end_with_answer()

    def leave(self, protocol: BoundedProtocol) -> None:
        """Forget a connection."""
        self._open.discard(protocol)
        self._idle.pop(protocol, None)
        self._full.pop(protocol, None)

    def busy(self, protocol: BoundedProtocol) -> None:
        """Note that a request has begun."""
        self._idle.pop(protocol, None)

    def idle(self, protocol: BoundedProtocol, now_s: float) -> None:
        """Note that its answer is out."""
        if protocol in self._open:
            self._idle[protocol] = now_s

    def full(self, protocol: BoundedProtocol, now_s: float) -> None:
        """Note that its client takes no more of its answer for now."""
        if protocol in self._open:
            self._full[protocol] = now_s

    def taken(self, protocol: BoundedProtocol) -> None:
        """Note that the client takes more."""
        self._full.pop(protocol, None)

    def sweep(self, now_s: float) -> None:
        """Close connections whose next request's headers do not end in time, that send a body which is not read, or
        that do not take their answer."""
        for protocol, since_s in list(self._full.items()):
            if now_s - since_s <= ANSWER_S:
                break
            protocol.cut("slow_reader", f"took nothing of its answer for {ANSWER_S:g} s")
        for protocol, since_s in list(self._idle.items()):
            if now_s - since_s <= HEADERS_S:
                break
            protocol.cut("headers_timeout", f"no whole request within {HEADERS_S:g} s")


class BoundedConfig(uvicorn.Config):
    """uvicorn's settings, and the bounds that its protocols keep."""

    def __init__(self, app: Any, bounds: ConnectionBounds, **settings: Any) -> None:
        """`settings` are uvicorn's, beside or in place of these."""
        chosen: dict[str, Any] = {
            "http": BoundedProtocol,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            # What uvicorn logs may hold a URL, and a URL may hold a token.
            "log_level": "critical",
            "access_log": False,
            "proxy_headers": False,
            "server_header": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
        }
        super().__init__(app, **(chosen | settings))
        self.bounds = bounds
        self.load()


class _Requests(h11.Connection):
    """What h11 reads, less what it should not: two lengths in one request, a body in tiny pieces."""

    _pieces = _body_bytes = 0

    def next_event(self) -> Any:
        """Return what comes next, as h11 does. Raises `h11.RemoteProtocolError` on what is refused."""
        event = super().next_event()
        if type(event) is h11.Request:
            self._pieces = self._body_bytes = 0
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and b"content-length" in names:
                # RFC 9112, section 6.1: it may be smuggled past a proxy that goes by the other one.
                raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length")
        elif type(event) is h11.Data:
            self._pieces += 1
            self._body_bytes += len(event.data)
            if self._pieces > _PIECES_MAX and self._body_bytes < self._pieces * _PIECE_BYTES:
                raise h11.RemoteProtocolError(f"{self._pieces} pieces of a body of {self._body_bytes} bytes")
        return event


class BoundedProtocol(H11Protocol):
    """One HTTP connection."""

    def __init__(self, config: Any, *rest: Any, **more: Any) -> None:
        """As uvicorn makes it."""
        super().__init__(config, *rest, **more)
        self.conn = _Requests(h11.SERVER, _HEADERS_BYTES_MAX)

    @property
    def _bounds(self) -> ConnectionBounds:
        return cast(BoundedConfig, self.config).bounds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Enter, or be refused beyond the bound."""
        super().connection_made(transport)
        if not self._bounds.enter(self, awake_s()):
            self.cut("connections_max", ALL_WAIT)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave."""
        self._bounds.leave(self)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Let uvicorn handle what has come; a request that has begun is not idle."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._bounds.busy(self)
            if self._bounds.is_draining:
                self.end_with_answer()

    def end_with_answer(self) -> None:
        """Let the answer to the request that is on, if any, end the connection, and say so."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_started and CLOSE_HEADER not in cycle.scope["headers"]:
            # As if the client had asked for it: uvicorn's answer says so, and ends the connection.
            cycle.scope["headers"] = [*cycle.scope["headers"], CLOSE_HEADER]

    def on_response_complete(self) -> None:
        """Be idle again."""
        self._bounds.idle(self, awake_s())
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the client."""
        self._bounds.full(self, awake_s())
        super().pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._bounds.taken(self)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, where no other answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._bounds.refuse(self._origin(), "no_http", "what it sent is no HTTP request")
            super().send_400_response(msg)
        else:
            self.cut("no_http", "what it sent behind a request that is answered is no HTTP")

    def cut(self, reason: str, why: str) -> None:
        """Close at once, counted."""
        self._bounds.refuse(self._origin(), reason, why)
        self._bounds.leave(self)
        self.transport.abort()

    def _origin(self) -> str:
        return self._bounds.origin_of(self.client)
