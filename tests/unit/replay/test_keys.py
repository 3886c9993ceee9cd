"""Sample keys.

Goal: the samples topic is read by the reader's rule: repeats are dropped, out-of-turn records held.
Method: records by hand.
"""

from __future__ import annotations

import pyarrow as pa

from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import Position
from headrace.contract.interfaces.log import Record
from headrace.replay.ledger.keys import KEYS, sample_keys


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
    keys, begins = sample_keys(records)
    assert begins == {}
    assert keys["event_id"].to_pylist() == ["2.0", "2.1", "3.0", "4.0", "6.0", "7.0"]


def test_no_samples_are_an_empty_table():
    assert sample_keys([]) == (KEYS.empty_table(), {})


def test_a_topic_whose_beginning_is_gone_is_read_from_where_it_begins():
    records = [record(7, "4:0", [(6, 0)]), record(8, "4:0", [(6, 0), (7, 0)]), record(9, "8:0", [(9, 0)])]
    keys, begins = sample_keys(records)
    assert keys["event_id"].to_pylist() == ["6.0", "7.0"] and begins == {0: Position(4, 0)}


def test_what_is_foreign_is_left_out_and_hides_no_beginning():
    foreign = Record("samples", 0, 0, None, b"hello", {}, 0)
    keys, begins = sample_keys([foreign, record(1, "4:0", [(6, 0)])])
    assert (keys.num_rows, begins) == (0, {}), "the samples up to 4:0 are missing"
