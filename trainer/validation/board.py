"""TensorBoard's event file: scalars and histograms, one file a process, below the folder that `headrace tensorboard`
serves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_BUCKETS = 40


class Board:
    """Writes values by step. The writer's own thread flushes every few seconds."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._writer: Any = EventFileWriter(str(folder), flush_secs=5)

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

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _write(self, values: list[Any], step: int, now_ms: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=now_ms / 1000, step=step, summary=Summary(value=values)))
