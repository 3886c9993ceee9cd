"""Metrics kept in dictionaries: for tests and benches."""

from __future__ import annotations

import threading
from collections import defaultdict

from headrace.contract.metrics import Name


class MemoryMetrics:
    """Counters, gauges and observations of one stage, to be looked at. Thread-safe."""

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[str, str], float] = defaultdict(float)
        """By (name, reason)."""
        self.gauges: dict[tuple[str, str], float] = {}
        """By (name, reason)."""
        self.observations: defaultdict[str, list[float]] = defaultdict(list)
        self.is_ready = False
        self.reason = "starting"
        self._lock = threading.Lock()

    def add(self, name: Name, amount: float = 1.0, *, reason: str = "") -> None:
        """Raise a counter."""
        with self._lock:
            self.counters[name, reason] += amount

    def set(self, name: Name, value: float, *, reason: str = "") -> None:
        """Set a gauge."""
        self.gauges[name, reason] = value

    def observe(self, name: Name, value: float) -> None:
        """Keep one observation."""
        with self._lock:
            self.observations[name].append(value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage does its work, and if not, what it waits for."""
        self.is_ready, self.reason = is_ready, reason

    def total(self, name: Name) -> float:
        """Return a counter summed over its reasons."""
        with self._lock:
            return sum(value for (key, _), value in self.counters.items() if key == name)
