"""Tells the operator what the ceiling of dead letters has shut: readiness, metric, log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from headrace.contract.metrics import Metrics
from headrace.ingest.dead_letters.ceiling import UNDECLARED, Alert
from headrace.ingest.gateway.admission import Admission

log = logging.getLogger("headrace.ingest")

_LOOK_S = 0.5
_REMIND_LOOKS = 120
"""A line a minute while something is shut."""


class CeilingWatch:
    """A companion of the gateway. `ready` is the stage's readiness: (is ready, why or what else there is to know).

    It goes red for a declared tag of which nobody sends good events: the pipeline waits for them. Where others send
    good ones, and for tags that nobody declares, it stays green, with the same text: one shipper must not take a
    gateway out of everybody's load balancer.
    """

    def __init__(self, metrics: Metrics, ready: Callable[[bool, str], None]) -> None:
        self._metrics, self._ready = metrics, ready
        self._shut: dict[str, Alert] = {}
        self._looks = 0

    async def run(self, admission: Admission, stopping: asyncio.Event) -> None:
        """Look twice a second until `stopping`."""
        while not stopping.is_set():
            self.look(admission.alerts())
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _LOOK_S)

    def look(self, alerts: Sequence[Alert]) -> None:
        """Report what has changed since the last look."""
        shut = {alert.tag: alert for alert in alerts}
        opened, fresh = self._shut.keys() - shut.keys(), shut.keys() - self._shut.keys()
        self._looks = 0 if fresh else self._looks + 1
        for name in opened:
            self._metrics.set("dead_letter_ceiling_shut", 0, tag=name)
            self._metrics.set("dead_letter_origins_shut", 0, tag=name)
            log.info("dead letters of %s are below the ceiling again: its chunks are taken", name)
        for name, alert in shut.items():
            self._metrics.set("dead_letter_origins_shut", alert.origins, tag=name)
        for name in fresh if self._looks % _REMIND_LOOKS else shut:
            self._metrics.set("dead_letter_ceiling_shut", 1, tag=name)
            log.error("%s (%d events refused so far)", shut[name].text, shut[name].refused_events)
        if shut or opened:
            red = any(alert.tag != UNDECLARED and not alert.has_good for alert in alerts)
            self._ready(not red, " ".join(alert.text for alert in alerts))
        self._shut = shut
