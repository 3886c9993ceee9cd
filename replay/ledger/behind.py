"""How far effects are behind the log, in the log's own time: no clock is read. Pure.

A sample is resolved by a record of `events`, and the partition's watermark after that record says when. What is not
stored, or not learnt, is as old as the newest watermark of any partition is past the least of these times.

Legend: N expected samples, in (partition, position) order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.formats.events import Punctuation
from headrace.stream.join.watermark import NO_TIME, Watermark

I64s = npt.NDArray[np.int64]


class Watermarks:
    """The watermark of every partition, from the log's beginning on."""

    def __init__(self, silent_ms: int) -> None:
        self._silent_ms = silent_ms
        self._watermarks: dict[int, Watermark] = {}
        self._moves: dict[int, list[tuple[int, int]]] = {}
        """By partition: offsets at which the watermark moved, and where to."""

    @property
    def newest_ms(self) -> int:
        """The furthest watermark of a partition; -1 before the first punctuation."""
        return max((watermark.time_ms for watermark in self._watermarks.values()), default=NO_TIME)

    def take(self, partition: int, offset: int, punctuation: Punctuation) -> None:
        """Apply one promise; of a partition in order."""
        watermark = self._watermarks.setdefault(partition, Watermark(self._silent_ms))
        before = watermark.time_ms
        if watermark.take(punctuation) > before:
            self._moves.setdefault(partition, []).append((offset, watermark.time_ms))

    def resolved(self, samples: pa.Table) -> I64s:
        """Return, of samples with KEYS and event time, when each was resolved: int64 [N].

        That is its impression's time where no punctuation came before.
        """
        resolved_N: I64s = samples["event_time_ms"].to_numpy().copy()
        partition_N, offset_N = samples["partition"].to_numpy(), samples["offset"].to_numpy()
        for partition, moves in self._moves.items():
            offsets, times = np.array(moves, np.int64).T
            rows = np.flatnonzero(partition_N == partition)
            move = np.searchsorted(offsets, offset_N[rows], "right") - 1
            resolved_N[rows] = np.where(move >= 0, times[np.maximum(move, 0)], resolved_N[rows])
        return resolved_N


def oldest(resolved_N: I64s, newest_ms: int, left_N: npt.NDArray[np.bool_]) -> int:
    """Return how old the oldest of the samples that `left_N` marks is; 0 where none is. Unit: ms."""
    return max(0, newest_ms - int(resolved_N[left_N].min())) if left_N.any() else 0
