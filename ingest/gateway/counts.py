"""What a gateway counts: what became of its events, how long feedback took to arrive, what was refused and why.

A shipper that holds feedback back beyond the window turns every sample into a negative, and the ledger closes all the
same, because late feedback is counted. The median of this delay tells it before the first window has ended.
"""

from __future__ import annotations

import logging

import numpy as np

from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.kernels.arrays import I64s

READ, APPENDED, DEAD, REPEATED = "read", "appended", "dead_lettered", "repeated"

log = logging.getLogger("headrace.ingest")

_EVERY_S = 1.0
_KEPT = 1_024
"""Some seconds of a busy service, some minutes of a quiet one."""


class Counts:
    """What became of the events of one epoch, as its punctuation tells it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._delay = metrics, FeedbackDelay()
        self.declared: dict[str, int] = {READ: 0, APPENDED: 0, DEAD: 0, REPEATED: 0}
        """Of declared events only."""

    def note(self, outcome: str, events: int, declared: bool, *, reason: str = "") -> None:
        """Count events that were appended, repeated, or became dead letters for a `reason`."""
        if outcome == DEAD:
            self._metrics.add("events_dead_lettered_total", events, reason=reason)
        if not declared:
            return
        self.declared[READ] += events
        self.declared[outcome] += events
        self._metrics.add("events_read_total", events)
        if outcome == APPENDED:
            self._metrics.add("events_appended_total", events)
        elif outcome == REPEATED:
            self._metrics.add("events_repeated_total", events)

    def note_feedback(self, name: str, times_N: I64s, now_ms: int) -> None:
        """Take feedback of one type that arrives now, int64 [N] of event times in ms, N > 0."""
        self._metrics.set("feedback_delay_seconds", self._delay.note(name, times_N, now_ms), type=name)


class FeedbackDelay:
    """The newest delays of each type of feedback."""

    def __init__(self) -> None:
        self._kept: dict[str, I64s] = {}

    def note(self, name: str, times_N: I64s, now_ms: int) -> float:
        """Take events that arrive now, int64 [N] of event times in ms, N > 0; return the median delay in seconds.

        An event that is dated ahead of the gateway counts as 0.
        """
        delays = np.maximum(now_ms - times_N[-_KEPT:], 0)
        kept = np.concatenate([self._kept.get(name, delays[:0]), delays])[-_KEPT:]
        self._kept[name] = kept
        return float(np.median(kept)) / 1_000


class Refusals:
    """Counts all, logs at most one line a second and reason; the line says how many went before it unsaid.

    A storm of them must not fill the disk.
    """

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
