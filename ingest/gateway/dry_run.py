"""What a gateway works with when nothing may come of it: a producer that writes nothing, metrics that show nothing."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.contract.formats.events import FEEDBACK, IMPRESSION, decode_batch
from headrace.contract.interfaces.log import Delivered
from headrace.contract.metrics import Name


def events_in(value: bytes, headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the types and ids of the events in one record of `events`."""
    name = headers.get("type") or headers.get("kind", "")
    return [(name, event_id) for event_id in decode_batch(value).column("event_id").to_pylist()]


class DryRunProducer:
    """Gives every receipt at the next `poll`, as if Kafka had the record."""

    def __init__(self) -> None:
        self._receipts: list[Delivered] = []
        self.events: list[tuple[str, str]] = []
        """Types and ids of the events that were sent."""

    def send(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        delivered: Delivered | None = None,
    ) -> None:
        """Take a record and keep the types and ids of its events."""
        if value is not None and headers is not None and headers.get("kind") in (IMPRESSION, FEEDBACK):
            self.events += events_in(value, headers)
        if delivered is not None:
            self._receipts.append(delivered)

    def poll(self, timeout_s: float) -> None:
        """Give receipts."""
        receipts, self._receipts = self._receipts, []
        for delivered in receipts:
            delivered(None, 0)

    def flush(self, timeout_s: float) -> int:
        """Give receipts; none is left."""
        self.poll(timeout_s)
        return 0

    def close(self) -> None:
        """Hold nothing."""


class NoMetrics:
    """Counts and shows nothing."""

    def add(self, name: Name, amount: float = 1.0, **labels: str) -> None:
        """Count nothing."""

    def set(self, name: Name, value: float, **labels: str) -> None:
        """Show nothing."""

    def observe(self, name: Name, value: float) -> None:
        """Observe nothing."""
