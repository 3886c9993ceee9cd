"""The watermark of one partition: up to when all events are there. Pure; only punctuation moves it.

Each gateway promises now and then "I will append nothing older than t here". The watermark is the least promise,
leaving out gateways that said goodbye or whose promise lies `silent_ms` behind the newest one. It never goes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.contract.events import Punctuation

NO_TIME = -1
"""Before the first punctuation."""


class Watermark:
    """What the punctuation of a partition says so far; bounded by the number of live gateways."""

    def __init__(self, silent_ms: int) -> None:
        self.silent_ms = silent_ms
        self.time_ms = NO_TIME
        self.gateways: dict[str, tuple[int, int]] = {}
        """Gateway to (epoch, promise)."""

    def take(self, punctuation: Punctuation) -> int:
        """Apply one promise and return the watermark.

        A promise of an older epoch is a ghost's and ignored; a newer epoch replaces the gateway's former self. A
        goodbye counts once more, as the gateway's last promise, and is then left out.
        """
        epoch, promise = self.gateways.get(punctuation.gateway, (punctuation.epoch, NO_TIME))
        if punctuation.epoch < epoch:
            return self.time_ms
        if punctuation.epoch > epoch:
            promise = NO_TIME
        promise = max(promise, punctuation.time_ms)
        self.gateways[punctuation.gateway] = (punctuation.epoch, promise)
        newest = max(p for _, p in self.gateways.values())
        self.gateways = {g: (e, p) for g, (e, p) in self.gateways.items() if p >= newest - self.silent_ms}
        self.time_ms = max(self.time_ms, min(p for _, p in self.gateways.values()))
        if punctuation.bye:
            self.gateways.pop(punctuation.gateway, None)
        return self.time_ms

    def to_plain(self) -> list[Any]:
        """Return the state as lists, numbers and texts."""
        return [self.time_ms, [[g, e, p] for g, (e, p) in sorted(self.gateways.items())]]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave."""
        self.time_ms = plain[0]
        self.gateways = {g: (e, p) for g, e, p in plain[1]}
