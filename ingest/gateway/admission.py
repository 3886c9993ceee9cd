"""What a way into the gateway needs of it: the forward port, the HTTP collector, the Kafka source, whoever offers.

The gateway's loop (`loop.GatewayLoop`) implements it; a test's stand-in may too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from headrace.ingest.dead_letters.ceiling import Alert
from headrace.ingest.decode.message import Message
from headrace.ingest.gateway.batcher import Acked
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.sources.access_log_events import Mapped

BEYOND_CEILING = "ceiling"
"""Too many events of the tag became dead letters."""
NO_ROOM = "no_room"
"""The message is late, and as many late events wait to be looked up as may."""


class Admission(Protocol):
    """Offers are made from the loop's own thread, and none of these calls blocks."""

    def offer(self, message: Message, size: int, peer: Peer, acked: Acked | None, *, refusable: bool = False) -> bool:
        """Take a message, as `Gateway.offer` does; False where a `refusable` one is refused."""

    def mapped(self, message: Message) -> Mapped:
        """Return the events that lines of an access log are, and how many are none; any other message as it is."""

    def refuses(self, message: Message, origin: str) -> str:
        """Say why a refusable message, `mapped`, would be refused: `BEYOND_CEILING` or `NO_ROOM`; else empty."""

    def now_ms(self) -> int:
        """Return the gateway's time, which no step of the wall clock moves."""

    def is_open(self) -> bool:
        """Say whether more may be read and offered: not while the gateway holds too much, nor once it drains."""

    def is_draining(self) -> bool:
        """Say whether the gateway is about to end: what has begun is finished, nothing new is begun."""

    def must_wait(self) -> bool:
        """Compare what is held with its bound now, not at the next turn; say whether a reader must wait.

        For a reader that got several messages at once: the rest stays undecoded until the gateway is open again.
        """

    def refuse(self, origin: str, reason: str, why: str) -> None:
        """Count and log a refusal. `why` holds no secret and nothing that the peer sent."""

    def alerts(self) -> Sequence[Alert]:
        """Return what the ceiling of dead letters has shut."""


class Companion(Protocol):
    """A task that shares the gateway and its loop: the HTTP collector, the Kafka source, the ceiling's watch."""

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Run until `stopping`, take nothing new then, answer what was begun and return.

        It has a part of `loop.DRAIN_S` for that, is cancelled after it, and must wait while the gateway is not open.
        """
