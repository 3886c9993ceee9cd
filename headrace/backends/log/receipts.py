"""What Kafka's client says of records that were sent: refusals are logged and counted, and a standstill can be seen."""

from __future__ import annotations

import logging
from collections.abc import Callable

from headrace.process.awake import awake_s

log = logging.getLogger("headrace.kafka")

TELL_S = 10.0
"""A broker that refuses one record refuses thousands: a line for each partition and error this often says enough."""
KINDS_MAX = 1_000
"""Most pairs of partition and error that are kept apart."""


class Receipts:
    """Those of one producer. `refused` gets the topic of each record that was refused."""

    def __init__(self, refused: Callable[[str], None] | None = None, monotonic: Callable[[], float] = awake_s) -> None:
        self._refused, self._monotonic = refused, monotonic
        self._moved_s = monotonic()
        self._told: dict[tuple[str, int, str], tuple[float, int]] = {}

    def sends_first(self) -> None:
        """Note that a record is sent and no other one waits for its receipt."""
        self._moved_s = self._monotonic()

    def confirmed(self) -> None:
        """Note that Kafka has a record."""
        self._moved_s = self._monotonic()

    def still_s(self, waiting: int) -> float:
        """Return for how long none was confirmed, 0 where none of the `waiting` records waits for it."""
        return self._monotonic() - self._moved_s if waiting else 0.0

    def refuse(self, topic: str, partition: int, error: object) -> None:
        """Log and count a record that was refused."""
        if self._refused is not None:
            self._refused(topic)
        key, now_s = (topic, partition, str(error)), self._monotonic()
        if len(self._told) >= KINDS_MAX and key not in self._told:
            self._told.clear()
        told_s, before = self._told.get(key, (-TELL_S, 0))
        if now_s - told_s < TELL_S:
            self._told[key] = (told_s, before + 1)
            return
        more = f", and {before} more since the last line" if before else ""
        log.error("a record of %s/%d was refused: %s%s", topic, partition, error, more)
        self._told[key] = (now_s, 0)
