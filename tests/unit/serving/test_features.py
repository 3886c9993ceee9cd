"""Goal: serving's memory knows when it has read all counters that there were, and never by silence.
Method: the log in memory, with a marker behind the last record, and a reader that is slow to give it."""

from __future__ import annotations

import threading

from headrace.backends.log.memory import MemoryLog, MemoryReader
from headrace.contract.interfaces.log import TopicSpec
from headrace.serving.features import FeatureMemory


class Slow(MemoryReader):
    """Gives nothing in the first polls; ends the loop after the last of `polls`."""

    def __init__(self, log: MemoryLog, memory: FeatureMemory, stop: threading.Event, polls: int) -> None:
        super().__init__(log)
        self.memory, self.stop, self.left = memory, stop, polls
        self.seen: list[bool] = []

    def poll(self, records_max: int, timeout_s: float):
        self.seen.append(self.memory.is_caught_up)
        self.left -= 1
        if self.left == 0:
            self.stop.set()
        return super().poll(records_max, 0.0) if self.left < 3 else []


def test_silence_is_not_the_end_and_a_marker_is_no_record_to_wait_for():
    log = MemoryLog(lambda: 0)
    log.admin().ensure_topics([TopicSpec("features", 1)])
    log.append("features", 0, b'{"as_of_ms": 7, "epoch": 1, "buckets": {}}', b"clicks/1", {})
    log.mark("features", 0)
    memory, stop = FeatureMemory(), threading.Event()
    reader = Slow(log, memory, stop, polls=6)
    memory.follow(reader, "features", stop)
    assert reader.seen == [False, False, False, False, True, True]
    assert memory.watermark_ms == 7
