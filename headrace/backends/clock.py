"""Clocks: the system's for production, a virtual one that moves only when told."""

from __future__ import annotations

import threading
import time


class SystemClock:
    """The machine's time."""

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(max(0.0, seconds))


class VirtualClock:
    """Time for tests and replay: `sleep` and `advance` move it, nothing else does. Thread-safe.

    >>> clock = VirtualClock(1_000)
    >>> clock.sleep(0.25)
    >>> clock.now_ms(), clock.monotonic()
    (1250, 0.25)
    """

    def __init__(self, start_ms: int = 0) -> None:
        self._start_us = start_ms * 1_000
        self._now_us = self._start_us
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        """Return the virtual Unix time in milliseconds."""
        return self._now_us // 1_000

    def monotonic(self) -> float:
        """Return virtual seconds since the start."""
        return (self._now_us - self._start_us) / 1_000_000

    def sleep(self, seconds: float) -> None:
        """Move time on by `seconds` and return at once."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move time on; a negative amount is ignored, time never goes back."""
        with self._lock:
            self._now_us += max(0, round(seconds * 1_000_000))
