"""Reading topics for the ledger.

Goal: the samples topic is read by the reader's rule (repeats dropped, out-of-turn records held), and a topic is read
to where it ended. Method: the log in memory.
"""

from __future__ import annotations

import pyarrow as pa

from headrace.backends.log.memory import MemoryAdmin, MemoryLog
from headrace.contract.formats.events import encode_batch
from headrace.contract.interfaces.log import Record, TopicSpec
from headrace.replay.ledger.ledger import KEYS
from headrace.replay.ledger.scan import read_all, sample_keys


def record(at: int, after: str, offsets: list[tuple[int, int]]) -> Record:
    rows = [{"partition": 0, "offset": o, "rank": r, "event_id": f"{o}.{r}", "task": "click"} for o, r in offsets]
    headers = {"after": after, "last": "{}:{}".format(*offsets[-1])}
    return Record("samples", 0, at, None, encode_batch(pa.RecordBatch.from_pylist(rows, schema=KEYS)), headers, 0)


def test_repeats_are_dropped_and_out_of_turn_records_wait():
    records = [
        record(0, "-1:-1", [(2, 0), (2, 1)]),
        record(1, "4:0", [(6, 0)]),
        record(2, "-1:-1", [(2, 0), (2, 1), (3, 0)]),
        record(3, "3:0", [(4, 0)]),
        record(4, "3:0", [(4, 0), (6, 0)]),
        record(5, "6:0", [(7, 0)]),
    ]
    keys = sample_keys(records)
    assert keys["event_id"].to_pylist() == ["2.0", "2.1", "3.0", "4.0", "6.0", "7.0"]


def test_no_samples_are_an_empty_table():
    assert sample_keys([]).equals(KEYS.empty_table())


def test_a_topic_is_read_to_where_it_ended_when_asked():
    log = MemoryLog()
    MemoryAdmin(log).ensure_topics([TopicSpec("t", 3)])
    for n in range(30):
        log.append("t", n % 2, b"%d" % n, None, {})
    reader = log.reader()
    ends = reader.end_offsets("t")
    log.append("t", 0, b"later", None, {})
    values = [record.value for record in read_all(reader, "t", ends)]
    assert sorted(values) == sorted(b"%d" % n for n in range(30))


def test_markers_at_the_end_of_a_transactional_topic_end_the_reading():
    log = MemoryLog()
    MemoryAdmin(log).ensure_topics([TopicSpec("t", 1)])
    log.append("t", 0, b"one", None, {})
    assert [r.value for r in read_all(log.reader(), "t", {0: 2}, marked=True)] == [b"one"]
