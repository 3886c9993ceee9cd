"""Time as a parameter: shells get a clock, pure code gets numbers."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """The system's clock in production, a virtual one in tests and replay."""

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""

    def monotonic(self) -> float:
        """Return seconds that never go back."""

    def sleep(self, seconds: float) -> None:
        """Wait."""
