"""Records on their way to Kafka: in order, sent again until they are taken. Step 3 of the gateway's protocol.

A broker that is away is waited for, however long: what has no ack is lost with the process, and shippers keep the rest.
A client that gives no receipt at all, good or bad, is broken, and the gateway stops: `Receipts`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from functools import partial

import msgspec

from headrace.contract.errors import Overloaded, Unavailable
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.ingest.gateway.batcher import OpenChunk
from headrace.ingest.gateway.counts import APPENDED

_RESEND_FIRST_S, _RESEND_MAX_S = 0.1, 5.0
RECEIPT_MAX_S = 330.0
"""Longest wait for a receipt, or for room in the producer's queue: Kafka's client gives a record up after 300 s."""
_TURN_MAX_S = 5.0
"""A longer turn is a process that was stopped: its client was, too."""
_ROOM = "room in the producer's queue"


class Outgoing(msgspec.Struct, kw_only=True):
    """A record on its way, with what its receipt settles."""

    topic: str
    partition: int
    value: bytes
    headers: dict[str, str]
    key: bytes | None = None
    chunks: list[tuple[OpenChunk, int]]
    """Chunks whose events it holds, and how many of each."""
    outcome: str
    rows: int
    reason: str = ""
    oldest_ms: int | None = None
    """Event time of its oldest event that holds promises back."""
    earliest_ms: int | None = None
    """Event time of its oldest event that is too late if it is not sent soon; None where none can be."""
    wait_s: float = 0.0
    """Before it is sent again; longer after each refusal."""
    added_s: float = 0.0
    """When it was queued."""


class Receipts:
    """What the producer owes, since when; in time that the gateway was awake for."""

    def __init__(self) -> None:
        self._awake_s, self._turned_s = 0.0, -1.0
        self._owed: dict[Hashable, float] = {}
        """The oldest first."""

    def owe(self, what: Hashable) -> None:
        """Note that a receipt is due from now on; where it is noted already, since then."""
        self._owed.setdefault(what, self._awake_s)

    def came(self, what: Hashable) -> None:
        """Note that it came."""
        self._owed.pop(what, None)

    def check(self, now_s: float) -> None:
        """Raise `Unavailable` where one is overdue. Called at every turn."""
        if self._turned_s >= 0:
            self._awake_s += min(now_s - self._turned_s, _TURN_MAX_S)
        self._turned_s = now_s
        if not self._owed:
            return
        what, since_s = next(iter(self._owed.items()))
        if self._awake_s - since_s > RECEIPT_MAX_S:
            owed = _ROOM if what == _ROOM else "a receipt of Kafka's client, good or bad"
            raise Unavailable(
                f"stopping: {owed} has not come for {self._awake_s - since_s:.0f} s, {RECEIPT_MAX_S:.0f} are allowed. "
                "Shippers keep what has no ack and send it to the next start, or to another gateway."
            )


class SendQueue:
    """A full local queue holds it back; what Kafka refuses is sent again after a while, however often."""

    def __init__(
        self,
        producer: Producer,
        metrics: Metrics,
        clock: Clock,
        taken: Callable[[Outgoing], None],
        set_aside: Callable[[Outgoing], None],
    ) -> None:
        """Tell `taken` of every record that Kafka has; give `set_aside` those that have waited until they are late."""
        self._producer, self._metrics, self._clock = producer, metrics, clock
        self._taken, self._set_aside = taken, set_aside
        self._unsent: deque[Outgoing] = deque()
        self._resend: list[tuple[float, Outgoing]] = []
        self._unconfirmed: dict[int, Outgoing] = {}
        self.receipts = Receipts()

    def add(self, item: Outgoing) -> None:
        """Queue a record behind all others."""
        item.added_s = self._clock.monotonic()
        self._unsent.append(item)

    @property
    def is_held_back(self) -> bool:
        """Whether the local queue has refused records that are still to be sent."""
        return bool(self._unsent)

    @property
    def is_empty(self) -> bool:
        """Whether Kafka has everything."""
        return not (self._unsent or self._resend or self._unconfirmed)

    def oldest_ms(self) -> dict[int, int]:
        """Return, by partition, the event time of the oldest event that Kafka has not confirmed and that holds promises
        back."""
        oldest: dict[int, int] = {}
        for item in (*(one for _, one in self._resend), *self._unsent, *self._unconfirmed.values()):
            if item.oldest_ms is not None:
                oldest[item.partition] = min(item.oldest_ms, oldest.get(item.partition, item.oldest_ms))
        return oldest

    def send_again(self, now_s: float) -> None:
        """Put what was refused, and has waited, before everything else."""
        ready = [item for at, item in self._resend if at <= now_s]
        if ready:
            self._resend = [(at, item) for at, item in self._resend if at > now_s]
            self._unsent.extendleft(reversed(ready))

    def send(self, late_before_ms: int) -> None:
        """Send in order, as much as the local queue takes; set aside what has an event from before `late_before_ms`."""
        while self._unsent:
            item = self._unsent[0]
            if item.earliest_ms is not None and item.earliest_ms < late_before_ms:
                self._set_aside(self._unsent.popleft())
                continue
            self._unconfirmed[id(item)] = item
            try:
                self._producer.send(
                    item.topic,
                    item.partition,
                    item.value,
                    key=item.key,
                    headers=item.headers,
                    delivered=partial(self._delivered, item),
                )
            except Overloaded:
                del self._unconfirmed[id(item)]
                self.receipts.owe(_ROOM)
                return
            self.receipts.came(_ROOM)
            if id(item) in self._unconfirmed:
                self.receipts.owe(id(item))
            self._unsent.popleft()

    def _delivered(self, item: Outgoing, error: Exception | None, _offset: int) -> None:
        self._unconfirmed.pop(id(item), None)
        self.receipts.came(id(item))
        if error is None:
            if item.outcome == APPENDED:
                self._metrics.observe("hop_logged_seconds", self._clock.monotonic() - item.added_s)
            self._taken(item)
            return
        self._metrics.add("errors_total", kind="kafka")
        item.wait_s = min(_RESEND_MAX_S, item.wait_s * 2 or _RESEND_FIRST_S)
        self._resend.append((self._clock.monotonic() + item.wait_s, item))
