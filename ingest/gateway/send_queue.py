"""Records on their way to Kafka: in order, sent again until they are taken. Step 3 of the gateway's protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from headrace.contract.errors import Overloaded
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Producer
from headrace.contract.metrics import Metrics
from headrace.ingest.gateway.batcher import OpenChunk

_RESEND_FIRST_S, _RESEND_MAX_S = 0.1, 5.0


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

    def add(self, item: Outgoing) -> None:
        """Queue a record behind all others."""
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
                return
            self._unsent.popleft()

    def _delivered(self, item: Outgoing, error: Exception | None, _offset: int) -> None:
        self._unconfirmed.pop(id(item), None)
        if error is None:
            self._taken(item)
            return
        self._metrics.add("errors_total", kind="kafka")
        item.wait_s = min(_RESEND_MAX_S, item.wait_s * 2 or _RESEND_FIRST_S)
        self._resend.append((self._clock.monotonic() + item.wait_s, item))
