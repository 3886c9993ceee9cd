"""What a gateway counts: what became of its events, how long feedback took to arrive, what was refused and why.

A shipper that holds feedback back beyond the window turns every sample into a negative, and the ledger closes all the
same, because late feedback is counted. The median of this delay tells it before the first window has ended.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from headrace.contract.checks.unknown_fields import UnknownFields, undeclared
from headrace.contract.interfaces.clock import Clock
from headrace.contract.metrics import Metrics
from headrace.ingest.decode.message import read_entry
from headrace.ingest.decode.msgpack_scan import U8s
from headrace.ingest.decode.validate import Declared
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
        self._looks: dict[str, UnknownLook] = {}
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
        self._metrics.observe("hop_shipped_seconds", max(0, now_ms - int(times_N.max())) / 1_000)

    def look(self, declared: Declared, data: U8s, start: int, now_s: float) -> None:
        """Look, once a second, whether an event of a type brings undeclared fields: that which begins at `start`."""
        known = self._looks.setdefault(declared.tag, UnknownLook(declared))
        for name in known.names(data, start, now_s):
            self._metrics.add("unknown_fields_total", type=declared.name, field=name)


class UnknownLook:
    """Looks for undeclared fields of one type. A project that refuses them gets dead letters, which tell them all."""

    def __init__(self, declared: Declared) -> None:
        self._declared, self._fields, self._at_s = declared, UnknownFields(declared.known), -math.inf

    def names(self, data: U8s, start: int, now_s: float) -> list[str]:
        """Return the undeclared fields of an event, as labels; log each when it comes first. None within a second of
        the last look, and of what is no event."""
        if self._declared.unknown == "refuse" or now_s - self._at_s < _EVERY_S:
            return []
        self._at_s = now_s
        record = read_entry(data, start).record
        found = undeclared(record, self._declared.known) if isinstance(record, dict) else []
        becomes = "left out" if self._declared.unknown == "drop" else "kept in `extra`"
        for said in (said for name in found if (said := self._fields.new(name))):
            log.warning(
                "field of event %r: %s It is %s (unknown=%r, docs/events.md).",
                *(self._declared.tag, said, becomes, self._declared.unknown),
            )
        return [self._fields.label(name) for name in found]


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
