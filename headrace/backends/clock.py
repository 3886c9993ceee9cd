"""Clocks: the system's, and a virtual one for tests and replay."""

from __future__ import annotations

import time


class SystemClock:
    """The machine's own time."""

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class VirtualClock:
    """Time that moves only when told; `sleep` moves it."""

    def __init__(self, start_ms: int = 0) -> None:
        self._now_ms = float(start_ms)

    def now_ms(self) -> int:
        """Return the virtual Unix time in milliseconds."""
        return int(self._now_ms)

    def monotonic(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_ms / 1000

    def sleep(self, seconds: float) -> None:
        """Move time on by `seconds`."""
        self._now_ms += seconds * 1000
