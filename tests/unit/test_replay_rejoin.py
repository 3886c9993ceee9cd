"""The ledger's idea of what should be.

Goal: the events log of a small shop, repeats and early clicks included, gives the identities that the real join emits,
though the ledger's one has no features. Method: the same records through both.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from headrace.backends.lake_delta import DeltaLake
from headrace.backends.log_memory import MemoryAdmin, MemoryLog
from headrace.cli.stage_ledger import table, take_stock
from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken
from headrace.contract.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.log import Record
from headrace.contract.positions import Positions
from headrace.contract.sample import format_position
from headrace.contract.steps import Step, StepRange, encode_step
from headrace.contract.topics import Topics
from headrace.examples.shop import traffic
from headrace.examples.shop.shop import PROJECT
from headrace.replay.ledger import KEYS
from headrace.replay.rejoin import rejoin
from headrace.replay.scan import in_order
from headrace.stream.join import JoinState

START_MS = 1_800_000_000_000
WINDOW_MS = PROJECT.tasks[0].window_ms


def log(rows: int = 400, per_record: int = 20) -> list[Record]:
    """Two partitions; each record repeats the last impression of the one before; clicks one record later."""
    records: list[Record] = []
    offsets = [0, 0]
    visits = list(traffic.synthetic(PROJECT.impression.fields, rows=rows).visits())

    def append(partition: int, value: bytes, at_ms: int, **headers: str) -> None:
        records.append(Record("events", partition, offsets[partition], None, value, headers, at_ms))
        offsets[partition] += 1

    for at in range(0, rows, per_record):
        partition, now_ms = at // per_record % 2, START_MS + 10 * at
        chosen = visits[max(0, at - 1) : at + per_record]
        shown = [
            {
                **visit.fields,
                "event_id": f"e{visit.row}",
                "request_id": f"e{visit.row}",
                "place": 0,
                "key": "k",
                "event_time_ms": START_MS + 10 * visit.row,
            }
            for visit in chosen
            if visit.row // per_record % 2 == partition
        ] * 2
        append(partition, encode_batch(batch_from_rows(shown, impression_schema(PROJECT))), now_ms, kind="impression")
        clicks = [
            {"event_id": f"c{v.row}", "request_id": f"e{v.row}", "place": 0, "key": "k", "event_time_ms": now_ms + 300}
            for v in visits[at : at + per_record]
            if v.clicked
        ]
        schema = feedback_schema(PROJECT, PROJECT.feedback[0])
        append(partition, encode_batch(batch_from_rows(clicks, schema)), now_ms, kind="feedback", type="click")
        promise = Punctuation("g", 1, now_ms, counts={"read": 1})
        append(partition, encode_punctuation(promise), now_ms, kind="punctuation")
    return records


def test_identities_are_those_of_the_real_join():
    records = log()
    expected, said = rejoin(PROJECT, Config(), records)
    states = [JoinState(PROJECT, Config().join, silent_ms=10_000, partition=p) for p in range(2)]
    emitted = [e for record in records if (e := states[record.partition].take(record)) is not None]
    real = pa.concat_tables([pa.Table.from_batches([e.batch.select(KEYS.names)]).cast(KEYS) for e in emitted])
    assert expected.samples.equals(in_order(real).combine_chunks())
    task = expected.tasks["click"]
    assert task.closes() and task.positives > 50 and task.negatives > 50 and task.waiting > 0
    assert expected.impressions == 400 and expected.repeated_in_log == 400
    assert sum(expected.rows.values()) == expected.impressions + expected.feedback + expected.repeated_in_log
    assert said and max(p.time_ms for p in said) <= START_MS + 10 * 380 - 1_000


def test_a_log_whose_beginning_is_gone_is_refused():
    first = msgspec.structs.replace(log(40)[0], offset=7)
    with pytest.raises(InvariantBroken, match="begins at offset 7"):
        rejoin(PROJECT, Config(), [first])


def test_stock_of_a_whole_loop_closes_and_a_row_taken_twice_does_not(tmp_path: Path):
    topics, memory, lake = Topics(), MemoryLog(), DeltaLake(str(tmp_path / "lake"))
    MemoryAdmin(memory).ensure_topics(topics.specs(2))
    states = [JoinState(PROJECT, Config().join, silent_ms=10_000, partition=p) for p in range(2)]
    batches, positions, ranges = [], {}, []
    for record in log():
        memory.append(topics.events, record.partition, record.value, None, record.headers)
        emitted = states[record.partition].take(record)
        if emitted is None:
            continue
        batches.append(emitted.batch)
        headers = {"after": format_position(emitted.after), "last": format_position(emitted.last)}
        memory.append(topics.samples, record.partition, encode_batch(emitted.batch), None, headers)
        positions[record.partition] = emitted.last
        rows = emitted.batch.num_rows
        ranges.append(StepRange("live", 0, record.partition, emitted.after, emitted.last, rows=rows))
    version = lake.append(batches, {0: 1, 1: 1}, positions)
    known = Positions(1, positions).to_json()
    made = Step(model="shop", run="r", step=1, ranges=tuple(ranges), positions=known)
    memory.append(topics.steps, 0, encode_step(made), None, {})
    ledger = take_stock(PROJECT, Config(), topics, memory.reader(), lake)
    assert ledger.closes, ledger
    assert ledger.stored == ledger.samples == ledger.learnt > 250
    again = Step(
        model="shop", run="r", step=2, positions=known, ranges=(StepRange("stored", version=version, stop=3, rows=3),)
    )
    memory.append(topics.steps, 0, encode_step(again), None, {})
    ledger = take_stock(PROJECT, Config(), topics, memory.reader(), lake)
    assert (ledger.twice_where["model"], ledger.closes) == (3, False)
    assert "twice in model: 3" in table(ledger)
