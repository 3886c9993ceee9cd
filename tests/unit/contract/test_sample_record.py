"""Goal: whatever lies in `samples`, reading it says what it is and raises nothing.

Method: a record of ours, and the same with each bit, header or column wrong; a plain decoder judges what is left whole.
"""

from __future__ import annotations

from random import Random

import msgspec
import pyarrow as pa
import pytest
from trainer_world import PROJECT, samples

from headrace.contract.formats.events import encode_batch
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.sample import sample_schema
from headrace.contract.formats.samples_topic.sample_record import SampleRecord, Unreadable, read_samples
from headrace.contract.interfaces.log import Record

ROWS = samples(5, 0, 40)
SCHEMA = sample_schema(PROJECT)
HEADERS = {"after": "-1:-1", "last": "13:0", "spec": "x"}
WHOLE = Record("samples", 0, 7, None, encode_batch(ROWS), HEADERS, 0)


def kind_of(record: Record, schema: pa.Schema | None = SCHEMA) -> str:
    found = read_samples(record, schema)
    return found.kind if isinstance(found, Unreadable) else "ours"


def rows(batch: pa.RecordBatch) -> Record:
    return msgspec.structs.replace(WHOLE, value=encode_batch(batch))


@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_a_record_of_ours_is_read(schema: pa.Schema | None):
    assert read_samples(WHOLE, schema) == SampleRecord(START, Position(13, 0), ROWS)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"after": "-1:-1"},
        {"after": "x", "last": "13:0"},
        {"after": "1:2:3", "last": "13:0"},
        {"kind": "impression"},
    ],
)
@pytest.mark.parametrize("value", [b"hello", b"", None, WHOLE.value])
def test_without_our_headers_it_is_foreign(headers: dict[str, str], value: bytes | None):
    assert kind_of(msgspec.structs.replace(WHOLE, headers=headers, value=value)) == "foreign"


@pytest.mark.parametrize("value", [b"hello", b"", None, (WHOLE.value or b"")[:-30], (WHOLE.value or b"")[:300]])
def test_with_our_headers_it_is_damaged_and_says_what_was_promised(value: bytes | None):
    found = read_samples(msgspec.structs.replace(WHOLE, value=value), SCHEMA)
    assert isinstance(found, Unreadable)
    assert (found.kind, found.offset, found.after, found.last) == ("damaged", 7, START, Position(13, 0))
    assert "hello" not in found.detail


@pytest.mark.parametrize(
    "wrong",
    [
        ROWS.slice(0, 0),
        ROWS.slice(0, 39),
        ROWS.take(pa.array([1, 0, *range(2, 40)])),
        ROWS.drop_columns(["task"]),
        ROWS.drop_columns(["label"]),
        ROWS.set_column(0, "partition", pa.array([1] * 40, pa.int32())),
        ROWS.set_column(0, "partition", pa.array([0] * 40, pa.int64())),
        ROWS.set_column(3, "event_id", pa.array([None, *map(str, range(39))])),
    ],
)
def test_rows_that_are_not_what_the_headers_promise_are_damaged(wrong: pa.RecordBatch):
    assert kind_of(rows(wrong)) == "damaged"


def test_columns_of_other_rules_come_as_they_are():
    grown = ROWS.append_column("new", pa.array(range(40)))
    found = read_samples(rows(grown))
    assert isinstance(found, SampleRecord) and "new" in found.rows.schema.names
    assert read_samples(rows(grown), SCHEMA) == read_samples(WHOLE, SCHEMA)


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_never_raises(seed: int):
    rng, value = Random(seed), WHOLE.value or b""
    kinds = set()
    for at in range(seed, len(value), 3):
        flipped = bytearray(value)
        flipped[at] ^= 1 << rng.randrange(8)
        kinds.add(kind_of(msgspec.structs.replace(WHOLE, value=bytes(flipped)), (None, SCHEMA)[at % 2]))
    assert kinds <= {"ours", "damaged"} and "damaged" in kinds


def test_a_hole_is_what_the_next_record_begins_after():
    damaged = Unreadable("damaged", "", 7, Position(3, 0), Position(5, 1))
    assert damaged.is_hole(Position(3, 0), Position(5, 1)) and damaged.is_hole(Position(4, 0), Position(5, 1))
    assert not damaged.is_hole(Position(5, 1), Position(5, 1)), "they came in another record"
    assert not damaged.is_hole(Position(3, 0), Position(6, 0)), "more is missing: a gap like others"
    assert not damaged.is_hole(Position(2, 0), Position(5, 1))
    assert not Unreadable("foreign", "", 7).is_hole(START, START)
