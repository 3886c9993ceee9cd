"""Metrics kept in dictionaries: for tests and benches."""

from __future__ import annotations

import threading
from collections import defaultdict

from headrace.contract.interfaces.labels import joined, label_values
from headrace.contract.metrics import Name


class MemoryMetrics:
    """Counters, gauges and observations of one stage, for tests to read. Thread-safe.

    Keys are (name, the values of its labels joined by a space, "" without labels).
    """

    def __init__(self) -> None:
        self.counters: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.gauges: dict[tuple[str, str], float] = {}
        self.observations: defaultdict[str, list[float]] = defaultdict(list)
        self.is_ready = False
        self.reason = "starting"
        self._lock = threading.Lock()

    def add(self, name: Name, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        key = name, joined(label_values(name, "counter", labels))
        with self._lock:
            self.counters[key] += amount

    def set(self, name: Name, value: float, **labels: str) -> None:
        """Set a gauge."""
        self.gauges[name, joined(label_values(name, "gauge", labels))] = value

    def observe(self, name: Name, value: float) -> None:
        """Keep one observation."""
        label_values(name, "histogram", {})
        with self._lock:
            self.observations[name].append(value)

    def ready(self, is_ready: bool, reason: str = "") -> None:
        """Say whether the stage does its work, and if not, what it waits for."""
        self.is_ready, self.reason = is_ready, reason

    def total(self, name: Name) -> float:
        """Return a counter summed over its labels."""
        with self._lock:
            return sum(value for (key, _), value in self.counters.items() if key == name)
