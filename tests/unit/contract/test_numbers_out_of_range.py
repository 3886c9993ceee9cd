"""Goal: an epoch or a time beyond every one of ours is damage: taken, it would put all later ones behind it for ever.

Method: one record with such a number, then one of ours, in the join and in serving's memory.
"""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pytest

from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import AGGREGATE_SCHEMA, EPOCH_MAX, EXTERNAL_SCHEMA, ExternalValue
from headrace.contract.interfaces.log import Record
from headrace.serving.features import FeatureMemory
from headrace.stream.join.record_columns import checked

BEYOND = [EPOCH_MAX, 10**18 * 9, (1 << 63) - 1, -(1 << 63)]
AGGREGATE = {"counter": "c", "key": "k", "as_of_ms": 5, "epoch": 1, "counts": [1.0]}
EXTERNAL = {"source": "s", "key": "k", "crawl_time_ms": 5, "epoch": 1, "version": "v"}


@pytest.mark.parametrize("number", BEYOND)
@pytest.mark.parametrize(
    ("row", "schema", "names"),
    [(AGGREGATE, AGGREGATE_SCHEMA, ("as_of_ms", "epoch")), (EXTERNAL, EXTERNAL_SCHEMA, ("crawl_time_ms", "epoch"))],
)
def test_the_join_takes_no_such_batch(
    row: dict[str, object], schema: pa.Schema, names: tuple[str, ...], number: int
) -> None:
    for most in (EPOCH_MAX - 1, 1 - EPOCH_MAX):
        rows = [row, {**row, **dict.fromkeys(names, most)}]
        assert checked(pa.RecordBatch.from_pylist(rows, schema=schema)).num_rows == 2
    for name in names:
        batch = pa.RecordBatch.from_pylist([row, {**row, name: number}], schema=schema)
        with pytest.raises(EventRejected, match=f"'{name}' has a number of more than 62 bits"):
            checked(batch)


@pytest.mark.parametrize("number", [*BEYOND, 10**40])
@pytest.mark.parametrize("name", ["as_of_ms", "epoch"])
def test_servings_memory_takes_no_such_counter(name: str, number: int) -> None:
    def record(value: bytes | None, **said: int) -> Record:
        return Record("features", 0, 0, b"c/k", value, {n: str(v) for n, v in said.items()}, 0)

    memory, said = FeatureMemory(()), {"as_of_ms": 5, "epoch": 1}
    with pytest.raises(msgspec.DecodeError):
        memory.take(record(msgspec.json.encode({**said, name: number, "buckets": {"0": [1]}})))
    memory.take(record(msgspec.json.encode({**said, "buckets": {"0": [1]}})))
    assert memory.watermark_ms == 5 and "c/k" in memory._table
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(b'{"crawl_time_ms": 5, "epoch": %d, "values": {}}' % number, type=ExternalValue)
