"""Metrics in a dictionary: for tests, and for tools that run once."""

from __future__ import annotations

from headrace.contract.metrics import Name


class MemoryMetrics:
    """Values by (name, reason)."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.is_ready = False

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Raise a counter."""
        self.values[name, reason] = self.values.get((name, reason), 0.0) + amount

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Set a gauge."""
        self.values[name, reason] = value

    def observe(self, name: Name, value: float) -> None:
        """Keep the sum."""
        self.add(name, value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Remember readiness."""
        self.is_ready = is_ready
