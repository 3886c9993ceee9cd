"""Tells a wall clock that was set from one that goes. What is deleted by its time waits then.

A clock that a time server slews keeps within some ms a second; one that is set, by hand or by a virtual machine's host,
steps. Time asleep is no step: both clocks count it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STEP_S = 60.0
"""Far more than a clock that is kept drifts within a process's life."""


def boot_s() -> float:
    """Return seconds since the machine's start, those asleep among them; no setting of the clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SetClock:
    """Follows a wall clock; whoever deletes by it asks first."""

    def __init__(self, wall_ms: Callable[[], int], settle_s: float, steady_s: Callable[[], float] = boot_s) -> None:
        """A clock that was set counts again after `settle_s`, or once it is set back."""
        self._wall_ms, self._steady_s, self._settle_s = wall_ms, steady_s, settle_s
        self._off_s = self._seen_s = self._off()
        self._since_s = steady_s()

    def _off(self) -> float:
        return self._wall_ms() / 1_000 - self._steady_s()

    def moved_s(self) -> float:
        """Return by how many seconds the clock is not what it was; 0 where it may be gone by."""
        off_s, now_s = self._off(), self._steady_s()
        if abs(off_s - self._seen_s) > STEP_S:
            self._seen_s, self._since_s = off_s, now_s
        if abs(off_s - self._off_s) <= STEP_S or now_s - self._since_s >= self._settle_s:
            # Slow drift is followed.
            self._off_s = self._seen_s = off_s
            return 0.0
        return off_s - self._off_s
