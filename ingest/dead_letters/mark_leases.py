"""How long the mark of another run is waited for: by this process's monotonic clock, never by the mark's time. Pure.

The clock of whoever wrote a mark may be a day ahead or behind. So a mark is of the moment at which this process saw it
first, and its run is taken for dead one lease later, if no newer mark has come. A mark that lies before one that was
seen was there then.
"""

from __future__ import annotations

LEASE_MS = 30_000
"""How long a batch may take before another retry takes its holder for dead. A batch takes well under a second."""
_SEEN_MAX = 16


class MarkLeases:
    """When this process first saw each of the newest marks."""

    def __init__(self, lease_ms: int = LEASE_MS) -> None:
        self.lease_ms = lease_ms
        self._seen_s: dict[int, float] = {}
        """By offset of the mark, rising."""

    def left_s(self, offset: int, monotonic_s: float) -> float:
        """Return how long the mark at `offset` of the retries is still to be waited for; 0 where it is over.

        >>> leases = MarkLeases(30_000)
        >>> leases.left_s(7, 100.0), leases.left_s(7, 110.0), leases.left_s(6, 120.0), leases.left_s(8, 140.0)
        (30.0, 20.0, 10.0, 30.0)
        """
        seen_s = min((at_s for other, at_s in self._seen_s.items() if other >= offset), default=None)
        if seen_s is None:
            seen_s = self._seen_s[offset] = monotonic_s
            if len(self._seen_s) > _SEEN_MAX:
                del self._seen_s[next(iter(self._seen_s))]
        return max(0.0, seen_s + self.lease_ms / 1000 - monotonic_s)
