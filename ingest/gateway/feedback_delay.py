"""How long feedback takes from the moment it happened to the gateway. Pure.

A shipper that holds feedback back beyond the window turns every sample into a negative, and the ledger closes all the
same, because late feedback is counted. The median of this delay tells it before the first window has ended.
"""

from __future__ import annotations

import numpy as np

from headrace.kernels.arrays import I64s

_KEPT = 1_024
"""Some seconds of a busy service, some minutes of a quiet one."""


class FeedbackDelay:
    """The newest delays of each type of feedback."""

    def __init__(self) -> None:
        self._kept: dict[str, I64s] = {}

    def note(self, name: str, times_N: I64s, now_ms: int) -> float:
        """Take events that arrive now, int64 [N] of event times in ms, N > 0; return the median delay in seconds.

        An event that is dated ahead of the gateway counts as 0.
        """
        delays = np.maximum(now_ms - times_N[-_KEPT:], 0)
        kept = np.concatenate([self._kept.get(name, delays[:0]), delays])[-_KEPT:]
        self._kept[name] = kept
        return float(np.median(kept)) / 1_000
