"""TensorBoard's event file: scalars and histograms, one file a process, below the folder that `headrace tensorboard`
serves."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_BUCKETS = 40
AGAIN_MS = 30_000
"""After a failure, the time without figures."""

logger = logging.getLogger("headrace.train")


class Board:
    """Writes values by step. The writer's own thread flushes every few seconds.

    Where the disk takes none, they are left out until it does, and the log says so: learning goes on without them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._again_ms = 0

    def scalars(self, values: Mapping[str, float], *, step: int, now_ms: int) -> None:
        """Write those of `values` that are finite."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        kept = [Summary.Value(tag=n, simple_value=float(v)) for n, v in values.items() if math.isfinite(v)]
        self._write(kept, step, now_ms)

    def histogram(self, name: str, values: npt.NDArray[np.generic], *, step: int, now_ms: int) -> None:
        """Write the distribution of those of `values` that are finite, in 40 equal parts of their range."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        kept_N = np.asarray(values, np.float64).reshape(-1)
        kept_N = kept_N[np.isfinite(kept_N)]
        if not len(kept_N):
            return
        counts, edges = np.histogram(kept_N, bins=_BUCKETS)
        histogram = HistogramProto(
            min=float(kept_N.min()),
            max=float(kept_N.max()),
            num=len(kept_N),
            sum=float(kept_N.sum()),
            sum_squares=float(np.square(kept_N).sum()),
            # The format wants each bucket's upper edge; an empty bucket comes first and bounds the lowest from below.
            bucket_limit=edges.tolist(),
            bucket=[0.0, *counts.tolist()],
        )
        self._write([Summary.Value(tag=name, histo=histogram)], step, now_ms)

    def attempt(self, write: Callable[[], None], *, now_ms: int) -> None:
        """Write into the folder; where the disk does not take it, say so and leave all out for `AGAIN_MS`."""
        if now_ms < self._again_ms:
            return
        try:
            write()
        except OSError as error:
            logger.warning("no figures for TensorBoard for %d s: %s: %s", AGAIN_MS // 1_000, self.folder, error)
            self._writer, self._again_ms = None, now_ms + AGAIN_MS

    def close(self) -> None:
        """Flush and close."""
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()

    def _write(self, values: list[Any], step: int, now_ms: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        event = Event(wall_time=now_ms / 1000, step=step, summary=Summary(value=values))
        self.attempt(lambda: self._opened().add_event(event), now_ms=now_ms)

    def _opened(self) -> Any:
        """Return the writer; a new one, with a file of its own, after one that failed."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(self.folder), flush_secs=5)
        return self._writer
