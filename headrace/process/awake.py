"""Tells a process that was stopped, with its host or by itself, from one whose call does not return."""

from __future__ import annotations

from collections.abc import Callable

LATE_LOOKS = 3
"""A look that comes this many times later than planned: nothing of the process ran meanwhile."""


class Awake:
    """Follows the looks of one thread, which come every `look_s` while the process runs."""

    def __init__(self, monotonic: Callable[[], float], look_s: float) -> None:
        self._monotonic, self._look_s = monotonic, look_s
        self._looked_s = monotonic()

    def stood_s(self) -> float:
        """Return for how many seconds the process stood still since the last look: 0 where this one is in time."""
        now_s = self._monotonic()
        since_s, self._looked_s = now_s - self._looked_s, now_s
        return since_s - self._look_s if since_s > LATE_LOOKS * self._look_s else 0.0
