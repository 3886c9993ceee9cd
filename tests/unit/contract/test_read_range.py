"""Goal: a range of a topic ends at its end offsets, and nowhere else.
Method: the log in memory; `tests/backends/test_local_log.py` does the same on Kafka, with real transactions."""

from __future__ import annotations

import pytest

from headrace.backends.log.memory import MemoryLog, MemoryReader
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.interfaces.log import TopicSpec, read_range


def log_of(partitions: int, records: int) -> MemoryLog:
    """Return a log whose topic `t` holds `records` records, numbered in their order over all partitions."""
    log = MemoryLog(lambda: 0)
    log.admin().ensure_topics([TopicSpec("t", partitions)])
    for n in range(records):
        log.append("t", n % partitions, b"%d" % n, None, {})
    return log


def test_a_topic_is_read_to_where_it_ended_when_asked():
    log = log_of(3, 30)
    reader = log.reader()
    ends = reader.end_offsets("t")
    log.append("t", 0, b"later", None, {})
    values = [record.value for record in read_range(reader, "t", ends=ends)]
    assert sorted(values) == sorted(b"%d" % n for n in range(30))


def test_only_the_partitions_that_have_an_end_are_read():
    values = [record.value for record in read_range(log_of(3, 30).reader(), "t", begins={1: 8}, ends={1: 10})]
    assert values == [b"25", b"28"]


def test_markers_between_and_behind_records_are_passed():
    log = log_of(1, 1)
    log.mark("t", 0)
    log.append("t", 0, b"1", None, {})
    log.mark("t", 0)
    assert [r.value for r in read_range(log.reader(), "t", ends={0: 4})] == [b"0", b"1"]


def test_a_partition_ends_before_what_is_too_late():
    log = log_of(2, 4)
    log.now_ms = lambda: 50
    for n in range(4, 8):
        log.append("t", n % 2, b"%d" % n, None, {})
    values = [record.value for record in read_range(log.reader(), "t", latest_ms=49)]
    assert sorted(values) == [b"0", b"1", b"2", b"3"]


class Talking(MemoryReader):
    """Partition 0 gets a record before every poll."""

    def poll(self, records_max: int, timeout_s: float):
        self._log.append("t", 0, b"more", None, {})
        return super().poll(records_max, min(timeout_s, 0.01))


def test_traffic_in_one_partition_does_not_hide_that_another_stands_still():
    with pytest.raises(Unavailable, match=r"t: nothing came for 1 s .* partition 1 at offset 5 of 6"):
        list(read_range(Talking(log_of(2, 10)), "t", ends={0: 5, 1: 6}, silent_s=1.0))


def test_a_first_offset_that_retention_took_stops_the_reading():
    log = log_of(1, 5)
    log.trim("t", 0, 3)
    assert [r.offset for r in read_range(log.reader(), "t")] == [3, 4]
    with pytest.raises(InvariantBroken, match="offset 2 is wanted"):
        list(read_range(log.reader(), "t", begins={0: 2}))
