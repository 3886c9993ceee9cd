"""The gateway's time: that of its wall clock, as long as the broker agrees; a clock that steps moves nothing. Pure.

1. Before the broker has written the time on a record of this gateway, time is the wall clock's at the start, and goes
   on with the monotonic clock.
2. From then on the broker's time, at the newest receipt and with the monotonic clock since, is compared with the wall
   clock's. Within `SPREAD_MS` they agree, and the wall clock's counts.
3. Where they disagree, one of them is wrong. Time goes on from where they agreed last, with the monotonic clock; where
   they never did, it is the broker's, which all gateways share.

So a wall clock that is a day ahead or an hour behind, for a moment, for ever or from the start, changes nothing, and
neither does a broker's clock that steps while the gateway runs.
"""

from __future__ import annotations

SPREAD_MS = 30_000
"""Far more than two clocks differ that are kept by NTP, with a receipt's way between them."""


class SteadyTime:
    """Unix time in milliseconds; wall and monotonic time come in as numbers."""

    def __init__(self) -> None:
        self._broker_ms = 0
        self._broker_off: float | None = None
        """What is added to monotonic milliseconds to have the broker's time; likewise `_off` for this time."""
        self._off: float | None = None
        self._agreed = False
        self.apart_ms = 0
        """How far the wall clock is ahead of the broker's at the last look."""

    def heard(self, broker_ms: int, monotonic_s: float) -> None:
        """Take the broker's time at the newest receipt; 0 before the first one, and the same again is no news."""
        if broker_ms > 0 and broker_ms != self._broker_ms:
            self._broker_ms, self._broker_off = broker_ms, broker_ms - monotonic_s * 1000

    def now_ms(self, wall_ms: int, monotonic_s: float) -> int:
        """Return the time."""
        wall_off = wall_ms - monotonic_s * 1000
        if self._off is None:
            self._off = wall_off
        if self._broker_off is not None:
            self.apart_ms = round(wall_off - self._broker_off)
            if abs(self.apart_ms) <= SPREAD_MS:
                self._off, self._agreed = wall_off, True
            elif not self._agreed:
                self._off = self._broker_off
        return round(monotonic_s * 1000 + self._off)
