"""Time that is never behind the log: a retry on a host whose clock is behind must not take old events for new ones.

The newest record of `events` has the broker's time, and gateways write one every second: it is that late at least. How
late it is beyond that, only the host's clock says.
"""

from __future__ import annotations

from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.log import Reader, read_range


class LogTime:
    """The clock, or the log's time at the last look and the time since, whichever is later."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._off_ms = float("-inf")

    def look(self, reader: Reader, topic: str) -> None:
        """Read when the newest record of each partition was written. Raises `Unavailable`."""
        begins = reader.begin_offsets(topic)
        for partition, end in reader.end_offsets(topic).items():
            first = {partition: max(begins[partition], end - 1)}
            for record in read_range(reader, topic, begins=first, ends={partition: end}):
                self._off_ms = max(self._off_ms, record.timestamp_ms - self._clock.monotonic() * 1000)

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return round(max(self._clock.now_ms(), self._clock.monotonic() * 1000 + self._off_ms))

    def monotonic(self) -> float:
        """Return the clock's."""
        return self._clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        self._clock.sleep(seconds)
