"""Refusals: each one counted with its reason, and told in the log without letting a storm of them fill the disk."""

from __future__ import annotations

import logging

from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics

log = logging.getLogger("headrace.ingest")

_EVERY_S = 1.0


class Refusals:
    """Counts all, logs at most one line a second and reason; the line says how many went before it unsaid."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics, self._clock = metrics, clock
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def add(self, origin: str, reason: str, why: str) -> None:
        """Count one. `why` holds no secret and nothing that the peer sent."""
        self._metrics.add("connections_refused_total", reason=reason)
        now_s = self._clock.monotonic()
        if now_s - self._said.get(reason, -_EVERY_S) < _EVERY_S:
            self._unsaid[reason] = self._unsaid.get(reason, 0) + 1
            return
        self._said[reason] = now_s
        before = self._unsaid.pop(reason, 0)
        more = f" (and {before} more for this reason since the last such line)" if before else ""
        log.warning("%s refused (%s): %s%s", origin, reason, why, more)
