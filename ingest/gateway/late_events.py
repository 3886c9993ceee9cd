"""Events that are older than the stream's memory of repeats: new or not, nobody can say without looking them up.

The stream remembers the ids that it read within `join.repeat_horizon_ms` of watermark time, and no watermark is ahead
of the broker's time. So an event whose time is less than the horizon ago, but for a margin, is either in that memory or
new. What is older becomes a dead letter `too_late`, and `headrace.ingest.dead_letters.settler` looks it up.

The margin is for what lies between an event's time and the watermark at which it was read: a clock ahead
(`ingest.skew_ms`), a watermark behind, and the time that a record is on its way (a producer gives up after 5 minutes).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.contract.project import EXTRA
from headrace.ingest.decode.fluent_chunk import Layout, decode
from headrace.ingest.decode.message import read_entry
from headrace.ingest.decode.msgpack_scan import I64s, U8s, as_bytes
from headrace.ingest.decode.validate import event_time_ms

_SLICE_ROWS = 20_000
_ALL_TIMES = range(1 << 62)
MARGIN_MAX_MS = 600_000
WAITING_MAX = 200_000
"""Most letters that wait to be looked up; beyond it late events stay with their senders. The settler keeps 100 bytes of
each in memory: 20 MB."""


class LateEvents:
    """What of one process's events is too late, and how much of that waits. Its gateway and its settler share one."""

    def __init__(self, memory_ms: int, waiting_max: int = WAITING_MAX) -> None:
        """Take what is older than the memory of `memory_ms` for too late."""
        self._memory_ms, self._margin_ms = memory_ms, min(MARGIN_MAX_MS, memory_ms // 4)
        self._waiting_max = waiting_max
        self.written = 0
        """Letters that this process has written."""
        self._waiting = self._counted = 0

    def before_ms(self, now_ms: int) -> int:
        """Return the event time before which an event that comes now is too late."""
        return now_ms - self._memory_ms + self._margin_ms

    def held_before_ms(self, now_ms: int) -> int:
        """Return the same for an event that was in time when it came and has not been sent since."""
        return now_ms - self._memory_ms + self._margin_ms // 2

    def holds_late(self, made: Layout, body: bytes, starts_N: I64s, now_ms: int) -> bool:
        """Say whether any of a message's entries, of the type `made`, is an event that is too late."""
        before_ms, data = self.before_ms(now_ms), as_bytes(body)
        for at in range(0, len(starts_N), _SLICE_ROWS):
            part_N = starts_N[at : at + _SLICE_ROWS]
            zeros_N = np.zeros(len(part_N), np.int64)
            decoded = decode(made, data, part_N, [""], zeros_N, zeros_N, _ALL_TIMES)
            late_N = decoded.batch["event_time_ms"].to_numpy() < before_ms
            late_N[decoded.left] = False
            if late_N.any() or any(self._is_late(data, int(part_N[row]), before_ms) for row in decoded.left):
                return True
        return False

    @staticmethod
    def _is_late(data: U8s, start: int, before_ms: int) -> bool:
        entry = read_entry(data, start)
        own = entry.record.get("event_time_ms") if isinstance(entry.record, dict) else None
        time_ms = event_time_ms(own, entry.time_ns)
        return time_ms is not None and time_ms < before_ms

    def wait(self, waiting: int, counted: int) -> None:
        """Note that `waiting` letters wait, of all processes; `counted` of those written here are among them."""
        self._waiting, self._counted = waiting, counted

    def is_full(self) -> bool:
        """Say whether no more late events should be taken."""
        return self._waiting + self.written - self._counted >= self._waiting_max


def record_of_row(batch: pa.RecordBatch, row: int, *, keeps_unknown: bool) -> dict[str, Any]:
    """Return a record that is decoded to this row of a batch again."""
    values: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
    unknown = values.pop(EXTRA, None) if keeps_unknown else None
    del values["key"]
    record = {name: value for name, value in values.items() if value is not None}
    return record | json.loads(unknown) if unknown else record
