"""TensorBoard scalars, one event file a process, below the folder that `headrace tensorboard` serves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """Writes scalars by step. The writer's own thread flushes every few seconds."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = EventFileWriter(str(folder), flush_secs=5)

    def scalars(self, values: Mapping[str, float], *, step: int, now_ms: int) -> None:
        """Write the finite ones of `values`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        kept = [Summary.Value(tag=n, simple_value=float(v)) for n, v in values.items() if math.isfinite(v)]
        self._writer.add_event(Event(wall_time=now_ms / 1000, step=step, summary=Summary(value=kept)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
