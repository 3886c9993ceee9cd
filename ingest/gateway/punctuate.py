"""Punctuation: what a gateway promises each partition, and when. Pure.

1. A promise's time is min(the gateway's time, event time of the oldest event that Kafka has not confirmed and that is
   newer than the last promise). An event that is older than it is late already, and holds nothing back.
2. It is queued after every event it speaks of, and the producer keeps the order within a partition.
3. It never goes back within an epoch: an event that comes later and is older than the last promise is late, and the
   stream's rule (expiry counts from the watermark when it was read) keeps it whole.
4. While the former promise to a partition has no receipt, none is added: a broker that is away is not flooded.
5. For `grace_ms` after its start it promises nothing: shippers that reconnect hand over what they held during the
   outage before the watermark jumps over it. The same holds after it heard nothing for longer than `SILENT_S`: it
   stalled (no turn came), or Kafka gave no receipt, so that its shippers had to keep what they have. While no receipt
   comes in time it only repeats its last promise, until one does; from then on the grace counts.
6. After the last event of a clean shutdown comes `bye`: this gateway no longer holds the watermark back.
"""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.formats.events import Punctuation

SILENT_S = 1.0
"""A healthy gateway has a turn every 10 ms and a receipt within 100: a second is an outage, and still shorter than a
window in which anybody clicks."""


class Punctuator:
    """When punctuation is due, and what was promised, over all partitions of one gateway's epoch."""

    def __init__(
        self,
        gateway: str,
        epoch: int,
        partitions: int,
        every_ms: int,
        grace_ms: int = 0,
        before: Mapping[int, int] | None = None,
    ) -> None:
        """Begin an epoch; `before` has the gateway's last promise of an older one, by partition."""
        self._gateway = gateway
        self._epoch = epoch
        self._every_s = every_ms / 1000
        self._grace_s = grace_ms / 1000
        self._due = self._seen_s = -1.0
        self._promised = [0] * partitions
        self._before = [0] * partitions
        self._former = [(before or {}).get(partition, 0) for partition in range(partitions)]
        self._unconfirmed = [False] * partitions
        self._sent_s = [0.0] * partitions
        self._silent = False

    def due(self, monotonic_s: float) -> bool:
        """Say whether punctuation is due, and if so, begin the next interval. Called at every turn of the gateway."""
        if self._seen_s < 0 or monotonic_s - self._seen_s > SILENT_S:
            self._due = monotonic_s + self._grace_s
        self._seen_s = monotonic_s
        if monotonic_s < self._due:
            return False
        self._due = monotonic_s + self._every_s
        return True

    def promised(self, partition: int) -> int:
        """Return the last promise to `partition`: only events that are newer hold the next one back."""
        return self._promised[partition] or self._former[partition]

    def promise(
        self, partition: int, now_ms: int, oldest_ms: int | None, counts: Mapping[str, int], *, bye: bool = False
    ) -> Punctuation | None:
        """Return the next punctuation of `partition`; None while the former one has no receipt (except `bye`)."""
        if self._unconfirmed[partition] and not bye:
            return None
        time_ms = self._promised[partition]
        if not self._silent or bye:
            time_ms = max(time_ms, now_ms if oldest_ms is None else min(now_ms, oldest_ms))
        self._before[partition], self._promised[partition] = self._promised[partition], time_ms
        self._unconfirmed[partition] = True
        self._sent_s[partition] = self._seen_s
        return Punctuation(self._gateway, self._epoch, time_ms, bye=bye, counts=dict(counts), by_record=True)

    def confirmed(self, partition: int) -> None:
        """Note the receipt, good or bad: the next promise replaces this one anyway."""
        self._unconfirmed[partition] = False
        if self._seen_s - self._sent_s[partition] > SILENT_S:
            self._silent = True
        elif self._silent:
            self._silent = False
            self._due = max(self._due, self._seen_s + self._grace_s)

    def refused(self, partition: int) -> None:
        """Take back the promise that the local queue refused: nobody has read it."""
        self._promised[partition] = self._before[partition]
        self._unconfirmed[partition] = False
