"""The ledger's idea of what should be.

Goal: the events log of a small shop, repeats and early clicks included, gives the identities that the real join emits,
though the ledger's one has no features. Method: the same records through both.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.upkeep import Done, Upkeep
from headrace.backends.log.memory import MemoryAdmin, MemoryLog
from headrace.contract.config import Config, LakeConfig
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.events import (
    Punctuation,
    batch_from_rows,
    encode_batch,
    encode_punctuation,
    feedback_schema,
    impression_schema,
)
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.sample import format_position
from headrace.contract.formats.steps import Step, StepRange, encode_step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Record
from headrace.examples.shop import traffic
from headrace.examples.shop.shop import PROJECT
from headrace.replay.ledger.keys import JOINED, in_order
from headrace.replay.ledger.ledger import table
from headrace.replay.ledger.rejoin import rejoin
from headrace.replay.ledger.take_stock import take_stock
from headrace.stream.join.join import Emitted, JoinState

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
    real = pa.concat_tables([pa.Table.from_batches([e.batch.select(JOINED.names)]) for e in emitted])
    assert expected.samples.equals(in_order(real.cast(JOINED)).combine_chunks())
    task = expected.tasks["click"]
    assert task.closes() and task.positives > 50 and task.negatives > 50 and task.waiting > 0
    assert expected.impressions == 400 and expected.repeated_in_log == 400
    assert sum(expected.rows.values()) == expected.impressions + expected.feedback + expected.repeated_in_log
    assert said and max(p.time_ms for p in said) <= START_MS + 10 * 380 - 1_000


def test_a_sample_is_as_old_as_the_watermark_that_resolved_it():
    """Each record's own watermark, though the ledger joins many records at once."""
    records = log()
    expected, _ = rejoin(PROJECT, Config(), records)
    states = [JoinState(PROJECT, Config().join, silent_ms=10_000, partition=p) for p in range(2)]
    resolved: dict[tuple[int, int, int], int] = {}
    for record in records:
        state = states[record.partition]
        emitted = state.take(record)
        for row in emitted.batch.to_pylist() if emitted is not None else ():
            at_ms = state.watermark.time_ms
            place = (row["partition"], row["offset"], row["rank"])
            resolved[place] = at_ms if at_ms >= 0 else row["event_time_ms"]
    keys = expected.samples.select(["partition", "offset", "rank"]).to_pylist()
    assert expected.resolved_ms_N.tolist() == [resolved[tuple(key.values())] for key in keys]
    assert expected.newest_ms == max(state.watermark.time_ms for state in states) == START_MS + 10 * 380
    assert len(set(resolved.values())) > 10


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


def test_a_log_past_its_retention_is_drawn_from_what_is_kept(tmp_path: Path):
    """Topic, lake and steps are held against each other; what came before the samples is named."""
    topics, memory, lake = Topics(), MemoryLog(), DeltaLake(str(tmp_path / "lake"))
    MemoryAdmin(memory).ensure_topics(topics.specs(2))
    states = [JoinState(PROJECT, Config().join, silent_ms=10_000, partition=p) for p in range(2)]
    batches, positions, ranges = [], {}, []
    for record in log():
        memory.append(topics.events, record.partition, record.value, None, record.headers)
        if (emitted := states[record.partition].take(record)) is None:
            continue
        batches.append(emitted.batch)
        headers = {"after": format_position(emitted.after), "last": format_position(emitted.last)}
        memory.append(topics.samples, record.partition, encode_batch(emitted.batch), None, headers)
        positions[record.partition] = emitted.last
        rows = emitted.batch.num_rows
        ranges.append(StepRange("live", 0, record.partition, emitted.after, emitted.last, rows=rows))
    known = Positions(1, positions).to_json()
    made = Step(model="shop", run="r", step=1, ranges=tuple(ranges), positions=known)
    memory.append(topics.steps, 0, encode_step(made), None, {})
    lake.append([batches[0].slice(1), *batches[1:]], {0: 1, 1: 1}, positions)  # one row is really lost
    memory.trim(topics.events, 0, 7)
    ledger = take_stock(PROJECT, Config(), topics, memory.reader(), lake)
    assert (ledger.events_begin, ledger.read, ledger.tasks) == ({"0": 7}, 0, {})
    assert (ledger.lost_where["lake"], ledger.lost, ledger.twice, ledger.closes) == (1, 1, 0, False)
    assert ledger.samples == ledger.learnt == ledger.stored + 1 > 250
    assert ledger.behind_ms == {"lake": 0, "model": 0}
    assert "events begins in partition 0 at offset 7" in table(ledger)


HOUR_MS = 3_600_000


def test_what_retention_dropped_is_not_lost_and_a_lost_row_still_is(tmp_path: Path):
    """A run learns a version of the lake, then live; retention drops the first hour, and the version is no more."""
    topics, memory = Topics(), MemoryLog()
    MemoryAdmin(memory).ensure_topics(topics.specs(1))
    config = LakeConfig(retention_ms=HOUR_MS, vacuum_ms=1_000)
    lake = DeltaLake(str(tmp_path / "lake"), partitions=1, config=config)
    state = JoinState(PROJECT, Config().join, silent_ms=10_000, partition=0)
    emitted: list[Emitted] = []
    for record in hourly():
        memory.append(topics.events, 0, record.value, None, record.headers)
        if (each := state.take(record)) is not None:
            emitted.append(each)
            headers = {"after": format_position(each.after), "last": format_position(each.last)}
            memory.append(topics.samples, 0, encode_batch(each.batch), None, headers)
    assert len(emitted) == 4
    for each in emitted[:2]:  # the first two hours, as the run finds them
        version = lake.append([each.batch], {0: 1}, {0: each.last})
    first = sum(each.batch.num_rows for each in emitted[:2])
    made = [
        Step(
            model="shop",
            run="r",
            step=1,
            positions={},
            ranges=(StepRange("stored", version=1, stop=first, rows=first),),
        ),
        *(
            Step(
                model="shop",
                run="r",
                step=step,
                positions=Positions(1, {0: each.last}).to_json(),
                ranges=(StepRange("live", 0, 0, each.after, each.last, rows=each.batch.num_rows),),
            )
            for step, each in enumerate(emitted[2:], 2)
        ),
    ]
    for step in made:
        memory.append(topics.steps, 0, encode_step(step), None, {})
    for each in emitted[2:]:
        rows = each.batch.slice(1) if each is emitted[3] else each.batch  # the last hour's first row is really lost
        lake.append([rows], {0: 1}, {0: each.last})
    keeper, dropped = Upkeep(lake), emitted[0].batch.num_rows
    keeper.retain(done := Done(), START_MS // HOUR_MS * HOUR_MS + 2 * HOUR_MS)
    assert (done.hours_dropped, done.rows_dropped) == (1, dropped)

    def check() -> None:
        ledger = take_stock(PROJECT, Config(), topics, memory.reader(), lake)
        assert (ledger.retained, ledger.lost_where["lake"], ledger.lost, ledger.twice) == (dropped, 1, 1, 0)
        assert ledger.learnt == ledger.samples == 20
        assert f"retained {dropped}" in table(ledger)

    check()
    time.sleep(2.1)  # past vacuum_ms, to Delta's second
    assert len(keeper.vacuum(Done(), [])) == 1
    with pytest.raises(InvariantBroken, match="retention dropped"):
        lake.read(version)
    check()
    # As lake.history_ms leaves it: a checkpoint, and no entry of the versions before.
    lake.open().create_checkpoint()
    for entry in (tmp_path / "lake" / "_delta_log").glob("*.json"):
        if int(entry.stem) <= version:
            entry.unlink()
    with pytest.raises(Unavailable):
        lake.read(version)
    check()


def hourly() -> list[Record]:
    """One partition; five impressions in each of four hours, whose windows are closed by what follows."""
    records: list[Record] = []

    def append(value: bytes, at_ms: int, **headers: str) -> None:
        records.append(Record("events", 0, len(records), None, value, headers, at_ms))

    visits = list(traffic.synthetic(PROJECT.impression.fields, rows=20).visits())
    for hour in range(4):
        at_ms = START_MS // HOUR_MS * HOUR_MS + hour * HOUR_MS
        shown = [
            {
                **visit.fields,
                "event_id": f"e{visit.row}",
                "request_id": f"e{visit.row}",
                "place": 0,
                "key": "k",
                "event_time_ms": at_ms + 10 * i,
            }
            for i, visit in enumerate(visits[5 * hour : 5 * hour + 5])
        ]
        append(encode_batch(batch_from_rows(shown, impression_schema(PROJECT))), at_ms, kind="impression")
        closing = Punctuation("g", 1, at_ms + 10 * WINDOW_MS, counts={})
        append(encode_punctuation(closing), at_ms + 10 * WINDOW_MS, kind="punctuation")
    return records
