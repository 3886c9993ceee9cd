"""The watermark of one partition: up to when all events are there. Pure; only punctuation moves it.

Each gateway promises now and then: "I will append nothing older than t here". The watermark is the least promise. It
leaves out gateways that said goodbye, those whose promise stood still while another's went on by `silent_ms`, and
those that speak of times more than `silent_ms` before the watermark. It never goes back.

No promise reaches beyond the time that the broker wrote on its record: a gateway whose clock is ahead runs nothing
ahead. Punctuation of release 0.1 does not say `by_record` and is taken as it is, so that old logs give what they gave.

How far another went on is the sum of its steps since the gateway's last one, each counted as a quarter of `silent_ms`
at most, and not the difference of their times: two clocks that differ by more than `silent_ms` both count, and after an
outage of a day the first gateway that is back does not take the others, which are seconds behind it, for silent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.contract.formats.events import Punctuation

NO_TIME = -1
"""Before the first punctuation."""


class Watermark:
    """What the punctuation of a partition says so far; bounded by the number of live gateways, squared."""

    def __init__(self, silent_ms: int) -> None:
        self.silent_ms = silent_ms
        self.time_ms = NO_TIME
        self.gateways: dict[str, tuple[int, int]] = {}
        """Gateway to (epoch, promise)."""
        self._passed_by: dict[str, dict[str, int]] = {}
        """Gateway to speaker to how far the speaker went on since the gateway's own last step."""

    def take(self, punctuation: Punctuation, record_ms: int = 0) -> int:
        """Apply one promise, whose record has the time `record_ms` (0: it has none), and return the watermark.

        A promise of an older epoch is ignored: the gateway has restarted since. A newer epoch replaces what the
        gateway said before. A goodbye counts once more, as the gateway's last promise; then the gateway is left out.
        """
        speaker = punctuation.gateway
        epoch, before = self.gateways.get(speaker, (punctuation.epoch, NO_TIME))
        if punctuation.epoch < epoch:
            return self.time_ms
        if punctuation.epoch > epoch:
            before = NO_TIME
        said = punctuation.time_ms
        if punctuation.by_record and record_ms > 0:
            said = min(said, record_ms)
        promise = max(before, said)
        if before == NO_TIME and promise < self.time_ms - self.silent_ms:
            # It comes, or comes back, with times that are long past. The watermark never waits for such a gateway.
            self._leave_out(speaker)
            return self.time_ms
        self.gateways[speaker] = (punctuation.epoch, promise)
        if promise > before:
            self._passed_by[speaker] = {}
        step_ms = 0 if before == NO_TIME else min(promise - before, self.silent_ms // 4)
        for other in [g for g in self.gateways if g != speaker and step_ms]:
            steps = self._passed_by.setdefault(other, {})
            steps[speaker] = steps.get(speaker, 0) + step_ms
            if steps[speaker] > self.silent_ms:
                self._leave_out(other)
        self.time_ms = max(self.time_ms, min(p for _, p in self.gateways.values()))
        if punctuation.bye:
            self._leave_out(speaker)
        return self.time_ms

    def _leave_out(self, gateway: str) -> None:
        self.gateways.pop(gateway, None)
        self._passed_by.pop(gateway, None)
        for steps in self._passed_by.values():
            steps.pop(gateway, None)

    def to_plain(self) -> list[Any]:
        """Return the state as lists, numbers and texts."""
        passed_by = [[g, sorted(steps.items())] for g, steps in sorted(self._passed_by.items())]
        return [self.time_ms, [[g, e, p] for g, (e, p) in sorted(self.gateways.items())], passed_by]

    def load_plain(self, plain: Sequence[Any]) -> None:
        """Take over what `to_plain` gave; a state written before the third part was kept begins without it."""
        self.time_ms = plain[0]
        self.gateways = {g: (e, p) for g, e, p in plain[1]}
        self._passed_by = {g: dict(steps) for g, steps in plain[2]} if len(plain) > 2 else {}
